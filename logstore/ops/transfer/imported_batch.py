"""Bringing a batch of imported events into a store, as a checkpoint does: segments first, then the index.

What each event is to the store is found out under the checkpoint lock, where nobody else indexes anything. Where a
foreign event came from is noted in `imports` before the event itself is written: a note without its event, which a
crash leaves, counts for nothing; an event without its note would come twice. The notes can be made again from the log.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Final, NamedTuple

from logstore.ops.transfer.foreign_databases import ForeignEvent
from logstore.ops.transfer.import_notes import BEFORE, Origin, note_origins, origin_of, remake_imports
from logstore.ops.transfer.import_sources import Found, LeftOut
from logstore.storage.database import connect
from logstore.storage.files import Disk
from logstore.storage.foreign import Foreign
from logstore.storage.header import frame_seed
from logstore.storage.ids import later
from logstore.storage.lane import is_held, lane_folders, read_reservation
from logstore.storage.opening import OpenStore
from logstore.storage.origin import encode_origin, split_origin
from logstore.storage.record import (
    FLAG_IMPORTED,
    Event,
    decode_frame,
    encode_frame,
    frame_at,
)
from logstore.storage.segment import segment_path
from logstore.storage.tail import Unsegmented

_ARGUMENTS: Final = 250
_MOST_AHEAD_MS: Final = 24 * 3_600_000
"""How far an id may be ahead of the clock: all later ids of the store are above it."""
_LOOKS: Final = 5


@dataclass
class BatchResult:
    """What became of a batch; see `ImportResult`."""

    added: int = 0
    already_there: int = 0
    dropped: int = 0
    conflicts: list[LeftOut] = field(default_factory=list[LeftOut])
    invalid: list[LeftOut] = field(default_factory=list[LeftOut])


class _Taken(NamedTuple):
    """An event of the batch with the id that it has in the store."""

    place: str
    event: Event
    origin: Origin | None


class BatchWriter:
    """Writes batches of one import. Close it before the store.

    Args:
        store: Open, and this process's own lane of it not written otherwise.
        disk: The file door.

    Raises:
        OSError, sqlite3.Error: The disk or the catalogue refused.
    """

    def __init__(self, store: OpenStore, disk: Disk) -> None:
        self._store = store
        self._disk = disk
        self._seed = frame_seed(store.store_id)
        self._journals = Foreign(disk, store.root, store.lane.number)
        self._notes_checked = False
        with store.checkpoint_lock():
            self._database = connect(store.catalogue.path, write=True)

    def close(self) -> None:
        """Close what was opened."""
        try:
            with self._store.checkpoint_lock():
                self._database.close()
        finally:
            # Also when the disk does not give the lock; a second time does nothing.
            self._database.close()
            self._journals.close()

    def write(self, batch: Sequence[Found]) -> BatchResult:
        """Add what the store does not have. On return it is on disk and indexed.

        Raises:
            OSError, sqlite3.Error: The disk or the catalogue refused; importing again is safe.
        """
        result = BatchResult()
        if not self._notes_checked and any(_has_origin(found.event) for found in batch):
            if self._notes_are_lost():
                remake_imports(self._store, self._disk)
            self._notes_checked = True
        with self._store.checkpoint_lock():
            if self._store.catalogue.replaced:
                raise OSError(f"{self._store.catalogue.path} was replaced meanwhile")
            self._journals.read_on()
            streams = sorted({found.event.stream for found in batch})
            dropped = dict(self._ask("SELECT name, dropped_id FROM streams WHERE name IN ({})", streams))
            taken, there = self._ours(batch, dropped, result)
            taken += self._foreign(batch, dropped, result)
            self._add(taken, result)
        self._compare(there, result)
        return result

    # Events of a store like this one.

    def _ours(
        self, batch: Sequence[Found], dropped: dict[str, int], result: BatchResult
    ) -> tuple[list[_Taken], list[_Taken]]:
        """Return the events to add, and those whose id the store knows."""
        ours = [
            _Taken(found.place, found.event, origin_of(found.event))
            for found in batch
            if isinstance(found.event, Event)
        ]
        indexed = self._store.catalogue.indexed([each.event.id for each in ours])
        taken: dict[int, _Taken] = {}
        there: list[_Taken] = []
        for each in ours:
            event = each.event
            if event.id <= dropped.get(event.stream, 0):
                result.dropped += 1
            elif event.id in taken:
                _judge(each, taken[event.id].event, result)
            elif event.id in indexed or self._journals.stream_of(event.id) is not None:
                there.append(each)
            else:
                taken[event.id] = each
        early = self._first_id_to_come(list(taken))
        for each in taken.values():
            if each.event.id >= early:
                reason = (
                    f"the id {each.event.id} is ahead of the clock here; import again later, with no server running"
                )
                result.invalid.append(LeftOut(each.place, reason))
        return [each for each in taken.values() if each.event.id < early], there

    def _first_id_to_come(self, ids: list[int]) -> int:
        """Return the lowest id that may not be imported: that another process could draw, or that is nonsense."""
        now_ms = time.time_ns() // 1_000_000
        if max(ids, default=0) >= later(0, now_ms) and others_open(self._store, self._disk):
            return later(0, now_ms)
        return later(0, now_ms + _MOST_AHEAD_MS)

    # Events of other stores.

    def _foreign(self, batch: Sequence[Found], dropped: dict[str, int], result: BatchResult) -> list[_Taken]:
        """Return the events to add, with new ids."""
        foreign: dict[Origin, tuple[str, ForeignEvent]] = {}
        for found in batch:
            if isinstance(found.event, ForeignEvent):
                key = (found.event.source, found.event.source_id)
                result.already_there += key in foreign
                foreign.setdefault(key, (found.place, found.event))
        noted = self._noted(foreign)
        indexed = self._store.catalogue.indexed(list(noted.values()))
        new: list[tuple[str, ForeignEvent]] = []
        for key, (place, event) in foreign.items():
            if 0 < noted.get(key, 0) <= dropped.get(event.stream, 0):
                result.dropped += 1
            elif noted.get(key) in indexed:
                result.already_there += 1
            else:
                new.append((place, event))
        return list(self._with_ids(new))

    def _noted(self, origins: Iterable[Origin]) -> dict[Origin, int]:
        """Return the ids that events of these origins got when they were imported."""
        by_source: dict[str, list[str]] = {}
        for source, source_id in origins:
            by_source.setdefault(source, []).append(source_id)
        sql = "SELECT source_id, event_id FROM imports WHERE source = ? AND source_id IN ({})"
        return {
            (source, source_id): event_id
            for source, source_ids in by_source.items()
            for source_id, event_id in self._ask(sql, source_ids, source)
        }

    def _with_ids(self, new: list[tuple[str, ForeignEvent]]) -> Iterator[_Taken]:
        sql = "SELECT name, max(last_id) FROM streams JOIN extents USING (stream_id) WHERE name IN ({}) GROUP BY name"
        last = dict(self._ask(sql, sorted({event.stream for _, event in new})))
        for place, event in new:
            event_id = self._store.lane.ids.next(time.time_ns() // 1000)
            origin = (event.source, event.source_id)
            payload = encode_origin(*origin) + event.payload
            flags = event.flags | FLAG_IMPORTED
            # Another process may have put something with a later id there: then nothing is said.
            prev = last.get(event.stream, 0)
            prev = prev if prev < event_id else 0
            last[event.stream] = event_id
            yield _Taken(place, Event(event_id, prev, event.time_us, event.stream, flags, payload), origin)

    # Writing.

    def _add(self, taken: list[_Taken], result: BatchResult) -> None:
        frames: dict[int, bytes] = {}
        streams: dict[int, str] = {}
        written: list[_Taken] = []
        for each in taken:
            try:
                frame = encode_frame(each.event, self._seed)
            except ValueError as error:
                result.invalid.append(LeftOut(each.place, str(error)))
                continue
            frames[each.event.id] = frame
            streams[each.event.id] = each.event.stream
            written.append(each)
        if not written:
            return
        lane = self._store.lane
        # What this lane draws from here on is above all of them, and no later opening goes below.
        lane.advance(max(each.event.id for each in written))
        if lane.ids.last >= lane.reserved_id:
            lane.reserve(lane.ids.last)
        origins = [(*each.origin, each.event.id) for each in written if each.origin is not None]
        if origins:
            note_origins(self._database, origins)
        self._note_beginnings(written)
        ids = sorted(frames)
        events = Unsegmented(ids, [streams[each] for each in ids], [frames[each] for each in ids])
        self._store.segments.write(events, [], time.time_ns() // 1000)
        result.added += len(written)

    def _note_beginnings(self, written: list[_Taken]) -> None:
        """Note the events whose predecessors are nowhere: what retention dropped, or an export left out."""
        here = {each.event.id for each in written}
        prevs = {each.event.prev for each in written} - here - {0}
        prevs -= self._store.catalogue.indexed(sorted(prevs)).keys()
        rows = [
            (BEFORE, str(each.event.prev), each.event.id)
            for each in written
            if each.event.prev in prevs and self._journals.stream_of(each.event.prev) is None
        ]
        if rows:
            note_origins(self._database, rows)

    def _notes_are_lost(self) -> bool:
        """Whether the table has no row though the store has events: the catalogue may have been made again."""
        (noted,) = self._database.execute(
            "SELECT EXISTS (SELECT 1 FROM imports WHERE source != ?)", (BEFORE,)
        ).fetchone()
        return not noted and self._store.catalogue.last_id() > 0

    # Comparing.

    def _compare(self, there: list[_Taken], result: BatchResult) -> None:
        """Judge events whose ids the store knows."""
        waiting: dict[int, list[_Taken]] = {}
        for each in there:
            waiting.setdefault(each.event.id, []).append(each)
        for _ in range(_LOOKS):
            # Compaction may be moving them.
            for stored in self._stored(list(waiting)):
                for each in waiting.pop(stored.id):
                    _judge(each, stored, result)
        for each in chain.from_iterable(waiting.values()):
            result.conflicts.append(LeftOut(each.place, f"event {each.event.id} is in the store, but cannot be read"))

    def _stored(self, wanted: list[int]) -> list[Event]:
        """Return those of some events that can be read."""
        if not wanted:
            return []
        found: dict[int, Event] = {}
        for event_id in wanted:
            stream = self._journals.stream_of(event_id)
            frames = [] if stream is None else self._journals.frames(stream, event_id - 1, 1)
            found.update((event.id, event) for event in map(decode_frame, frames) if event.id == event_id)
        sql = "SELECT segment_id, event_id, offset, length FROM events WHERE event_id IN ({})"
        by_segment: dict[int, list[tuple[int, int, int]]] = {}
        for segment, *place in self._ask(sql, [event_id for event_id in wanted if event_id not in found]):
            by_segment.setdefault(segment, []).append((place[0], place[1], place[2]))
        for segment, places in by_segment.items():
            found.update((event.id, event) for event in self._in_segment(segment, places))
        return list(found.values())

    def _in_segment(self, segment: int, places: list[tuple[int, int, int]]) -> Iterator[Event]:
        try:
            fd = self._disk.open(segment_path(self._store.root, segment))
        except FileNotFoundError:
            return
        try:
            for event_id, offset, length in places:
                frame = frame_at(self._disk.read(fd, length, offset), 0, self._seed)
                event = None if frame is None else decode_frame(frame)
                if event is not None and event.id == event_id:
                    yield event
        finally:
            self._disk.close(fd)

    def _ask(self, sql: str, values: Sequence[Any], *before: Any) -> Iterator[Any]:
        """Yield the rows of a question about many values, asked in parts."""
        rest = iter(values)
        while part := list(islice(rest, _ARGUMENTS)):
            yield from self._database.execute(sql.format(", ".join("?" * len(part))), (*before, *part))


def _has_origin(event: Event | ForeignEvent) -> bool:
    return isinstance(event, ForeignEvent) or bool(event.flags & FLAG_IMPORTED)


def _judge(each: _Taken, stored: Event, result: BatchResult) -> None:
    if _is_same(each.event, stored):
        result.already_there += 1
    else:
        reason = f"the store has another event with the id {stored.id}, in stream {stored.stream!r}"
        result.conflicts.append(LeftOut(each.place, reason))


def _is_same(left: Event, right: Event) -> bool:
    if left == right:
        return True
    # Written out by another program, a message may have come in other words.
    return (
        (left.id, left.prev, left.time_us, left.stream, left.flags)
        == (right.id, right.prev, right.time_us, right.stream, right.flags)
    ) and _meaning(left) == _meaning(right)


def _meaning(event: Event) -> object:
    payload = event.payload
    try:
        origin: tuple[str, ...] = ()
        if event.flags & FLAG_IMPORTED:
            *origin_texts, payload = split_origin(payload)
            origin = tuple(map(str, origin_texts))
        return origin, json.dumps(json.loads(payload), sort_keys=True)
    except (ValueError, RecursionError):
        return payload


def others_open(store: OpenStore, disk: Disk) -> bool:
    """Whether another lane of the store is in use."""
    lanes = lane_folders(disk, store.root)
    return any(number != store.lane.number and is_held(disk, folder) for number, folder in lanes)


def announce(store: OpenStore, disk: Disk) -> bool:
    """Have other processes that have the store open look at the disk again, and say whether there are any.

    They watch the marks of all lanes. The place that this one shows is that of a journal which will never be: the
    caller leaves the lane's reservation as it is, so that the next opening of the lane begins behind it.
    """
    if not others_open(store, disk):
        return False
    store.lane.marks.show(read_reservation(disk, store.lane.folder).ordinal - 1, 0)
    return True
