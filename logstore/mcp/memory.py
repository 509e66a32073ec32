"""The event store in memory: for development; everything is lost at exit."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Sequence
from itertools import islice
from typing import Final, Unpack

from logstore.config import EngineSettings, config_of
from logstore.errors import GapError, InvalidMessageError, StoreClosedError
from logstore.mcp.base import EventLog, LogEventStore
from logstore.storage import Event, Health, StreamSummary
from logstore.storage.ids import parse_event_id
from logstore.storage.record import MAX_BODY_BYTES, check_stream_name

MAX_STREAMS: Final = 10_000
_EVENT_OVERHEAD: Final = 400
"""Bytes that an event costs beside its payload."""
_ID_SHIFT: Final = 21
_PAGE_EVENTS: Final = 1000


class InMemoryEventStore(LogEventStore):
    """An event store that keeps its events in memory, within bounds.

    Where a bound is reached the oldest events go, and a resume that would have needed them raises `GapError`.

    Args:
        max_streams: Streams that are kept; the one that was longest without an event goes first.
        **settings: `max_events_per_stream` and `memory_cache_bytes`, the budget for all events, bound the store; the
            other settings of `EventStoreConfig` are taken and have no meaning here.

    Raises:
        ConfigurationError: A setting is unknown or out of range.
    """

    def __init__(self, *, max_streams: int = MAX_STREAMS, **settings: Unpack[EngineSettings]) -> None:
        super().__init__()
        config = config_of({"persistent": False, **settings})
        self._memory = MemoryLog(config.max_events_per_stream, config.memory_cache_bytes, max_streams)
        # There is nothing to open.
        self._log = self._memory

    async def _open(self) -> EventLog:
        return self._memory


class _Stream:
    """Events of one stream, oldest first.

    Attributes:
        name: Its name.
        events: What is kept.
        last: Id of the newest event.
        dropped: Id of the newest event that is gone, 0 for none.
        gone: Whether the whole stream was dropped; a follower still holds it.
        news: What followers wait for, set when something happens to the stream; None while nobody waits.
    """

    __slots__ = ("dropped", "events", "gone", "last", "name", "news")

    def __init__(self, name: str) -> None:
        self.name = name
        self.events: deque[Event] = deque()
        self.last = 0
        self.dropped = 0
        self.gone = False
        self.news: asyncio.Event | None = None

    def tell(self) -> None:
        """Wake who follows."""
        if self.news is not None:
            self.news.set()
            self.news = None


class MemoryLog:
    """A log in memory, with the face of `logstore.storage.Log`.

    Args:
        max_events_per_stream: Newest events of a stream that are kept.
        max_bytes: Budget for all events; the newest event stays even when it is larger.
        max_streams: Streams that are kept.
    """

    def __init__(self, max_events_per_stream: int, max_bytes: int, max_streams: int) -> None:
        self._max_events_per_stream = max_events_per_stream
        self._max_bytes = max_bytes
        self._max_streams = max_streams
        # The stream longest without an event first.
        self._streams: OrderedDict[str, _Stream] = OrderedDict()
        # Owner of each kept event, oldest first.
        self._owners: OrderedDict[int, _Stream] = OrderedDict()
        # Each stream's newest dropped event: whoever has seen that one has missed nothing.
        self._edges: dict[int, _Stream] = {}
        self._bytes = 0
        # Ids ascend without holes from one that no earlier process has given out, so an id between the first and the
        # last that is not kept is known to be dropped.
        self._first = time.time_ns() // 1_000_000 << _ID_SHIFT
        self._last = self._first - 1
        self._closed = False

    async def append(self, stream: str, payload: bytes, flags: int = 0) -> str:
        """Append one event and return its id."""
        return str(self.add(stream, payload, flags)[0])

    def add(self, stream: str, payload: bytes, flags: int = 0, *, wait: bool = True) -> tuple[int, None]:
        """Append one event; return its id, and that nothing is to be awaited."""
        self._check_open()
        _check(stream, payload)
        return self._append(stream, payload, flags).id, None

    def is_stored(self, event_id: int) -> bool:
        """Whether an event is stored, which every one is."""
        return True

    async def until_stored(self, event_id: int) -> None:
        """Return at once."""

    async def append_many(self, items: Sequence[tuple[str, bytes, int]]) -> list[str]:
        """Append events and return their ids; all or none."""
        self._check_open()
        for name, payload, _ in items:
            _check(name, payload)
        return [self._append(*item).event_id for item in items]

    async def stream_of(self, event_id: str) -> str | None:
        """Return the stream of an event; None when the id was never given out.

        Raises:
            GapError: The event is gone, and which stream it was in with it.
        """
        stream = self._stream_of(event_id)
        return None if stream is None else stream.name

    def _stream_of(self, event_id: str) -> _Stream | None:
        self._check_open()
        number = parse_event_id(event_id)
        if number is None or not self._first <= number <= self._last:
            return None
        stream = self._owners.get(number) or self._edges.get(number)
        if stream is None:
            raise GapError("?", event_id, "it was dropped from memory, with events after it")
        return stream

    async def read(self, stream: str, after: str | None = None, limit: int = _PAGE_EVENTS) -> list[Event]:
        """Return up to `limit` events of a stream in order; none when nothing is after.

        Raises:
            GapError: Events after the given one were dropped.
        """
        self._check_open()
        found = self._streams.get(stream)
        return [] if found is None else _after(found, after, limit)

    async def resume(self, after: str) -> tuple[str, AsyncGenerator[list[Event], None]] | None:
        """Return the stream of an event, and what comes after it, page by page; None when the id was never given out.

        Raises:
            GapError: The event, or, from the generator, events after it were dropped.
            StoreClosedError: The store was closed.
        """
        stream = self._stream_of(after)
        return None if stream is None else (stream.name, self._pages(stream, after))

    async def _pages(self, stream: _Stream, after: str) -> AsyncGenerator[list[Event], None]:
        # Of this very stream: one of its name that is begun when it was dropped has none of its events.
        while int(after) < stream.last:
            self._check_open()
            events = _after(stream, after, _PAGE_EVENTS)
            yield events
            after = events[-1].event_id

    async def unanswered(self, prefix: str) -> list[str]:
        """Return nothing: the process that would have answered has the log in its memory, and is alive."""
        return []

    async def follow(self, stream: str, after: str | None = None) -> AsyncGenerator[Event, None]:
        """Yield events of a stream in order, and go on with those to come, until the log is closed.

        Raises:
            GapError: Events after the given one, or the last one yielded, were dropped.
        """
        self._check_open()
        followed = self._streams.get(stream) or self._begin(stream)
        while not self._closed:
            for event in _after(followed, after, _PAGE_EVENTS):
                yield event
                after = event.event_id
            # Nothing is awaited between this look and the wait, so nothing can come in between.
            if self._has_nothing_for(followed, after):
                followed.news = followed.news or asyncio.Event()
                await followed.news.wait()

    def _has_nothing_for(self, followed: _Stream, after: str | None) -> bool:
        return int(after or 0) >= followed.last and not (self._closed or followed.gone)

    def stream_summaries(self) -> list[StreamSummary]:
        """Return one summary a stream that has events."""
        return [
            StreamSummary(
                stream=stream.name,
                events=len(stream.events),
                first_id=stream.events[0].event_id,
                last_id=stream.events[-1].event_id,
                first_time_us=stream.events[0].time_us,
                last_time_us=stream.events[-1].time_us,
                bytes=sum(len(event.payload) for event in stream.events),
            )
            for stream in self._streams.values()
            if stream.events
        ]

    def health(self) -> Health:
        """Return that all is well: nothing here can fail."""
        return Health("closed" if self._closed else "ok", None, None, 0)

    async def close(self) -> None:
        """Drop everything; a second call does nothing."""
        self._closed = True
        for stream in self._streams.values():
            stream.tell()
        self._streams.clear()
        self._owners.clear()
        self._edges.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the store is closed")

    def _append(self, name: str, payload: bytes, flags: int) -> Event:
        stream = self._streams.get(name) or self._begin(name)
        self._streams.move_to_end(name)
        self._last += 1
        event = Event(self._last, stream.last, time.time_ns() // 1000, name, flags, payload)
        stream.events.append(event)
        stream.last = event.id
        self._owners[event.id] = stream
        self._bytes += _cost(event)
        if len(stream.events) > self._max_events_per_stream:
            self._drop_oldest(stream)
        while self._bytes > self._max_bytes and len(self._owners) > 1:
            self._drop_oldest(next(iter(self._owners.values())))
        stream.tell()
        return event

    def _begin(self, name: str) -> _Stream:
        stream = self._streams[name] = _Stream(name)
        if len(self._streams) > self._max_streams:
            _, oldest = self._streams.popitem(last=False)
            while oldest.events:
                self._drop_oldest(oldest)
            self._edges.pop(oldest.dropped, None)
            oldest.gone = True
            oldest.tell()
        return stream

    def _drop_oldest(self, stream: _Stream) -> None:
        event = stream.events.popleft()
        del self._owners[event.id]
        self._bytes -= _cost(event)
        self._edges.pop(stream.dropped, None)
        self._edges[event.id] = stream
        stream.dropped = event.id


def _after(stream: _Stream, after: str | None, limit: int) -> list[Event]:
    number = int(after or 0)
    if stream.gone or (after is not None and number < stream.dropped):
        raise GapError(stream.name, after or "0", "they were dropped from memory")
    begin = bisect_right(stream.events, number, key=_id_of)
    return list(islice(stream.events, begin, begin + limit))


def _id_of(event: Event) -> int:
    return event.id


def _cost(event: Event) -> int:
    return len(event.payload) + _EVENT_OVERHEAD


def _check(name: str, payload: bytes) -> None:
    """Refuse what the log on disk refuses, so that what works in development works in production."""
    check_stream_name(name)
    if len(payload) > MAX_BODY_BYTES:
        raise InvalidMessageError("$", f"{len(payload)} bytes are more than the largest event has, {MAX_BODY_BYTES}")
