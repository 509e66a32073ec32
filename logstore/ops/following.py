"""Events of a store as they come, seen from outside."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from logstore.errors import GapError
from logstore.ops.access import StoreView
from logstore.ops.index_errors import index_errors
from logstore.storage.ids import IdGenerator
from logstore.storage.record import Event

_LOOK_S: Final = 0.05
_LOOK_CLOSER_S: Final = 1.0
"""So often also when no lane grew: what a dead process left may have been recovered by another."""
_IN_FLIGHT_S: Final = 10.0
"""An event becomes visible later than its id is drawn; that takes as long as a commit."""
_PAGE_EVENTS: Final = 1_000
_EVENTS_IN_MEMORY: Final = 64_000
_RUNS: Final = 1_000


class FollowedStore(StoreView):
    """A store to follow, for as long as one likes."""

    def news(self) -> tuple[set[str], bool]:
        """Return the streams that grew since the last call, and whether others may have grown too."""
        return self._foreign.news()


def follow(
    view: FollowedStore,
    stream: str | None = None,
    after: int | None = None,
    *,
    on_gap: Callable[[GapError], None],
    wait: Callable[[float], None],
) -> Iterator[Event]:
    """Yield events as they come, each once, without end.

    Those of a stream come in order, those of different streams in the order of their ids as far as they are visible at
    one look.

    Args:
        view: The store.
        stream: Name of the stream, None for all.
        after: Id of the last event to leave out, 0 to begin with the oldest; None for those that come from now on.
        on_gap: Called where events are gone; what follows them is yielded.
        wait: Called between two looks, to wait for so many seconds.

    Raises:
        DamageError: The catalogue cannot be read.
    """
    follower = _Follower(view, stream, on_gap)
    with index_errors(view.path):
        follower.begin(after)
        moves, looked_s = -1, 0.0
        while True:
            moved = view.moves()
            if moved != moves or time.monotonic() - looked_s > _LOOK_CLOSER_S:
                moves, looked_s = moved, time.monotonic()
                yield from follower.look()
            wait(_LOOK_S)


class _Follower:
    """Where a look at every stream has got to."""

    def __init__(self, view: FollowedStore, stream: str | None, on_gap: Callable[[GapError], None]) -> None:
        self._view = view
        self._stream = stream
        self._on_gap = on_gap
        self._first = True
        self._floor = 0
        # Id of the newest event that was yielded, or left out; of a stream that is not here, `_floor`.
        self._at: dict[str, int] = {}

    def begin(self, after: int | None) -> None:
        if after is not None:
            self._floor = after
            return
        self._floor = IdGenerator(0).next(time.time_ns() // 1000 - int(_IN_FLIGHT_S * 1_000_000))
        for stream, newest in self._newest():
            if newest > self._floor:
                self._at[stream] = max(newest, self._at.get(stream, 0))

    def _newest(self) -> Iterator[tuple[str, int]]:
        """Yield the newest id of every stream, from the journals before the catalogue: else what moves is missed."""
        for stream, ids in self._view.streams_in_journals().items():
            yield stream, ids[-1]
        for summary in self._view.indexed().summaries():
            yield summary.stream, int(summary.last_id)

    def look(self) -> Iterator[Event]:
        """Yield what is visible now and was not yielded before."""
        grown, missed = self._view.news()
        if self._stream is not None:
            grown = {self._stream} if missed or self._first or self._stream in grown else set()
        elif missed or self._first:
            grown |= {stream for stream, newest in self._newest() if newest > self._at.get(stream, self._floor)}
        self._first = False
        page = max(1, min(_PAGE_EVENTS, _EVENTS_IN_MEMORY // max(1, len(grown))))
        return self._merged([self._read(stream, page) for stream in grown])

    @staticmethod
    def _merged(streams: Iterable[Iterator[Event]]) -> Iterator[Event]:
        return heapq.merge(*streams, key=lambda event: event.id)

    def _read(self, stream: str, page: int) -> Iterator[Event]:
        while True:
            at = self._at.get(stream, self._floor)
            try:
                events = self._view.read(stream, at, page)
            except GapError as error:
                behind = self._behind_gap(stream, at)
                if behind == at:
                    # Somebody removes just these events; a later look tells.
                    return
                self._on_gap(error)
                self._at[stream] = behind
                continue
            for event in events:
                self._at[stream] = event.id
                yield event
            # Not when they are fewer than asked for: they end before a gap, too.
            if not events:
                return

    def _behind_gap(self, stream: str, at: int) -> int:
        """Return the id to go on after, where the events after `at` are gone."""
        view = self._view
        if (oldest := self._readable_after(stream, 0)) is not None and oldest > at:
            # Retention has dropped what came before.
            return oldest - 1
        ends = [extent.last_id for extent in view.indexed().runs(stream, at, _RUNS).extents]
        for end in ends:
            if self._readable_after(stream, end) is not None:
                # Behind the damage.
                return end
        return max([at, *ends, *view.streams_in_journals().get(stream, [])])

    def _readable_after(self, stream: str, after: int) -> int | None:
        try:
            return next((event.id for event in self._view.read(stream, after, 1)), None)
        except GapError:
            return None
