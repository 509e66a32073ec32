"""Every byte of a segment, and what the index says of it."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from logstore.errors import DamageError, FormatVersionError
from logstore.ops.verify.frames import Frames
from logstore.ops.verify.index import IndexedEvent, Place, SegmentRow, places, rows_of, segment_row, streams
from logstore.ops.verify.report import Finding, found
from logstore.storage.catalogue import Extent
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_SEGMENT, decode_header
from logstore.storage.record import FRAME_HEADER, decode_stamp, frame_at
from logstore.storage.segment import segment_path

_STREAMS_A_STATEMENT: Final = 80


class Link(NamedTuple):
    """An event whose predecessor the index does not have."""

    prev: int
    event_id: int
    stream: str
    file: str
    offset: int


class Spot(NamedTuple):
    """An event in a file that the index does not have."""

    event_id: int
    stream: str
    checksum: bytes
    file: str
    offset: int


class SegmentCheck(NamedTuple):
    """What was found of one segment.

    Attributes:
        number: Of the segment.
        bytes: Read.
        events: Whole events in it.
        live: How many of them the index has here.
        runs: How many runs of the index agree with it.
        findings: What is wrong.
        links: Events whose predecessors are to be looked for elsewhere.
        unknown: Events that are to be looked for in journals.
    """

    number: int
    bytes: int
    events: int
    live: int
    runs: int
    findings: list[Finding]
    links: list[Link]
    unknown: list[Spot]


def check_segment(
    disk: Disk, root: Path, number: int, store_id: int, seed: int, connection: sqlite3.Connection | None, full: bool
) -> SegmentCheck | None:
    """Read a segment and compare it with the index as of one moment.

    The bytes that the index knows of do not change any more, so the file may be read after the index was asked.

    Args:
        disk: The file door.
        root: The log folder.
        number: Of the segment.
        store_id: Of the store.
        seed: Start value of the checksums.
        connection: The index; None when it cannot be read.
        full: Whether to look at every row of the index that names the segment: a pass over all its rows.

    Returns:
        None for a segment that is gone, or without a live event on its way out.
    """
    path = segment_path(root, number)
    row = None if connection is None else segment_row(connection, number)
    if row is not None and row.dropped == 1:
        return None
    try:
        data = disk.read_file(path)
    except FileNotFoundError:
        if row is None or connection is None:
            return None
        lost = ((each.event_id, each.stream) for each in rows_of(connection, number))
        finding = found("damage", path, "the file is gone, and the index names it", events=lost)
        return SegmentCheck(number, 0, 0, 0, 0, [finding], [], [])
    except OSError as error:
        finding = found("damage", path, f"the disk does not give the file: {error}")
        return SegmentCheck(number, 0, 0, 0, 0, [finding], [], [])
    look = _Look(disk, root, number, data, row, seed, has_index=connection is not None)
    look.check_file(store_id)
    if connection is not None:
        look.compare(connection, full or look.is_ragged)
    look.tell_gaps()
    return look.result()


class _Look:
    """One segment being compared with the index."""

    def __init__(
        self,
        disk: Disk,
        root: Path,
        number: int,
        data: bytes,
        row: SegmentRow | None,
        seed: int,
        *,
        has_index: bool,
    ) -> None:
        self._disk = disk
        self._root = root
        self._number = number
        self._path = segment_path(root, number)
        self._data = data
        self._row = row
        self._has_index = has_index
        self._altered = False
        frames = Frames(data, seed)
        self._stamps = frames.stamps
        self._offsets = frames.offsets
        self._lengths = frames.lengths
        self._gaps = frames.gaps
        self._runs = frames.runs
        self._spans = frames.spans()
        self._seed = seed
        self._streams: dict[str, tuple[int, int]] = {}
        self._live = bytearray()
        self._covered = bytearray()
        self._agreeing = 0
        self._lost: list[IndexedEvent] = []
        self._findings: list[Finding] = []
        self._links: list[Link] = []
        self._unknown: list[Spot] = []

    @property
    def _is_sealed(self) -> bool:
        return self._row is not None and self._row.sealed == 1

    @property
    def _known_bytes(self) -> int:
        """Up to where the file was on disk when its length was noted."""
        return self._row.bytes if self._row is not None and type(self._row.bytes) is int else 0

    @property
    def is_ragged(self) -> bool:
        """Whether the file is not whole frames from its header to its end."""
        return bool(self._gaps) or self._altered or len(self._data) < self._known_bytes

    def check_file(self, store_id: int) -> None:
        """Check the header, and length and digest of a sealed file."""
        self._check_header(store_id)
        if self._row is None:
            return
        size, known = len(self._data), self._known_bytes
        if size < known:
            self._say("damage", f"the file ends at {size}, {known} bytes were on disk", size, known - size)
        if self._is_sealed:
            if size > known:
                self._say("damage", "bytes behind the end of a sealed segment", known, size - known)
            self._altered = hashlib.sha256(memoryview(self._data)[:known]).hexdigest() != self._row.sha256

    def _check_header(self, store_id: int) -> None:
        try:
            header = decode_header(self._data, self._path, KIND_SEGMENT)
        except FormatVersionError as error:
            self._say("version", str(error), 0, HEADER_BYTES)
        except DamageError as error:
            # One that the index does not know may be about to be written.
            if self._row is not None or not self._has_index:
                self._say("damage", str(error), 0, min(HEADER_BYTES, len(self._data)))
        else:
            if header.store_id != store_id:
                self._say("damage", "the file belongs to another store", 0, HEADER_BYTES)
            elif header.number != self._number:
                self._say("damage", f"the file is segment {header.number} by its header", 0, HEADER_BYTES)

    def compare(self, connection: sqlite3.Connection, full: bool) -> None:
        """Compare frames, rows of events, and runs, each with the others."""
        stamps = self._stamps
        self._streams = streams(connection, self._spans)
        where = places(connection, [stamp.id for stamp in stamps])
        self._live = bytearray(len(stamps))
        self._covered = bytearray(len(stamps))
        # Of an event that lies here more than once the index has one place.
        nowhere = (-1, 0)
        number = self._number
        for place, (stamp, offset, length) in enumerate(zip(stamps, self._offsets, self._lengths, strict=True)):
            stream_id = self._streams.get(stamp.stream, nowhere)[0]
            if where.get(stamp.id) == (stamp.id, stream_id, number, offset, length):
                self._live[place] = 1
        self._compare_runs(self._all_runs(connection) if full else self._runs_of_streams(connection))
        self._compare_each(where)
        self._compare_totals()
        self._follow_chain(connection, where)
        if full:
            here = {stamp.id for place, stamp in enumerate(stamps) if self._live[place]}
            self._lost = [row for row in rows_of(connection, self._number) if row.event_id not in here]

    def _all_runs(self, connection: sqlite3.Connection) -> Iterator[Extent]:
        rows = connection.execute("SELECT * FROM extents WHERE segment_id = ? ORDER BY offset", (self._number,))
        return map(Extent._make, rows)

    def _runs_of_streams(self, connection: sqlite3.Connection) -> Iterator[Extent]:
        """Yield the runs that the index has here of the streams that are here, by its key."""
        keys = [(self._streams[name][0], *span) for name, span in self._spans.items() if name in self._streams]
        for start in range(0, len(keys), _STREAMS_A_STATEMENT):
            part = keys[start : start + _STREAMS_A_STATEMENT]
            values = ", ".join(["(?, ?, ?)"] * len(part))
            rows = connection.execute(
                f"""
                WITH asked (stream_id, first_id, last_id) AS (VALUES {values})
                SELECT extents.* FROM asked CROSS JOIN extents ON extents.stream_id = asked.stream_id
                AND extents.last_id BETWEEN asked.first_id AND asked.last_id WHERE segment_id = ?
                """,
                [value for key in part for value in key] + [self._number],
            )
            yield from map(Extent._make, rows)

    def _compare_runs(self, runs: Iterable[Extent]) -> None:
        at = {offset: place for place, offset in enumerate(self._offsets)}
        names = {number: name for name, (number, _) in self._streams.items()}
        for run in runs:
            place = at.get(run.offset)
            if place is None or not self._agrees(run, place, names.get(run.stream_id)):
                if not self._is_in_gap(run):
                    self._say(
                        "index",
                        f"the index has events {run.first_id} to {run.last_id} of stream "
                        f"{names.get(run.stream_id, run.stream_id)!r} here, the file says otherwise",
                        _number(run.offset),
                        _number(run.length),
                    )
                continue
            self._agreeing += 1
            if any(self._covered[place : place + run.events]):
                self._say("index", "the index has two runs over the same events", run.offset, run.length)
            self._covered[place : place + run.events] = b"\1" * run.events

    def _agrees(self, run: Extent, place: int, stream: str | None) -> bool:
        if any(type(value) is not int for value in run) or not 0 < run.events <= len(self._stamps) - place:
            return False
        final = place + run.events - 1
        first, last = self._stamps[place], self._stamps[final]
        end = self._offsets[final] + self._lengths[final]
        return (
            self._runs[place] == self._runs[final]
            and stream == first.stream
            and (first.id, first.time_us) == (run.first_id, run.first_time_us)
            and (last.id, last.time_us, last.flags) == (run.last_id, run.last_time_us, run.last_flags)
            and end == run.offset + run.length
        )

    def _is_in_gap(self, run: Extent) -> bool:
        """Whether a run is not what the file holds because the file is damaged there."""
        if _number(run.offset) is None or _number(run.length) is None:
            return False
        missing = [(len(self._data), self._known_bytes - len(self._data)), *self._gaps]
        return any(start < run.offset + run.length and run.offset < start + size for start, size in missing if size > 0)

    def _compare_each(self, where: dict[int, Place]) -> None:
        """Look at the events that rows and runs do not both have here."""
        if self._live == self._covered and all(self._live):
            return
        rowless: list[tuple[int, str]] = []
        runless: list[tuple[int, str]] = []
        for place, (stamp, live, covered) in enumerate(zip(self._stamps, self._live, self._covered, strict=True)):
            if (live and covered) or stamp.id <= self._streams.get(stamp.stream, (0, 0))[1]:
                continue
            if covered:
                rowless.append((stamp.id, stamp.stream))
            elif live:
                runless.append((stamp.id, stamp.stream))
            else:
                self._look_elsewhere(place, where.get(stamp.id))
        if rowless:
            self._say("index", "events that runs have here and rows have not", events=rowless)
        if runless and not self._gaps:
            self._say("index", "events that rows have here and runs have not", events=runless)

    def _look_elsewhere(self, place: int, known: Place | None) -> None:
        """Look for an event that is here and that the index does not have here."""
        stamp, offset = self._stamps[place], self._offsets[place]
        if known is None:
            checksum = self._data[offset : offset + FRAME_HEADER.size]
            self._unknown.append(Spot(stamp.id, stamp.stream, checksum, str(self._path), offset))
        elif self._differs(place, known):
            reason = "the index has another event under the same id elsewhere"
            self._say("conflict", reason, offset, self._lengths[place], [(stamp.id, stamp.stream)])

    def _differs(self, place: int, known: Place) -> bool:
        """Whether the index has another event under the id of the frame at a place."""
        _, _, segment, offset, length = known
        if not (type(segment) is type(offset) is type(length) is int and offset >= 0 and 0 < length < 1 << 32):
            return False
        try:
            fd = self._disk.open(segment_path(self._root, segment))
        except FileNotFoundError:
            return False
        try:
            frame = frame_at(self._disk.read(fd, length, offset), 0, self._seed)
        finally:
            self._disk.close(fd)
        own = self._data[self._offsets[place] : self._offsets[place] + self._lengths[place]]
        # That no frame is there is told where it should be.
        return frame is not None and frame != own and _id_of(frame) == self._stamps[place].id

    def _compare_totals(self) -> None:
        row = self._row
        if row is not None and row.file != f"segments/{self._path.name}":
            self._say("index", f"the index has the segment in the file {row.file}")
        if row is not None and row.stream_id is not None and len(self._spans) > 1:
            owners = {stamp.stream for stamp, covered in zip(self._stamps, self._covered, strict=True) if covered}
            others = [name for name in owners if self._streams.get(name, (-1, 0))[0] != row.stream_id]
            if others:
                self._say("index", f"the index has the segment as stream {row.stream_id}'s own, it holds {others[:3]}")
        ids = [stamp.id for stamp, covered in zip(self._stamps, self._covered, strict=True) if covered]
        if row is None or self._gaps or not ids:
            return
        if not (
            all(type(value) is int for value in (row.events, row.first_id, row.last_id))
            and len(ids) <= row.events <= len(self._stamps)
            and row.first_id <= min(ids)
            and row.last_id >= max(ids)
        ):
            self._say(
                "index",
                f"the index says {row.events} events, {row.first_id} to {row.last_id}; the file has {len(ids)} live "
                f"ones, {min(ids)} to {max(ids)}",
            )

    def _follow_chain(self, connection: sqlite3.Connection, where: dict[int, Place]) -> None:
        """Collect the events whose predecessor is neither here before them nor in the index."""
        last: dict[str, int] = {}
        asked: list[int] = []
        for place, stamp in enumerate(self._stamps):
            prev = stamp.prev
            if prev and prev != last.get(stamp.stream) and self._live[place]:
                known = where.get(prev)
                stream_id, dropped = self._streams[stamp.stream]
                if prev > dropped and (known is None or known[1] != stream_id):
                    asked.append(place)
            last[stamp.stream] = stamp.id
        if not asked:
            return
        elsewhere = places(connection, [self._stamps[place].prev for place in asked])
        for place in asked:
            stamp = self._stamps[place]
            known = elsewhere.get(stamp.prev)
            if known is None or known[1] != self._streams[stamp.stream][0]:
                self._links.append(Link(stamp.prev, stamp.id, stamp.stream, str(self._path), self._offsets[place]))

    def tell_gaps(self) -> None:
        """Say what is damaged, and which events the index had there."""
        told: set[int] = set()
        for start, size in self._gaps:
            lost = [each for each in self._lost if _overlap(each, start, size)]
            told.update(each.event_id for each in lost)
            if lost or self._should_be_whole(start):
                self._say("damage", "bytes that are no whole event", start, size, _ids(lost))
        rest = [each for each in self._lost if each.event_id not in told]
        behind = [each for each in rest if type(each.offset) is int and each.offset >= len(self._data)]
        if behind:
            self._say("damage", "events that were behind the end of the file", len(self._data), None, _ids(behind))
        elsewhere = [each for each in rest if each not in behind]
        if elsewhere:
            self._say("index", "events that the index has here and the file has not", None, None, _ids(elsewhere))
        if self._altered and not self._findings:
            self._say("damage", "the file is not what it was when it was sealed: its SHA-256 is another", 0, None)

    def _should_be_whole(self, offset: int) -> bool:
        """Whether the file was whole frames at an offset once.

        A checkpoint that a crash cut short leaves torn bytes behind the known length; a later opening takes such a file
        as it is, and its digest with it.
        """
        if not self._has_index:
            return True
        return self._row is not None and offset < self._known_bytes and (self._altered or not self._is_sealed)

    def _say(
        self, kind: Any, reason: str, offset: int | None = None, length: int | None = None, events: Any = ()
    ) -> None:
        self._findings.append(found(kind, self._path, reason, offset, length, events))

    def result(self) -> SegmentCheck:
        """Return what was found."""
        return SegmentCheck(
            number=self._number,
            bytes=len(self._data),
            events=len(self._stamps),
            live=sum(self._live),
            runs=self._agreeing,
            findings=self._findings,
            links=self._links,
            unknown=self._unknown,
        )


def _number(value: Any) -> int | None:
    """Return what a damaged column may hold, if it is a number."""
    return value if isinstance(value, int) else None


def _id_of(frame: bytes) -> int:
    """Return the id of a verified frame."""
    return decode_stamp(frame).id


def _ids(rows: Iterable[IndexedEvent]) -> list[tuple[int, str]]:
    return [(row.event_id, row.stream) for row in rows]


def _overlap(row: IndexedEvent, start: int, size: int) -> bool:
    if type(row.offset) is not int or type(row.length) is not int:
        return False
    return row.offset < start + size and start < row.offset + row.length
