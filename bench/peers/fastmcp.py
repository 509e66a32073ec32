"""FastMCP's event store, over each kind of key-value store that it is documented with."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from mcp.server.streamable_http import EventStore

from bench.peers.servers import MOST_CONNECTIONS, redis_server

KEPT: Final = 100
"""Events of a stream, as it is by default: with more it would be slower, as it writes a list of them for each."""


@asynccontextmanager
async def memory(folder: Path) -> AsyncGenerator[EventStore]:
    """Open it in memory; the folder stays empty."""
    from fastmcp.server.event_store import EventStore as FastMcpStore
    from key_value.aio.stores.memory import MemoryStore

    yield FastMcpStore(MemoryStore())


@asynccontextmanager
async def disk(folder: Path) -> AsyncGenerator[EventStore]:
    """Open it on disk."""
    from fastmcp.server.event_store import EventStore as FastMcpStore
    from key_value.aio.stores.disk import DiskStore

    async with DiskStore(directory=folder / "store") as storage:
        yield FastMcpStore(storage)


@asynccontextmanager
async def redis(folder: Path) -> AsyncGenerator[EventStore]:
    """Open it over a Redis server that syncs every second."""
    from fastmcp.server.event_store import EventStore as FastMcpStore
    from key_value.aio.stores.redis import RedisStore
    from redis.asyncio import Redis

    with redis_server(folder, "everysec") as port:
        async with (
            Redis(port=port, max_connections=MOST_CONNECTIONS, decode_responses=True) as client,
            RedisStore(client=client) as storage,
        ):
            yield FastMcpStore(storage)
