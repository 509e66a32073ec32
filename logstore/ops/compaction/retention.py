"""What is to be dropped: by age, by ended session, by events a stream, by bytes in all.

Whole runs go, so an event may stay a little longer on disk than it is shown. Of a stream always the oldest go: what is
kept has no hole in it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Final, NamedTuple

from logstore.storage.catalogue import iso_now
from logstore.storage.database import connect
from logstore.storage.opening import OpenStore
from logstore.storage.options import Retention
from logstore.storage.record import FLAG_FINAL, FLAG_REQUEST

_SLICE_RUNS: Final = 2_000
"""Runs dropped in one transaction: some tens of milliseconds in which no checkpoint can commit."""

_RUN: Final = "stream_id, last_id, first_id, segment_id, events, length"
_OLDER: Final = f"SELECT {_RUN} FROM extents WHERE last_time_us < ?"
_UNANSWERED: Final = f"""
    SELECT stream_id FROM (SELECT stream_id, max(last_id), last_flags FROM extents GROUP BY stream_id)
    WHERE last_flags & {FLAG_REQUEST | FLAG_FINAL} = {FLAG_REQUEST}
"""
_SURPLUS: Final = f"""
    SELECT {_RUN} FROM (
        SELECT *, sum(events) OVER (PARTITION BY stream_id ORDER BY last_id DESC) - events AS younger
        FROM extents WHERE stream_id IN (
            SELECT stream_id FROM extents GROUP BY stream_id HAVING sum(events) > ? EXCEPT {_UNANSWERED}))
    WHERE younger >= ? AND last_time_us < ?
"""
"""Runs that have enough younger events of their stream behind them."""
_OLDEST: Final = f"""
    SELECT {_RUN} FROM extents WHERE last_id <= ? AND last_time_us < ? AND stream_id NOT IN ({_UNANSWERED})
