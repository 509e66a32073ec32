"""The stores of the SDK's examples: a dict and deques. Nothing can be faster, and nothing survives."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Final

from mcp.server.streamable_http import EventCallback, EventId, EventMessage, EventStore, StreamId
from mcp_types import JSONRPCMessage

KEPT: Final = 1_001
"""Events of a stream; the examples keep 100."""


class DictStore(EventStore):
    """Keeps the newest events of each stream in memory."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._streams: dict[StreamId, deque[EventId]] = {}
        self._events: dict[EventId, tuple[StreamId, JSONRPCMessage | None]] = {}

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        """Keep an event."""
        event_id = str(next(self._numbers))
        stream = self._streams.get(stream_id)
        if stream is None:
            stream = self._streams[stream_id] = deque(maxlen=KEPT)
        if len(stream) == KEPT:
            del self._events[stream[0]]
        stream.append(event_id)
        self._events[event_id] = stream_id, message
        return event_id

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        """Send the events of a stream after one."""
        found = self._events.get(last_event_id)
        if found is None:
            return None
        after = False
        for event_id in self._streams[found[0]]:
            message = self._events[event_id][1]
            if after and message is not None:
                await send_callback(EventMessage(message, event_id))
            after = after or event_id == last_event_id
        return found[0]


@asynccontextmanager
async def dict_store(folder: Path) -> AsyncGenerator[EventStore]:
    """Open one; the folder stays empty."""
    yield DictStore()
