"""What the campaign of many processes knows of its store, small enough for ten million events.

A payload tells where its event belongs, so that of an acknowledged event nothing but its id is kept: writers report it
to a file of their own, sixteen bytes an event. Who follows a stream reports the ids that it was shown.
"""

from __future__ import annotations

import random
import struct
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Final, NamedTuple

from crash_kill import BrokenPromiseError
from logstore.storage.ids import lane_of

TASKS: Final = 8
"""Of each slot, appending at the same time; a slot is what one process serves, and another takes over."""
STREAMS_A_TASK: Final = 2
STREAMS_A_SLOT: Final = TASKS * STREAMS_A_TASK
RECORD: Final = struct.Struct("<HHIQ")
"""A line of a writer's report: stream, events of the call, number of the call, id."""
ID_BYTES: Final = 8

_NOISE: Final = random.Random("noise").randbytes(1 << 16)
_SMALL_BYTES: Final = 120
_LARGE_BYTES: Final = 20_000
_LARGE_ONE_IN: Final = 1_000


class Mark(NamedTuple):
    """What a payload says of its event.

    Attributes:
        stream: Where it belongs.
        life: The process that wrote it.
        number: How many this process had written to the stream before.
        call: Counts the calls of one of its tasks.
        of: How many events the call appends, to all streams of the task.
    """

    stream: int
    life: int
    number: int
    call: int
    of: int


def payload_of(mark: Mark) -> bytes:
    """Return the payload of an event: its mark, and bytes that follow from it."""
    drawn = (mark.life * 7919 + mark.stream * 104_729 + mark.number) * 2_654_435_761 & 0xFFFFFFFF
    size = _LARGE_BYTES if drawn % _LARGE_ONE_IN == 0 else drawn % _SMALL_BYTES
    start = (drawn >> 8) % (len(_NOISE) - size)
    return b"%d %d %d %d %d " % mark + _NOISE[start : start + size]


def mark_of(payload: bytes) -> Mark | None:
    """Return what a payload says, or None when it is not what was stored."""
    try:
        stream, life, number, call, of = map(int, payload.split(b" ", 5)[:5])
        mark = Mark(stream, life, number, call, of)
    except ValueError:
        return None
    return mark if payload_of(mark) == payload else None


def name_of(stream: int) -> str:
    """Return the name of a stream."""
    return f"slot{stream // STREAMS_A_SLOT}/stream{stream % STREAMS_A_SLOT}"


def tasks_of(slot: int) -> range:
    """Return the tasks of a slot."""
    return range(slot * TASKS, (slot + 1) * TASKS)


def streams_of(task: int) -> range:
    """Return the streams of a task."""
    return range(task * STREAMS_A_TASK, (task + 1) * STREAMS_A_TASK)


class Track:
    """One stream as a reader sees it: each event once, in order, what was written there and nothing else.

    Args:
        stream: The stream.
        whole: Whether it is read from its beginning.
    """

    def __init__(self, stream: int, *, whole: bool) -> None:
        self._stream = stream
        self._last_id = 0
        self._life = -1
        self._number: int | None = 0 if whole else None
        self._lives: set[int] = set()

    def take(self, event_id: int, payload: bytes) -> Mark:
        """Take the next event.

        Raises:
            BrokenPromiseError: It cannot be the next one.
        """
        mark = mark_of(payload)
        if mark is None or mark.stream != self._stream:
            raise BrokenPromiseError(f"{self._event(event_id)} holds what was never stored there: {payload[:80]!r}")
        if event_id <= self._last_id:
            raise BrokenPromiseError(f"{self._event(event_id)}, {mark}, comes after event {self._last_id}")
        if mark.life != self._life:
            if mark.life in self._lives:
                raise BrokenPromiseError(f"{self._event(event_id)}, {mark}, comes after those of life {self._life}")
            self._lives.add(mark.life)
            self._number = None if self._life < 0 and self._number is None else 0
            self._life = mark.life
        if self._number is not None and mark.number != self._number:
            what = "is there twice" if mark.number < self._number else f"comes without number {self._number}"
            raise BrokenPromiseError(f"{self._event(event_id)}, {mark}, {what}")
        self._last_id, self._number = event_id, mark.number + 1
        return mark

    def _event(self, event_id: int) -> str:
        return f"event {event_id} of {name_of(self._stream)}"


class Shown(NamedTuple):
    """What a follower was shown of a stream: that many events, from `first` to `last`, which come after `after`."""

    after: int
    first: int
    last: int
    events: int
    checksum: int


class _Reported(NamedTuple):
    """A task's newest call in its process's report, and how many of its events stand there."""

    call: int
    events: int
    of: int