"""
_NAMED: Final = f"SELECT {_RUN} FROM streams JOIN extents USING (stream_id) WHERE name >= ? AND name < ?"


class Dropped(NamedTuple):
    """What one rule drops.

    Attributes:
        rule: `age`, `session`, `count` or `bytes`.
        events: Events.
        bytes: Bytes of their frames.
        streams: Streams that they are of.
    """

    rule: str
    events: int
    bytes: int
    streams: int


class _Run(NamedTuple):
    stream_id: int
    last_id: int
    first_id: int


class RetentionPlan:
    """The runs that retention drops, decided at one moment. Changes nothing by itself.

    Args:
        reader: A connection for reading of this plan's own.
        inode: Of the catalogue's file that it reads.
    """

    def __init__(self, reader: sqlite3.Connection, inode: int) -> None:
        self.inode = inode
        self._reader = reader
        # In temporary files, not in memory: there may be millions.
        for table, rule in (("going", ", rule TEXT"), ("candidates", "")):
            reader.execute(
                f"""
                CREATE TEMP TABLE {table} (stream_id INTEGER, last_id INTEGER, first_id INTEGER, segment_id INTEGER,
                events INTEGER, length INTEGER{rule}, PRIMARY KEY (stream_id, last_id, first_id)) WITHOUT ROWID
                """
            )

    def decide(self, retention: Retention, now_us: int) -> None:
        """Find what is to go."""
        young_us = now_us - int(retention.resume_window_s * 1_000_000)
        if retention.max_age_s is not None:
            self._drop("age", _OLDER, (now_us - int(retention.max_age_s * 1_000_000),))
        self._drop_ended(young_us)
        if retention.max_events is not None:
            self._drop("count", _SURPLUS, (retention.max_events, retention.max_events, young_us))
        if retention.max_bytes is not None:
            newest = self._newest_beyond(retention.max_bytes)
            self._drop("bytes", _OLDEST, (newest, young_us))

    def _drop(self, rule: str, candidates: str, values: tuple[int | str, ...]) -> None:
        """Let the runs go that a query gives, but for those that follow one that stays in their stream."""
        self._reader.execute("DELETE FROM candidates")
        self._reader.execute(f"INSERT OR IGNORE INTO candidates {candidates}", values)
        self._reader.execute(
            """
            INSERT OR IGNORE INTO going
            WITH kept AS (
                SELECT stream_id, min(first_id) AS first_id FROM extents AS e
                WHERE stream_id IN (SELECT stream_id FROM candidates)
                AND NOT EXISTS (SELECT 1 FROM candidates AS c WHERE c.stream_id = e.stream_id
                                AND c.last_id = e.last_id AND c.first_id = e.first_id)
                AND NOT EXISTS (SELECT 1 FROM going AS g WHERE g.stream_id = e.stream_id
                                AND g.last_id = e.last_id AND g.first_id = e.first_id)
                GROUP BY stream_id)
            SELECT candidates.*, ? FROM candidates LEFT JOIN kept USING (stream_id)
            WHERE kept.first_id IS NULL OR last_id < kept.first_id
            """,
            (rule,),
        )

    def _drop_ended(self, young_us: int) -> None:
        """Let the streams of ended sessions go; nobody can resume them."""
        sessions = self._reader.execute(
            """
            SELECT stream_prefix FROM sessions
            WHERE stream_prefix != '' AND ended_at < datetime(? / 1000000, 'unixepoch')
            """,
            (young_us,),
        ).fetchall()
        for (prefix,) in sessions:
            behind = prefix[:-1] + chr(ord(prefix[-1]) + 1)
            self._drop("session", _NAMED, (prefix, behind))

    def _newest_beyond(self, max_bytes: int) -> int:
        """Return the last event id of the newest of the segments that are too many, 0 when none is."""
        (staying,) = self._reader.execute(
            """
            SELECT coalesce((SELECT sum(bytes) FROM segments WHERE dropped = 0), 0)
                   - coalesce((SELECT sum(length) FROM going), 0)
            """
        ).fetchone()
        newest = 0
        segments = self._reader.execute(
            "SELECT bytes, last_id FROM segments WHERE dropped = 0 AND sealed = 1 ORDER BY last_id"
        )
        for size, last_id in segments:
            if staying <= max_bytes:
                break
            staying -= size
            newest = last_id
        return newest

    def figures(self) -> list[Dropped]:
        """Return what each rule drops."""
        rows = self._reader.execute(
            "SELECT rule, sum(events), sum(length), count(DISTINCT stream_id) FROM going GROUP BY rule ORDER BY rule"
        )
        return [Dropped(*row) for row in rows]

    def slices(self) -> Iterator[list[_Run]]:
        """Yield the runs that go, the oldest segments' first, in portions for one transaction."""
        rows = self._reader.execute("SELECT stream_id, last_id, first_id FROM going ORDER BY segment_id, stream_id")
        while part := [_Run(*row) for row in islice(rows, _SLICE_RUNS)]:
            yield part


@contextlib.contextmanager
def planned(store: OpenStore, retention: Retention, now_us: int) -> Generator[RetentionPlan]:
    """Give what is to be dropped from a store.

    Raises:
        sqlite3.Error: The catalogue cannot be read.
    """
    path = store.catalogue.path
    inode = path.stat().st_ino
    with contextlib.closing(connect(path, write=False)) as reader:
        plan = RetentionPlan(reader, inode)
        plan.decide(retention, now_us)
        yield plan


def drop(store: OpenStore, runs: list[_Run], inode: int) -> None:
    """Drop runs of events: on return no reader is shown them, whatever files still hold.

    Args:
        store: The store.
        runs: From a plan.
        inode: The plan's.

    Raises:
        IndexReplacedError: The index was made again since the plan.
        OSError, sqlite3.Error: The disk or the catalogue refused; all of them are still there.
    """
    newest: dict[int, int] = {}
    for run in runs:
        newest[run.stream_id] = max(run.last_id, newest.get(run.stream_id, 0))
    now = iso_now()
    with store.changing_catalogue(inode) as catalogue:
        connection = catalogue.connection
        connection.executemany("DELETE FROM extents WHERE stream_id = ? AND last_id = ? AND first_id = ?", runs)
        connection.executemany(
            "UPDATE streams SET dropped_id = max(dropped_id, ?), dropped_at = ? WHERE stream_id = ?",
            ((last_id, now, stream_id) for stream_id, last_id in newest.items()),
        )
