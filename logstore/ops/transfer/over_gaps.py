"""Reading a stream over its gaps: what damage has left of it, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from logstore.errors import GapError
from logstore.ops.access import StoreView
from logstore.storage.catalogue import Extent
from logstore.storage.lane import lane_folders, read_reservation
from logstore.storage.record import FIRST_PAGE_EVENTS, Event, decode_frame, next_page_events, salvage_frames
from logstore.storage.segment import segment_path

_RUNS: Final = 1_000
_GAPS_LISTED: Final = 1_000


class Gap(msgspec.Struct, frozen=True):
    """A place in a stream where events are missing.

    Attributes:
        stream_id: The stream.
        after: Id of the last event before the gap, None when the stream begins with it.
        missing: How many events are known to be missing, None when nothing tells.
        reason: What is wrong.
    """

    stream_id: str
    after: str | None
    missing: int | None
    reason: str


class GapReader:
    """Reads the streams of a store as far as they were written when it was made.

    Args:
        view: The store.

    Attributes:
        gaps: Where events were missing, the first thousand places.
        gap_count: How many such places there were.
        missing: How many events are known to be missing.

    Raises:
        DamageError: The catalogue cannot be read.
    """

    def __init__(self, view: StoreView) -> None:
        self._view = view
        self._reader = view.reader
        # Ids from here on were drawn later: without a bound, reading a busy stream would not end.
        reserved = (read_reservation(view.disk, folder).event_id for _, folder in lane_folders(view.disk, view.root))
        self._bound = max(view.indexed().last_id() + 1, *reserved)
        self.gaps: list[Gap] = []
        self.gap_count = 0
        self.missing = 0

    def events(self, stream: str) -> Iterator[Event]:
        """Yield what can be read of a stream, in order.

        Raises:
            DamageError: The catalogue cannot be read.
        """
        after, limit = 0, FIRST_PAGE_EVENTS
        # Up to here what is missing was told when the damage was.
        told = 0
        while True:
            try:
                page = self._reader.read(stream, after, limit, ()).events
                end = page[-1].id if page else None
            except GapError as gap:
                page, end = self._behind(stream, after, str(gap))
                told = end or told
            for event in page:
                if event.id >= self._bound:
                    return
                if 0 < after < event.prev and event.prev > told:
                    self._note(Gap(stream, str(after), None, f"event {event.prev} is gone"))
                yield event
                after = event.id
            if end is None:
                return
            after = max(after, end)
            limit = next_page_events(page) if page else FIRST_PAGE_EVENTS

    def _behind(self, stream: str, after: int, reason: str) -> tuple[list[Event], int | None]:
        """Return what can still be read of the first run behind a gap, and where to go on; None at the stream's end."""
        runs = self._view.indexed().runs(stream, after, _RUNS)
        if 0 < after < runs.dropped_id:
            # Retention was faster: what it dropped is not in the store any more.
            return [], runs.dropped_id
        if not runs.extents:
            return [], None
        end = runs.extents[0].last_id
        found: dict[int, Event] = {}
        missing = 0
        # Runs may overlap: what others have of this range comes with it.
        for extent in (each for each in runs.extents if each.first_id <= end):
            events = self._salvaged(extent, stream)
            if events is None:
                # Compaction has moved them: read once more.
                return [], after
            found.update((event.id, event) for event in events if after < event.id <= end)
            if extent.last_id <= end:
                missing += extent.events - len(events)
        if missing:
            self.missing += missing
            self._note(Gap(stream, str(after) if after else None, missing, reason))
        return [found[event_id] for event_id in sorted(found)], end

    def _salvaged(self, extent: Extent, stream: str) -> list[Event] | None:
        """Return what is whole in a run; None when the run is not there any more."""
        try:
            fd = self._view.disk.open(segment_path(self._view.root, extent.segment_id))
        except FileNotFoundError:
            return [] if self._view.indexed().holds(extent) else None
        try:
            data = self._view.disk.read(fd, extent.length, extent.offset)
        finally:
            self._view.disk.close(fd)
        events = (decode_frame(frame) for _, frame in salvage_frames(data, self._view.seed))
        return [event for event in events if event.stream == stream]

    def _note(self, gap: Gap) -> None:
        self.gap_count += 1
        if len(self.gaps) < _GAPS_LISTED:
            self.gaps.append(gap)
