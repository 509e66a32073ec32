"""The stores that are measured against each other, and what is stored in them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import aiosqlite
from mcp_types import JSONRPCNotification

MESSAGE: Final = JSONRPCNotification(
    jsonrpc="2.0",
    method="notifications/message",
    params={"level": "info", "logger": "append", "data": "sixteen letters " * 31},
)
"""A notification of 600 bytes on the wire."""


class Store(Protocol):
    """The half of the SDK's `EventStore` that is measured here."""

    async def store_event(self, stream_id: str, message: JSONRPCNotification, /) -> str:
        """Store one event."""
        ...

    async def close(self) -> None:
        """Close the store."""
        ...


class OriginalStore:
    """The original's design: its SQLite schema through aiosqlite, a commit an event, synced before it returns.

    The journal mode is WAL, the faster one for it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: aiosqlite.Connection | None = None

    async def store_event(self, stream_id: str, message: JSONRPCNotification, /) -> str:
        """Insert one event and commit."""
        database = self._database or await self._open()
        event_id = str(uuid.uuid4())
        text = message.model_dump_json(by_alias=True, exclude_unset=True)
        await database.execute(
            "INSERT INTO events (event_id, stream_id, message_json) VALUES (?, ?, ?)", (event_id, stream_id, text)
        )
        await database.commit()
        return event_id

    async def close(self) -> None:
        """Close the connection."""
        if self._database is not None:
            await self._database.close()

    async def _open(self) -> aiosqlite.Connection:
        self._database = await aiosqlite.connect(self._path)
        await self._database.executescript(
            """
            PRAGMA journal_mode=WAL;
            PRAGMA synchronous=FULL;
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
        )
        return self._database


def open_logstore(path: Path) -> Store:
    """Open our store in the mode that syncs before it acknowledges."""
    from logstore import create_event_store

    return create_event_store(
        persistent=True,
        db_path=str(path),
        durability="always",
        backup_enabled=False,
        max_events_per_stream=1_000_000_000,
    )


STORES: Final[dict[str, Callable[[Path], Store]]] = {"original": OriginalStore, "logstore": open_logstore}
