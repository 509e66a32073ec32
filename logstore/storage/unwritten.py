"""The events that no file holds while the disk fails: visible in this process, in bounded memory.

Two kinds, in the order of their ids: those that were acknowledged as written to the operating system, whose file was
given up since, and the volatile ones, which were acknowledged while the disk failed. Only the latter may be dropped.
"""

from __future__ import annotations

from bisect import bisect_right

from logstore.storage.tail import Generation, StreamTail, Tail, memory_of

_ORDINAL = 0
"""No journal file has it."""


class Unwritten:
    """Gathers what is to be written to a new file, until that is done.

    Args:
        tail: Where the events are visible.
        volatile_bytes: Most memory for volatile events.
    """

    def __init__(self, tail: Tail, volatile_bytes: int) -> None:
        self._tail = tail
        self._volatile_bytes = volatile_bytes
        self._events: Generation | None = None
        self._kept = 0
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self._events.ids) if self._events is not None else 0

    @property
    def gathering(self) -> bool:
        """Whether a failure is not mended yet."""
        return self._events is not None

    @property
    def memory_bytes(self) -> int:
        """Memory that the events take."""
        return self._events.bytes if self._events is not None else 0

    def gather(self) -> list[Generation]:
        """Take what the unfinished journals may not hold; return their generations, which are complete now."""
        events = self._events or Generation(_ORDINAL)
        unfinished = [each for each in self._tail.generations if each is not events and not each.sealed]
        for generation in reversed(unfinished):
            self._kept += len(generation.ids) - generation.synced
            self._kept_bytes += memory_of(generation.frames[generation.synced :])
            self._tail.move_unsynced(generation, events)
        if self._events is None:
            self._tail.generations.append(events)
            self._events = events
        return unfinished

    def show(self, ids: list[int], frames: list[bytes], owners: list[StreamTail]) -> None:
        """Make volatile events visible; past the bound the oldest of them go, and a reader is told of the gap."""
        events = self._events
        assert events is not None
        self._tail.show(events, ids, frames, owners)
        excess = events.bytes - self._kept_bytes - self._volatile_bytes
        surplus = 0
        while excess > 0:
            excess -= memory_of([events.frames[self._kept + surplus]])
            surplus += 1
        if surplus:
            self._tail.forget(events, self._kept, surplus)

    def copy(self) -> tuple[list[int], list[bytes]]:
        """Return ids and frames as they are now, in order."""
        assert self._events is not None
        return list(self._events.ids), list(self._events.frames)

    def written(self, last_id: int, ordinal: int) -> None:
        """Note that the events up to `last_id` are in a synced journal file; what came since is left."""
        events = self._events
        assert events is not None
        self._kept = self._kept_bytes = 0
        place = bisect_right(events.ids, last_id)
        rest = Generation(_ORDINAL)
        rest.ids, rest.frames, rest.owners = events.ids[place:], events.frames[place:], events.owners[place:]
        rest.bytes = memory_of(rest.frames)
        self._tail.generations.remove(events)
        target = self._tail.generation(ordinal)
        target.ids += events.ids[:place]
        target.frames += events.frames[:place]
        target.owners += events.owners[:place]
        target.bytes += memory_of(events.frames[:place])
        target.synced = len(target.ids)
        self._events = rest if rest.ids else None
        if rest.ids:
            self._tail.generations.append(rest)
