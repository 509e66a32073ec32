"""Event store for resumable MCP streams.

The names below are loaded at first use: `import logstore.storage` and the commands that need no MCP stay free of the
time that importing the SDK takes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from logstore.version import __version__

if TYPE_CHECKING:
    from logstore.config import EventStoreConfig, get_config
    from logstore.mcp.factory import create_event_store
    from logstore.mcp.memory import InMemoryEventStore
    from logstore.mcp.persistent import PersistentEventStore
    from logstore.ops.maintenance import run_maintenance_tasks
    from logstore.ops.manager import EventStoreManager

__all__ = [
    "EventStoreConfig",
    "EventStoreManager",
    "InMemoryEventStore",
    "PersistentEventStore",
    "__version__",
    "create_event_store",
    "get_config",
    "run_maintenance_tasks",
]

_HOMES: Final = {
    "EventStoreConfig": "logstore.config",
    "EventStoreManager": "logstore.ops.manager",
    "InMemoryEventStore": "logstore.mcp.memory",
    "PersistentEventStore": "logstore.mcp.persistent",
    "create_event_store": "logstore.mcp.factory",
    "get_config": "logstore.config",
    "run_maintenance_tasks": "logstore.ops.maintenance",
}


def __getattr__(name: str) -> object:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(set(globals()) | set(__all__))
