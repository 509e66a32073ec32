"""This store."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from logstore import create_event_store
from logstore.mcp.base import LogEventStore
from logstore.storage import Durability


@asynccontextmanager
async def logstore(path: Path, *, durability: Durability, **settings: Any) -> AsyncGenerator[LogEventStore]:
    """Open it as `get_config("production")` does, but that nothing goes, however many events a stream has.

    Args:
        path: Of its catalogue.
        durability: What an acknowledgement means.
        **settings: Of `create_event_store`, beside that.
    """
    options: dict[str, Any] = {"max_events_per_stream": 1_000_000_000, "backup_enabled": True, **settings}
    async with create_event_store(db_path=path, durability=durability, **options) as store:
        yield store


@asynccontextmanager
async def in_folder(folder: Path, *, durability: Durability) -> AsyncGenerator[LogEventStore]:
    """Open it in a folder, as the other peers are."""
    async with logstore(folder / "events.db", durability=durability) as store:
        yield store
