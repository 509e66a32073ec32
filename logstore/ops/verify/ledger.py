"""What cannot be judged when it is seen: events that are in no index yet, predecessors that lie elsewhere.

Kept in a temporary SQLite database, which goes to disk when it grows, so that memory stays flat however many they are.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from logstore.ops.transfer.import_notes import BEFORE
from logstore.ops.verify.index import Place, batches, places, streams
from logstore.ops.verify.report import Finding, found
from logstore.ops.verify.segments import Link, Spot
from logstore.storage.files import Disk
from logstore.storage.record import FRAME_HEADER
from logstore.storage.segment import segment_path

_PART: Final = 10_000
_CACHE_KIB: Final = 64 << 10
"""Notes that stay in memory: those of a full lane, so that a full disk is no hindrance."""


class JournalEvent(NamedTuple):
    """An event in a journal; its checksum and length tell it from another one."""

    event_id: int
    prev: int
    stream: str
    checksum: bytes
    file: str
    offset: int | None


class Ledger:
    """Notes taken during a look at a store."""

    def __init__(self) -> None:
        # An empty name is a database of its own in a temporary file.
        self._notes = sqlite3.connect("", isolation_level=None)
        self._notes.executescript(
            f"""
            PRAGMA cache_size = {-_CACHE_KIB};
            CREATE TABLE journal (event_id INTEGER PRIMARY KEY, prev, stream, checksum, file, offset);
            CREATE TABLE links (prev, event_id, stream, file, offset);
            CREATE TABLE unknown (event_id, stream, checksum, file, offset);
            BEGIN;
            """
        )
        self.findings: list[Finding] = []

    def close(self) -> None:
        """Drop the notes."""
        self._notes.close()

    def add_links(self, links: Iterable[Link]) -> None:
        """Note events whose predecessors are to be looked for."""
        self._notes.executemany("INSERT INTO links VALUES (?, ?, ?, ?, ?)", links)

    def add_unknown(self, spots: Iterable[Spot]) -> None:
        """Note events of segments that the index does not have."""
        self._notes.executemany("INSERT INTO unknown VALUES (?, ?, ?, ?, ?)", spots)

    def add_journal(self, events: list[JournalEvent]) -> None:
        """Note the events of a journal; one that another journal has too must be the same."""
        for part in batches(events):
            marks = ", ".join("?" * len(part))
            known = {
                row[0]: row[1:]
                for row in self._notes.execute(
                    f"SELECT event_id, checksum, file FROM journal WHERE event_id IN ({marks})",
                    [event.event_id for event in part],
                )
            }
            for event in part:
                if event.event_id in known and known[event.event_id][0] != event.checksum:
                    reason = f"{known[event.event_id][1]} has another event under the same id"
                    concerned = [(event.event_id, event.stream)]
                    self.findings.append(
                        found("conflict", Path(event.file), reason, event.offset, None, events=concerned)
                    )
            self._notes.executemany("INSERT OR IGNORE INTO journal VALUES (?, ?, ?, ?, ?, ?)", part)

    def compare_with_index(self, connection: sqlite3.Connection, disk: Disk, root: Path) -> list[Finding]:
        """Return the journals' events that the index has with other bytes."""
        findings: list[Finding] = []
        for part in self._parts("SELECT event_id, stream, checksum, file, offset FROM journal"):
            where = places(connection, [row[0] for row in part])
            for event_id, stream, checksum, file, offset in part:
                place = where.get(event_id)
                if place is not None and _is_other(disk, root, place, checksum):
                    reason = f"segment {place[2]} has another event under the same id"
                    findings.append(found("conflict", Path(file), reason, offset, None, [(event_id, stream)]))
        return findings

    def missing_predecessors(self, connection: sqlite3.Connection) -> Iterator[Link]:
        """Yield the events whose predecessors are nowhere, and not dropped by retention either."""
        rows = """
            SELECT * FROM
            (SELECT * FROM links UNION ALL SELECT prev, event_id, stream, file, offset FROM journal WHERE prev != 0)
            AS link WHERE NOT EXISTS (SELECT 1 FROM journal WHERE event_id = link.prev AND stream = link.stream)
            """
        for part in self._parts(rows):
            links = [Link._make(row) for row in part]
            where = places(connection, {link.prev for link in links})
            known = streams(connection, {link.stream for link in links})
            begun = _beginnings(connection, [link.prev for link in links])
            for link in links:
                if link.event_id in begun:
                    continue
                stream_id, dropped = known.get(link.stream, (-1, 0))
                place = where.get(link.prev)
                if link.prev > dropped and (place is None or place[1] != stream_id):
                    yield link

    def unindexed(self, connection: sqlite3.Connection) -> list[Finding]:
        """Return, file by file, the events of segments that neither index nor journals have."""
        lost: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for part in self._parts("SELECT * FROM unknown WHERE event_id NOT IN (SELECT event_id FROM journal)"):
            spots = [Spot._make(row) for row in part]
            where = places(connection, [spot.event_id for spot in spots])
            known = streams(connection, {spot.stream for spot in spots})
            for spot in spots:
                if spot.event_id not in where and spot.event_id > known.get(spot.stream, (0, 0))[1]:
                    lost[spot.file].append((spot.event_id, spot.stream))
        return [
            found("index", Path(file), "events that the index does not have", events=events)
            for file, events in lost.items()
        ]

    def _parts(self, query: str) -> Iterator[list[tuple[Any, ...]]]:
        rows = self._notes.execute(query)
        while part := rows.fetchmany(_PART):
            yield part


def _beginnings(connection: sqlite3.Connection, prevs: list[int]) -> set[int]:
    """Return the events that were imported without what came before them, of those with these predecessors."""
    found: set[int] = set()
    for part in batches(prevs):
        marks = ", ".join("?" * len(part))
        rows = connection.execute(
            f"SELECT event_id FROM imports WHERE source = ? AND source_id IN ({marks})", (BEFORE, *map(str, part))
        )
        found.update(event_id for (event_id,) in rows)
    return found


def _is_other(disk: Disk, root: Path, place: Place, checksum: bytes) -> bool:
    """Whether at an event's place in a segment another frame begins than the one with this length and checksum."""
    _, _, segment, offset, length = place
    try:
        fd = disk.open(segment_path(root, segment))
    except FileNotFoundError:
        return False
    try:
        found_there = disk.read(fd, FRAME_HEADER.size, offset)
    finally:
        disk.close(fd)
    # That no whole frame is there is told by the look at the segment.
    return found_there != checksum and length == FRAME_HEADER.unpack(checksum)[0] + FRAME_HEADER.size
