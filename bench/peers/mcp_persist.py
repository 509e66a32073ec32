"""mcp-persist: SQLite with a commit an event, SQLite with a commit now and then, Redis."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from mcp.server.streamable_http import EventStore

from bench.peers.servers import MOST_CONNECTIONS, redis_server

_TTL_S: Final = 86_400
"""Its documentation warns of having none."""
_COMMIT_INTERVAL_S: Final = 0.1


@asynccontextmanager
async def sqlite(folder: Path) -> AsyncGenerator[EventStore]:
    """Open the SQLite store as it is by default: each event is on disk before it is acknowledged."""
    from mcp_persist import SQLiteEventStore

    async with SQLiteEventStore.create(str(folder / "events.db"), ttl=_TTL_S) as store:
        yield store


@asynccontextmanager
async def write_behind(folder: Path) -> AsyncGenerator[EventStore]:
    """Open the SQLite store with a commit every 100 ms: until then an event is lost with the process."""
    from mcp_persist import SQLiteEventStore

    path = str(folder / "events.db")
    async with SQLiteEventStore.create(path, ttl=_TTL_S, commit_interval=_COMMIT_INTERVAL_S) as store:
        yield store


@asynccontextmanager
async def redis(folder: Path) -> AsyncGenerator[EventStore]:
    """Open the Redis store, over a server that syncs every second."""
    from mcp_persist import RedisEventStore

    with redis_server(folder, "everysec") as port:
        url = f"redis://127.0.0.1:{port}"
        async with RedisEventStore.create(url, ttl=_TTL_S, max_connections=MOST_CONNECTIONS) as store:
            yield store
