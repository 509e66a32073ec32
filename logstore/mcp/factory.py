"""Make an event store from settings."""

from __future__ import annotations

from typing import Any, Unpack

from logstore.config import EventStoreSettings, config_of
from logstore.mcp.base import LogEventStore
from logstore.mcp.memory import InMemoryEventStore
from logstore.mcp.persistent import PersistentEventStore


def create_event_store(**settings: Unpack[EventStoreSettings]) -> LogEventStore:
    """Return an event store; nothing is opened or written before its first use.

    Args:
        **settings: Any of `EventStoreConfig`, also all of them: `create_event_store(**config.__dict__)`.

    Returns:
        A `PersistentEventStore`, or with `persistent=False` an `InMemoryEventStore`.

    Raises:
        ConfigurationError: A setting is unknown, or has a value that is not allowed.
    """
    config = config_of(settings)
    others: dict[str, Any] = {name: value for name, value in settings.items() if name not in ("persistent", "db_path")}
    if config.persistent:
        return PersistentEventStore(config.db_path, **others)
    return InMemoryEventStore(**others)
