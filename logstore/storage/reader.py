"""Reading a stream: own tail, other lanes, segments; merged by id.

The order is what makes it whole: first the own tail is copied and the other lanes pinned, then the catalogue is asked.
The other way round, what a checkpoint moves in between would be seen in neither place.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from logstore.errors import DamageError, GapError
from logstore.storage.catalogue import Catalogue, Extent, StreamRuns
from logstore.storage.files import Disk
from logstore.storage.foreign import Foreign
from logstore.storage.ids import MAX_ID, time_ms_of
from logstore.storage.options import Retention
from logstore.storage.record import (
    FLAG_FINAL,
    FLAG_REQUEST,
    FRAME_HEADER,
    Event,
    decode_events,
    decode_frame,
)
from logstore.storage.segment import segment_path

logger = logging.getLogger("logstore")

_READ_BYTES: Final = 256 << 10
_MOST_SURPLUS: Final = 1_000
_EXTENTS: Final = 64

_T = TypeVar("_T")


class Page(NamedTuple):
    """Some events of a stream, in order, and whether it is known that there was nothing behind them."""

    events: list[Event]
    is_last: bool


class _Hole(NamedTuple):
    """A place that should hold events and does not."""

    after: int
    reason: str


class _Found(NamedTuple):
    """What segments hold of a stream after an id.

    Attributes:
        events: By id.
        above: Events up to this id were dropped.
        below: Only events below this id are known whole.
        hole: What cannot be read.
    """

    events: dict[int, Event]
    above: int
    below: int
    hole: _Hole | None = None


class _Surplus(NamedTuple):
    """How many of a run's first events are too many, and the last of them."""

    events: int
    last_id: int


