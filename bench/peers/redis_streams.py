"""Redis Streams without anything between: one XADD an event."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from mcp.server.streamable_http import EventCallback, EventId, EventMessage, EventStore, StreamId
from mcp_types import JSONRPCMessage, jsonrpc_message_adapter

from bench.peers.servers import MOST_CONNECTIONS, redis_server

if TYPE_CHECKING:
    from redis.asyncio import Redis

_FIELD: Final = b"m"


class RedisStreamsStore(EventStore):
    """A Redis stream for each stream; an event id is its entry's, behind the stream's name."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        """Add one entry."""
        text = "" if message is None else message.model_dump_json(by_alias=True, exclude_unset=True)
        entry: bytes = await self._redis.xadd(stream_id, {_FIELD: text})
        return f"{stream_id}/{entry.decode()}"

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        """Send the entries after one."""
        stream_id, _, entry = last_event_id.rpartition("/")
        for found, fields in await self._redis.xrange(stream_id, min=f"({entry}"):
            if fields[_FIELD]:
                message = jsonrpc_message_adapter.validate_json(fields[_FIELD])
                await send_callback(EventMessage(message, f"{stream_id}/{found.decode()}"))
        return stream_id


@asynccontextmanager
async def streams(folder: Path, *, appendfsync: Literal["always", "everysec"]) -> AsyncGenerator[EventStore]:
    """Open one over a server of its own."""
    with redis_server(folder, appendfsync) as port:
        async with joined(port) as store:
            yield store


@asynccontextmanager
async def joined(port: int) -> AsyncGenerator[EventStore]:
    """Open one over a server that runs."""
    from redis.asyncio import Redis

    async with Redis(port=port, max_connections=MOST_CONNECTIONS) as client:
        yield RedisStreamsStore(client)
