"""The catalogue by itself: that SQLite finds it whole, and that its tables agree."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from logstore.ops.verify.report import Finding, found

_MOST_PROBLEMS: Final = 20


def check_database(connection: sqlite3.Connection, path: Path, *, quick: bool) -> list[Finding]:
    """Let SQLite check its file.

    Raises:
        sqlite3.Error: It gives up.
    """
    findings: list[Finding] = []
    rows = connection.execute(f"PRAGMA {'quick_check' if quick else 'integrity_check'}({_MOST_PROBLEMS})").fetchall()
    findings += [found("catalogue", path, f"SQLite says: {row[0]}") for row in rows if row[0] != "ok"]
    if not quick:
        broken: dict[tuple[str, str], int] = {}
        for table, _, parent, _ in connection.execute("PRAGMA foreign_key_check"):
            broken[table, parent] = broken.get((table, parent), 0) + 1
        for (table, parent), count in broken.items():
            findings.append(found("index", path, f"{count} rows of {table} name rows of {parent} that do not exist"))
    return findings


def row_counts(connection: sqlite3.Connection) -> dict[int, int]:
    """Return how many events the index has in each segment, those included that retention has dropped."""
    return dict(connection.execute("SELECT segment_id, count(*) FROM events GROUP BY segment_id"))


def run_counts(connection: sqlite3.Connection) -> dict[int, int]:
    """Return how many runs the index has in each segment."""
    return dict(connection.execute("SELECT segment_id, count(*) FROM extents GROUP BY segment_id"))


def live_segments(connection: sqlite3.Connection) -> dict[int, tuple[int, int]]:
    """Return length, and whether it is sealed, of each segment that holds live events."""
    rows = connection.execute("SELECT segment_id, bytes, sealed FROM segments WHERE dropped != 1")
    return {number: (size, sealed) for number, size, sealed in rows}


def done_journals(connection: sqlite3.Connection) -> dict[int, set[int]]:
    """Return, by lane, the ordinals of the journals whose events are all in segments."""
    done: dict[int, set[int]] = {}
    for lane, ordinal in connection.execute("SELECT lane, ordinal FROM journals"):
        done.setdefault(lane, set()).add(ordinal)
    return done


def check_tables(connection: sqlite3.Connection, path: Path) -> list[Finding]:
    """Compare the tables with each other, as of one moment."""
    problems = {
        "segments hold fewer rows of events than their runs have": """
            SELECT count(*) FROM (SELECT segment_id, sum(events) AS expected FROM extents GROUP BY segment_id)
            LEFT JOIN (SELECT segment_id, count(*) AS rows FROM events GROUP BY segment_id) USING (segment_id)
            WHERE coalesce(rows, 0) < expected
            """,
        "runs lie in segments that are on their way out, or are not known": """
            SELECT count(*) FROM extents LEFT JOIN segments USING (segment_id) WHERE dropped IS NOT 0
            """,
        "runs are at or below what retention dropped of their stream, and are not shown": """
            SELECT count(*) FROM extents JOIN streams USING (stream_id) WHERE last_id <= dropped_id
            """,
        "streams have a mark of retention that it did not make": """
            SELECT count(*) FROM streams WHERE typeof(dropped_id) != 'integer' OR dropped_id < 0
            OR (dropped_id > 0) != (dropped_at IS NOT NULL)
            """,
        "segments have a state that is none": """
            SELECT count(*) FROM segments WHERE dropped NOT IN (0, 1) OR sealed NOT IN (0, 1)
            OR typeof(bytes) != 'integer' OR (sealed = 1 AND dropped = 0 AND sha256 IS NULL)
            """,
        "rows say nothing about journals": """
            SELECT count(*) FROM journals WHERE typeof(lane) != 'integer' OR typeof(ordinal) != 'integer'
            """,
    }
    findings: list[Finding] = []
    for problem, query in problems.items():
        (count,) = connection.execute(query).fetchone()
        if count:
            findings.append(found("index", path, f"{count} {problem}"))
    return findings


def recorded_damage(connection: sqlite3.Connection) -> list[tuple[str, int, int, int | None, str, str, str]]:
    """Return the rows of the table `damage`: file, offset, length, lost events, reason, kept in, found at."""
    return connection.execute(
        "SELECT file, offset, length, lost_events, reason, kept_in, found_at FROM damage ORDER BY found_at"
    ).fetchall()
