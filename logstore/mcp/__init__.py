"""Event stores for the MCP SDK, and the layer that keeps its sessions apart.

`messages` turns a message into bytes and back; `base` is the store that both kinds share, over the face of a log;
`memory` and `persistent` bring the log; `scope`, `scoped_store` and `http` keep sessions apart in an HTTP app; `sdk`
holds what we know of the SDK beyond its public names.
"""

from logstore.mcp.factory import create_event_store
from logstore.mcp.http import resumable_http_app
from logstore.mcp.memory import InMemoryEventStore
from logstore.mcp.persistent import PersistentEventStore

__all__ = ["InMemoryEventStore", "PersistentEventStore", "create_event_store", "resumable_http_app"]
