"""The original's design: its SQLite schema through aiosqlite, a commit an event."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from mcp.server.streamable_http import EventCallback, EventId, EventMessage, EventStore, StreamId
from mcp_types import JSONRPCMessage, jsonrpc_message_adapter

if TYPE_CHECKING:
    import aiosqlite

_SCHEMA: Final = """
CREATE TABLE events (
    event_id TEXT PRIMARY KEY,
    stream_id TEXT NOT NULL,
    message_json TEXT NOT NULL,
    timestamp DATETIME DEFAULT CURRENT_TIMESTAMP,
    created_at DATETIME DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_stream_timestamp ON events(stream_id, timestamp);
CREATE INDEX idx_timestamp ON events(timestamp);
"""


class OriginalStore(EventStore):
    """One row an event."""

    def __init__(self, database: aiosqlite.Connection) -> None:
        self._database = database

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        """Insert one event and commit."""
        event_id = str(uuid.uuid4())
        text = "" if message is None else message.model_dump_json(by_alias=True, exclude_unset=True)
        await self._database.execute(
            "INSERT INTO events (event_id, stream_id, message_json) VALUES (?, ?, ?)", (event_id, stream_id, text)
        )
        await self._database.commit()
        return event_id

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        """Send the events of a stream that were inserted after one."""
        query = "SELECT rowid, stream_id FROM events WHERE event_id = ?"
        async with self._database.execute(query, (last_event_id,)) as cursor:
            found = await cursor.fetchone()
        if found is None:
            return None
        query = "SELECT event_id, message_json FROM events WHERE stream_id = ? AND rowid > ? ORDER BY rowid"
        async with self._database.execute(query, (found[1], found[0])) as cursor:
            async for event_id, text in cursor:
                if text:
                    await send_callback(EventMessage(jsonrpc_message_adapter.validate_json(text), event_id))
        return str(found[1])


@asynccontextmanager
async def original(folder: Path, *, synchronous: Literal["FULL", "NORMAL"]) -> AsyncGenerator[EventStore]:
    """Open one, its journal in the mode that is faster for it."""
    import aiosqlite

    async with aiosqlite.connect(folder / "events.db") as database:
        await database.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous={synchronous}; {_SCHEMA}")
        yield OriginalStore(database)
