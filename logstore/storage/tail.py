"""The tail: what this process keeps in memory of its own lane.

Events not yet in segments, and the newest of each stream after that, which is the cache: one structure, so that the
cache is in step with the log by construction. All methods run on the event loop, but for what says otherwise.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from itertools import chain
from typing import Final, NamedTuple

_EVENT_OVERHEAD: Final = 150
"""Bytes that an event in memory costs beside its frame: the objects and their places in lists."""
_STREAM_OVERHEAD: Final = 600


class StreamTail:
    """The newest events of one stream, as far as this process wrote them.

    Attributes:
        name: Name of the stream.
        ids: Their ids, ascending; every event of this lane since the first of them is here, but those up to `lost`
            that were dropped.
        frames: Their frames, in step with `ids`.
        last: Newest id given out for the stream, visible or not yet.
        in_segments: How many of the oldest are in segments too.
        lost: Highest id that was shown from memory and is gone, 0 for none.
        others: What `Foreign.moves` was when the first event came: other lanes may hold newer ones if it moved since.
    """

    __slots__ = ("frames", "ids", "in_segments", "last", "lost", "name", "others")

    def __init__(self, name: str, others: int) -> None:
        self.name = name
        self.ids: list[int] = []
        self.frames: list[bytes] = []
        self.last = 0
        self.in_segments = 0
        self.lost = 0
        self.others = others

    def after(self, event_id: int, limit: int) -> list[bytes]:
        """Return the frames of the first events above an id."""
        place = bisect_right(self.ids, event_id)
        return self.frames[place : place + limit]

    def has_after(self, event_id: int) -> bool:
        """Whether there is something after an event, or was and is lost."""
        return self.lost > event_id or bool(self.ids and self.ids[-1] > event_id)

    def covers(self, event_id: int) -> bool:
        """Whether everything of this lane after the given event is here."""
        return bool(self.ids) and event_id >= self.ids[0]


class Generation:
    """The events of one journal file, in the order of their ids.

    Attributes:
        ordinal: The journal's ordinal.
        ids: Ids of its visible events.
        frames: Their frames, in step.
        owners: Their streams, in step.
        synced: How many of the first are known to be on disk.
        bytes: Memory that they take.
        sealed: Whether the file is finished and on disk whole.
    """

    __slots__ = ("bytes", "frames", "ids", "ordinal", "owners", "sealed", "synced")

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.ids: list[int] = []
        self.frames: list[bytes] = []
        self.owners: list[StreamTail] = []
        self.synced = 0
        self.bytes = 0
        self.sealed = False


class Unsegmented(NamedTuple):
    """Events that go to segments together, in the order of their ids; lists in step.

    Attributes:
        ids: Their ids.
        streams: Names of their streams.
        frames: Their frames.
    """

    ids: list[int]
    streams: list[str]
    frames: list[bytes]

    @classmethod
    def none(cls) -> Unsegmented:
        """Return no events."""
        return cls([], [], [])


def memory_of(frames: list[bytes]) -> int:
    """Return the bytes of memory that these events take."""
    return sum(map(len, frames)) + _EVENT_OVERHEAD * len(frames)


class Tail:
    """All streams and generations in memory.

    Args:
        cache_bytes: Budget for what is in segments too; what is not is bounded by the caller.
        cached_events: Newest events of a stream to keep once they are in segments; the very newest always stays.

    Attributes:
        streams: By name, those of which something is in memory, or on its way there.
        generations: Of the journals that are not in segments yet, oldest first.
        evictions: How often a stream gave up also its newest events in segments.
        bytes: Memory that all of it takes.
        unsegmented_bytes: Memory that events take which are not in segments yet.
    """

    def __init__(self, cache_bytes: int, cached_events: int) -> None:
        self._cache_budget = cache_bytes
        self._keep = max(1, cached_events)
        self.streams: dict[str, StreamTail] = {}
        self.generations: deque[Generation] = deque()
        self._untidy: deque[tuple[StreamTail, int]] = deque()
        # In the order of their last checkpoint; a plain dict takes ever longer to find its first entry.
        self._cached: OrderedDict[StreamTail, None] = OrderedDict()
        self.evictions = 0
        self.bytes = 0
        self.unsegmented_bytes = 0

    def stream(self, name: str, others: int) -> StreamTail:
        """Return the tail of a stream, begun when there is none."""
        found = self.streams.get(name)
        if found is None:
            found = self.streams[name] = StreamTail(name, others)
            self.bytes += _STREAM_OVERHEAD
        return found

    def drop_empty(self, owner: StreamTail) -> None:
        """Forget a stream of which no event ever became visible."""
        if not owner.ids and not owner.lost and self.streams.pop(owner.name, None) is not None:
            self.bytes -= _STREAM_OVERHEAD

    def generation(self, ordinal: int) -> Generation:
        """Return the generation of the journal being written."""
        if not self.generations or self.generations[-1].ordinal != ordinal:
            self.generations.append(Generation(ordinal))
        return self.generations[-1]

    def show(self, generation: Generation, ids: list[int], frames: list[bytes], owners: list[StreamTail]) -> None:
        """Make events of a journal visible."""
        if len(ids) == 1:
            # Most calls in `interval` and `os` mode: a twelfth of an append is saved.
            frame, owner = frames[0], owners[0]
            owner.ids.append(ids[0])
            owner.frames.append(frame)
            generation.ids.append(ids[0])
            generation.frames.append(frame)
            generation.owners.append(owner)
            size = len(frame) + _EVENT_OVERHEAD
            generation.bytes += size
            self.bytes += size
            self.unsegmented_bytes += size
            return
        for event_id, frame, owner in zip(ids, frames, owners, strict=True):
            owner.ids.append(event_id)
            owner.frames.append(frame)
        self.record(generation, ids, frames, owners)

    def move_unsynced(self, source: Generation, target: Generation) -> None:
        """Move the events that the disk is not known to hold to another generation, whose first they become."""
        cut = source.ids[source.synced :], source.frames[source.synced :], source.owners[source.synced :]
        del source.ids[source.synced :], source.frames[source.synced :], source.owners[source.synced :]
        target.ids, target.frames, target.owners = (
            cut[0] + target.ids,
            cut[1] + target.frames,
            cut[2] + target.owners,
        )
        size = memory_of(cut[1])
        source.bytes -= size
        target.bytes += size

    def record(self, generation: Generation, ids: list[int], frames: list[bytes], owners: list[StreamTail]) -> None:
        """Note in which journal file events are that are visible already, or are made so by the caller."""
        generation.ids += ids
        generation.frames += frames
        generation.owners += owners
        size = memory_of(frames)
        generation.bytes += size
        self.bytes += size
        self.unsegmented_bytes += size

    def stream_of(self, event_id: int) -> str | None:
        """Return the stream of an event that is not in segments yet."""
        for generation in self.generations:
            place = bisect_right(generation.ids, event_id) - 1
            if place >= 0 and generation.ids[place] == event_id:
                return generation.owners[place].name
        return None

    def newest_unsegmented(self, prefix: str) -> Generation | None:
        """Return the newest generation with events of streams whose names begin so, None when there is none."""
        for generation in reversed(self.generations):
            if any(owner.name.startswith(prefix) for owner in set(generation.owners)):
                return generation
        return None

    def forget(self, generation: Generation, start: int, count: int) -> None:
        """Drop events that no disk holds; a reader that needs them is told of the gap.

        Args:
            generation: Where they are.
            start: Index of the first of them there.
            count: How many.
        """
        end = start + count
        for event_id, owner in zip(generation.ids[start:end], generation.owners[start:end], strict=True):
            place = bisect_left(owner.ids, event_id)
            self.bytes -= memory_of(owner.frames[place : place + 1])
            del owner.ids[place : place + 1], owner.frames[place : place + 1]
            owner.lost = event_id
        size = memory_of(generation.frames[start:end])
        del generation.ids[start:end], generation.frames[start:end], generation.owners[start:end]
        generation.bytes -= size
        self.unsegmented_bytes -= size

    def segmented(self, generations: list[Generation]) -> None:
        """Note that generations are in segments now; `tidy` gives back what they need not keep."""
        for generation in generations:
            self.generations.remove(generation)
            self.unsegmented_bytes -= generation.bytes
            last = generation.ids[-1] if generation.ids else 0
            self._untidy.extend((owner, last) for owner in dict.fromkeys(generation.owners))

    def tidy(self, streams: int) -> bool:
        """Trim some streams to their newest events, and the cache to its budget; return whether more is to be done.

        Thousands of small streams at once would keep the loop from its tasks for tens of milliseconds.
        """
        for _ in range(min(streams, len(self._untidy))):
            self._trim(*self._untidy.popleft())
        evicted = 0
        # What is not in segments yet has its share of the budget whether it uses it or not: the cache must not fill it.
        while self.bytes - self.unsegmented_bytes > self._cache_budget and self._cached and evicted < streams:
            self._evict(self._cached.popitem(last=False)[0])
            evicted += 1
        return bool(self._untidy) or evicted == streams

    def _trim(self, owner: StreamTail, last: int) -> None:
        """Keep the newest of a stream's events up to `last`, and queue it for eviction."""
        owner.in_segments = bisect_right(owner.ids, last)
        surplus = min(owner.in_segments, len(owner.ids) - self._keep)
        if surplus > 0:
            self._drop(owner, surplus)
        self._cached[owner] = None
        self._cached.move_to_end(owner)

    def _drop(self, owner: StreamTail, count: int) -> None:
        self.bytes -= memory_of(owner.frames[:count])
        del owner.ids[:count], owner.frames[:count]
        owner.in_segments -= count

    def _evict(self, owner: StreamTail) -> None:
        """Drop what is in segments of a stream that had its turn."""
        if self.streams.get(owner.name) is not owner or not owner.ids:
            return
        # An event on its way to the disk needs its stream's place here, and its successor finds it as `prev`.
        idle = owner.ids[-1] == owner.last and not owner.lost
        self._drop(owner, owner.in_segments)
        self.evictions += 1
        if idle and not owner.ids:
            del self.streams[owner.name]
            self.bytes -= _STREAM_OVERHEAD

    def unsegmented(self, generations: list[Generation]) -> Unsegmented:
        """Return the events of sealed generations, which do not change: called in the checkpoint's thread."""
        return Unsegmented(
            list(chain.from_iterable(generation.ids for generation in generations)),
            [owner.name for generation in generations for owner in generation.owners],
            list(chain.from_iterable(generation.frames for generation in generations)),
        )