class Reader:
    """Reads what is on disk; used by one thread at a time.

    Args:
        disk: The file door.
        root: The log folder.
        catalogue: The index.
        foreign: The other lanes.
        seed: Start value of the frames' checksums.
        retention: What reads may show.
    """

    def __init__(
        self, disk: Disk, root: Path, catalogue: Catalogue, foreign: Foreign, seed: int, retention: Retention
    ) -> None:
        self._disk = disk
        self._root = root
        self._catalogue = catalogue
        self._foreign = foreign
        self._seed = seed
        self._retention = retention
        self._surplus: dict[Extent, _Surplus] = {}

    def stream_of(self, event_id: int) -> str | None:
        """Return the stream of an event that is not in the own tail."""
        self._foreign.read_on()
        return self._foreign.stream_of(event_id) or self._asked(self._catalogue.stream_of, event_id)

    def resume(self, after: int, limit: int, is_own: Callable[[str], bool]) -> tuple[str, Page | None] | None:
        """Return the stream of an event that is not in the own tail, and what comes after it.

        Args:
            after: The event's id.
            limit: Most events to return.
            is_own: Whether the own tail has events of a stream: then they are not read.

        Returns:
            None for an id that the store does not have.

        Raises:
            GapError, DamageError: As `read`.
        """
        stream = self.stream_of(after)
        if stream is None:
            return None
        # Asked before events are read: what the tail has let go of is in segments.
        return stream, None if is_own(stream) else self.read(stream, after, limit, ())

    def read(self, stream: str, after: int, limit: int, own: Iterable[bytes]) -> Page:
        """Return a stream's first events above an id, in order.

        Args:
            stream: Name of the stream.
            after: The id that the reader holds, 0 for none.
            limit: Most events to return.
            own: Frames of the own tail, copied before this call.

        Raises:
            GapError: The next event existed and is gone.
            DamageError: The catalogue, or a journal of another process, cannot be read.
        """
        self._foreign.read_on()
        elsewhere = self._foreign.frames(stream, after, limit)
        events = {event.id: event for frames in (own, elsewhere) for event in map(decode_frame, frames)}
        found = self._in_segments(stream, after, limit)
        while found is None:
            found = self._in_segments(stream, after, limit)
        events.update(found.events)
        above, below = found.above, found.below
        merged = [events[event_id] for event_id in sorted(events) if above < event_id < below]
        if found.hole is not None:
            # An event that a segment has lost may still be in memory; the chain of predecessors tells.
            hole = found.hole
            known = [event for event in merged if event.id > hole.after]
            if not known or known[0].prev != hole.after:
                merged = [event for event in merged if event.id <= hole.after]
                if not merged:
                    raise GapError(stream, str(after), hole.reason)
        # What is above `dropped` may not have been looked at, where what is below it filled the page.
        is_last = found.hole is None and below == MAX_ID and len(merged) < limit and above <= after
        return Page(merged[:limit], is_last)

    def _in_segments(self, stream: str, after: int, limit: int) -> _Found | None:
        """Return the first events above an id that the catalogue knows, up to the first that cannot be read.

        None when compaction has moved some of them since the catalogue was asked: then ask again.
        """
        asked = _EXTENTS
        while True:
            runs = self._asked(self._catalogue.runs, stream, after, asked)
            dropped = max(runs.dropped_id, self._beyond_limit(stream, after, runs))
            if 0 < after < dropped:
                raise GapError(stream, str(after), f"retention has dropped what came before event {dropped}")
            # What comes behind the last run that was asked for is not known.
            below = MAX_ID if runs.whole else runs.extents[-1].first_id
            found = self._events(runs.extents, stream, max(after, dropped), limit, below)
            if found is None or found.events or found.hole or runs.whole:
                return found
            asked *= 4

    def _events(self, extents: Sequence[Extent], stream: str, after: int, limit: int, below: int) -> _Found | None:
        events: dict[int, Event] = {}
        for extent in extents:
            if extent.last_id <= after:
                continue
            # Runs may overlap after a reindex: this one's events may belong before some that were found.
            if len(events) >= limit and extent.first_id > sorted(events)[limit - 1]:
                break
            found, whole = self._extent(extent, stream, after, limit)
            events |= {event.id: event for event in found if event.id < below}
            if not whole:
                if not self._asked(self._catalogue.holds, extent):
                    return None
                before = max((each for each in events if each < extent.first_id), default=after)
                last = found[-1].id if found else before
                path = segment_path(self._root, extent.segment_id)
                logger.error("%s: events of stream %r after %d cannot be read", path, stream, last)
                return _Found(events, after, below, _Hole(last, f"{path} is damaged"))
        return _Found(events, after, below)

    def _beyond_limit(self, stream: str, after: int, runs: StreamRuns) -> int:
        """Return the highest id of a stream that is one too many, 0 for none; the disk may have it for a while yet."""
        kept = self._retention.max_events
        young_us = time.time_ns() // 1000 - int(self._retention.resume_window_s * 1_000_000)
        if kept is None or not runs.extents or runs.extents[0].first_time_us >= young_us:
            return 0
        if time_ms_of(after) * 1000 >= young_us:
            # Nobody who comes back in time needs to know.
            return 0
        total = 0
        for place, extent in enumerate(self._newest_first(stream)):
            if place == 0 and extent.last_flags & (FLAG_REQUEST | FLAG_FINAL) == FLAG_REQUEST:
                # A request that waits for its answer.
                return 0
            total += extent.events
            surplus = min(total - kept, extent.events)
            if surplus == extent.events and extent.last_time_us < young_us:
                return extent.last_id
            if surplus > 0 and extent.first_time_us < young_us:
                return self._surplus_of(stream, extent, surplus, young_us)
        return 0

    def _surplus_of(self, stream: str, extent: Extent, surplus: int, young_us: int) -> int:
        """Return the last id of the first events of a run that are too many, and not young."""
        known = self._surplus.get(extent)
        if known is not None and known.events == surplus:
            return known.last_id
        found, _ = self._extent(extent, stream, 0, surplus)
        old = [event.id for event in found[:surplus] if event.time_us < young_us]
        if len(old) == surplus:
            # Or they would be read for each page. Those that are young now are looked at again.
            if len(self._surplus) >= _MOST_SURPLUS:
                self._surplus.clear()
            self._surplus[extent] = _Surplus(surplus, old[-1])
        return max(old, default=0)

    def _newest_first(self, stream: str) -> Iterator[Extent]:
        below = MAX_ID
        while extents := self._asked(self._catalogue.newest_runs, stream, below, _EXTENTS):
            yield from extents
            below = extents[-1].last_id

    def _extent(self, extent: Extent, stream: str, after: int, limit: int) -> tuple[list[Event], bool]:
        """Return an extent's first events above an id, and whether none is missing up to the last of them."""
        events: list[Event] = []
        try:
            return events, self._collect(events, extent, stream, after, limit)
        except FileNotFoundError:
            return events, False
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # What the disk does not give is as good as damaged.
            logger.error("%s: %s", segment_path(self._root, extent.segment_id), error)
            return events, False

    def _collect(self, events: list[Event], extent: Extent, stream: str, after: int, limit: int) -> bool:
        """Add an extent's first events above an id; tell whether none is missing up to the last of them."""
        offset, end = extent.offset, extent.offset + extent.length
        row = self._asked(self._catalogue.event, after) if after >= extent.first_id else None
        if row is not None and row.segment_id == extent.segment_id and offset <= row.offset < end:
            offset = row.offset + row.length
        fd = self._disk.open(segment_path(self._root, extent.segment_id))
        try:
            while offset < end and len(events) < limit:
                most = limit - len(events)
                # As many bytes as so many events have on average, and some: what is read more is read for nothing.
                size = min(_READ_BYTES, extent.length // extent.events * (most + 1), end - offset)
                found, ends = self._decoded(fd, offset, end, size, most)
                for event in found:
                    if event.stream != stream:
                        return False
                    if event.id > after:
                        events.append(event)
                if not found:
                    return False
                offset += ends[-1]
        finally:
            self._disk.close(fd)
        return True

    def _decoded(self, fd: int, offset: int, end: int, size: int, most: int) -> tuple[list[Event], list[int]]:
        """Return some events from an offset on, and where each ends behind it; none when the first is damaged."""
        data = self._disk.read(fd, max(FRAME_HEADER.size, size), offset)
        found = decode_events(data, self._seed, most)
        if not found[0] and len(data) >= FRAME_HEADER.size:
            length = FRAME_HEADER.size + FRAME_HEADER.unpack_from(data)[0]
            if size < length <= end - offset:
                return decode_events(self._disk.read(fd, length, offset), self._seed, 1)
        return found

    def _asked(self, question: Callable[..., _T], *arguments: Any) -> _T:
        """Ask the catalogue.

        Raises:
            DamageError: SQLite refused.
        """
        try:
            return question(*arguments)
        except sqlite3.Error as error:
            path = self._catalogue.path
            reason = f"SQLite says: {error}. `logstore reindex {path}` makes the catalogue again"
            raise DamageError(path, 0, 0, reason) from error


def contiguous(stream: str, after: int, events: list[Event]) -> list[Event]:
    """Return the events up to the first hole in the chain of predecessors.

    Args:
        stream: Name of the stream.
        after: The id that the reader holds; 0 when it reads from the beginning, wherever retention has put that.
        events: What was found, in order.

    Raises:
        GapError: The hole is before the first of them.
    """
    last = after
    for place, event in enumerate(events):
        if last and event.prev > last:
            if place == 0:
                raise GapError(stream, str(after), f"event {event.prev} is gone")
            return events[:place]
        last = event.id
    return events
