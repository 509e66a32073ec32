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
        # What is being written just now is not dropped either: it would be lost although the disk had it.
        self._copied = 0
        self._copied_bytes = 0
        self._given_up: list[Generation] = []

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
        """Take what the unfinished journals may not hold; return the generations that lost nothing by it.

        The others stay as they are until `written`: a checkpoint that took them would remove files that hold, with
        luck, what nobody else does.
        """
        events = self._events or Generation(_ORDINAL)
        known = (events, *self._given_up)
        unfinished = [each for each in self._tail.generations if each not in known and not each.sealed]
        for generation in reversed(unfinished):
            moved = len(generation.ids) - generation.synced
            self._kept += moved
            self._kept_bytes += memory_of(generation.frames[generation.synced :])
            self._tail.move_unsynced(generation, events)
            if moved:
                self._given_up.append(generation)
        if self._events is None:
            self._tail.generations.append(events)
            self._events = events
        return [each for each in unfinished if each not in self._given_up]

    def show(self, ids: list[int], frames: list[bytes], owners: list[StreamTail]) -> None:
        """Make volatile events visible; past the bound the oldest of them go, and a reader is told of the gap."""
        events = self._events
        assert events is not None
        self._tail.show(events, ids, frames, owners)
        kept = max(self._kept, self._copied)
        excess = events.bytes - max(self._kept_bytes, self._copied_bytes) - self._volatile_bytes
        surplus = 0
        while excess > 0:
            excess -= memory_of([events.frames[kept + surplus]])
            surplus += 1
        if surplus:
            self._tail.forget(events, kept, surplus)

    def copy(self) -> tuple[list[int], list[bytes]]:
        """Return ids and frames as they are now, in order, to be written; `written` or `not_written` follows."""
        assert self._events is not None
        self._copied, self._copied_bytes = len(self._events.ids), self._events.bytes
        return list(self._events.ids), list(self._events.frames)

    def not_written(self) -> None:
        """Note that what was copied is in no file after all."""
        self._copied = self._copied_bytes = 0

    def written(self, last_id: int, ordinal: int) -> list[Generation]:
        """Note that the events up to `last_id` are in a synced journal file; what came since is left.

        Returns:
            The generations whose files were given up, which are complete now.
        """
        events = self._events
        assert events is not None
        self._kept = self._kept_bytes = 0
        self.not_written()
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
        given_up, self._given_up = self._given_up, []
        return given_up