class Ledger:
    """The ids that were acknowledged, and those that were shown.

    Attributes:
        ids: Of each stream, the ids of the events that each life has reported, in their order.
        newest: The highest of each stream, 0 for none.
        events: How many.
        ended: The lives whose report is complete.
    """

    def __init__(self, slots: int) -> None:
        streams = slots * STREAMS_A_SLOT
        self.tasks = range(slots * TASKS)
        self.ids: list[dict[int, array[int]]] = [{} for _ in range(streams)]
        self.newest = [0] * streams
        self.events = 0
        self.ended: set[int] = set()
        self._calls: dict[tuple[int, int], _Reported] = {}
        self._shown: list[list[Shown]] = [[] for _ in range(streams)]

    def learn(self, life: int, report: bytes) -> int:
        """Take up what a process has acknowledged; return how many bytes of whole lines that were."""
        end = len(report) - len(report) % RECORD.size
        own: dict[int, array[int]] = {}
        calls: dict[int, tuple[int, int, int]] = {}
        for stream, of, call, event_id in RECORD.iter_unpack(memoryview(report)[:end]):
            ids = own.get(stream)
            if ids is None:
                ids = own[stream] = self.ids[stream].setdefault(life, array("Q"))
            ids.append(event_id)
            task = stream // STREAMS_A_TASK
            newest = calls.get(task) or self._calls.get((life, task))
            calls[task] = (call, newest[1] + 1 if newest is not None and newest[0] == call else 1, of)
        for stream, ids in own.items():
            self.newest[stream] = max(self.newest[stream], ids[-1])
        for task, reported in calls.items():
            self._calls[life, task] = _Reported(*reported)
        self.events += end // RECORD.size
        return end

    def learn_shown(self, stream: int, after: int, report: bytes) -> int:
        """Take up what a follower, which is gone, was shown after an event (0: from the beginning); return how many."""
        ids = array("Q", report[: len(report) - len(report) % ID_BYTES])
        if ids:
            self._shown[stream].append(Shown(after, ids[0], ids[-1], len(ids), zlib.crc32(ids)))
        return len(ids)

    def check_task(self, task: int, read: Callable[[int], Iterable[tuple[int, bytes]]]) -> int:
        """Compare all streams of a task with what is known, and return how many events they have.

        Args:
            task: The task.
            read: Returns the ids and payloads of a whole stream. Processes that live, or began since, may have written
                more than is known here.

        Raises:
            BrokenPromiseError: With what is wrong.
        """
        unfinished: dict[int, list[Mark]] = {}
        events = 0
        for stream in streams_of(task):
            found = self._check_stream(stream, read(stream), unfinished)
            self._check_shown(stream, found)
            events += len(found)
        cut_off = {life for (life, of), newest in self._calls.items() if of == task and newest.events < newest.of}
        for life in (unfinished.keys() | cut_off) & self.ended:
            self._check_unfinished(life, task, unfinished.get(life, []))
        return events

    def _check_stream(
        self, stream: int, events: Iterable[tuple[int, bytes]], unfinished: dict[int, list[Mark]]
    ) -> array[int]:
        """Return the ids of a stream, and note the events that nobody has reported by their life."""
        track = Track(stream, whole=True)
        known = self.ids[stream]
        found: dict[int, int] = {}
        all_ids = array("Q")
        for event_id, payload in events:
            mark = track.take(event_id, payload)
            reported = known.get(mark.life, ())
            if mark.number >= len(reported):
                unfinished.setdefault(mark.life, []).append(mark)
            elif reported[mark.number] != event_id:
                raise BrokenPromiseError(f"{mark} has id {event_id} and was acknowledged as {reported[mark.number]}")
            found[mark.life] = mark.number + 1
            all_ids.append(event_id)
        for life, reported in known.items():
            if found.get(life, 0) < len(reported):
                raise BrokenPromiseError(
                    f"{len(reported) - found.get(life, 0)} acknowledged events of {name_of(stream)} by life {life} are "
                    f"gone, the last of them {reported[-1]}"
                )
        return all_ids

    def _check_shown(self, stream: int, found: array[int]) -> None:
        for shown in self._shown[stream]:
            start = bisect_left(found, shown.first)
            part = found[start : start + shown.events]
            if zlib.crc32(part) != shown.checksum:
                raise BrokenPromiseError(f"of {name_of(stream)} a follower was shown what is not there: {shown}")
            before = found[start - 1] if start else 0
            if before != shown.after:
                raise BrokenPromiseError(f"of {name_of(stream)} a follower was not shown event {before}: {shown}")

    def _check_unfinished(self, life: int, task: int, marks: list[Mark]) -> None:
        """Check what was not reported when its process died: one call of each task, and that one whole."""
        newest = self._calls.get((life, task), _Reported(-1, 0, 0))
        # The report itself may end within a call.
        last, reported, of = newest if newest.events < newest.of else (newest.call + 1, 0, marks[0].of)
        if any(mark.call != last or mark.of != of for mark in marks):
            raise BrokenPromiseError(f"{marks} were stored, though the last call that was reported is {newest.call}")
        if len(marks) + reported != of:
            raise BrokenPromiseError(
                f"{len(marks) + reported} of the {of} events of call {last} of life {life} were stored, all or none "
                "were promised"
            )

    def check_ids(self) -> None:
        """Check that no id was given out twice.

        Raises:
            BrokenPromiseError: One was.
        """
        lanes: dict[int, list[array[int]]] = {}
        for life, ids in self._lives():
            if len(found := {lane_of(event_id) for event_id in ids}) > 1:
                raise BrokenPromiseError(f"life {life} gave out ids of lanes {found}")
            lanes.setdefault(found.pop(), []).append(ids)
        for lane, parts in lanes.items():
            # A lane at a time: a set takes ten times the memory of an array.
            seen: set[int] = set()
            for ids in parts:
                before = len(seen)
                seen.update(ids)
                if len(seen) - before < len(ids):
                    (twice, _), *_ = Counter(chain.from_iterable(parts)).most_common(1)
                    raise BrokenPromiseError(f"id {twice} of lane {lane} was given out twice")

    def _lives(self) -> Iterator[tuple[int, array[int]]]:
        for stream in self.ids:
            yield from stream.items()
