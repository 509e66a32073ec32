"""The stores that are measured against each other, all through the SDK's `EventStore`.

Each is opened in a folder of its own, with the settings that its own documentation gives or that it has by default.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mcp.server.streamable_http import EventStore

from bench.machine import find_program
from bench.peers import fastmcp, mcp_persist, memory, nats, original, ours, redis_streams

Opener = Callable[[Path], AbstractAsyncContextManager[EventStore]]
"""Opens a store in a folder for the block."""


@dataclass(frozen=True)
class Peer:
    """A store.

    Attributes:
        open: Opens it.
        acknowledged: What an event id in hand means: `on disk`, `written` to the operating system, or in `memory`, its
            own or that of a server.
        colour: In pictures.
        modules: What must be installed.
        program: What must be installed, and is not Python.
        keeps: Events of a stream that it keeps, None for all.
    """

    open: Opener
    acknowledged: str
    colour: str
    modules: tuple[str, ...] = ()
    program: str | None = None
    keeps: int | None = None


_REDIS: Final = "redis-server"

PEERS: Final[dict[str, Peer]] = {
    "logstore always": Peer(functools.partial(ours.in_folder, durability="always"), "on disk", "#1b5e9e"),
    "logstore interval": Peer(functools.partial(ours.in_folder, durability="interval"), "written", "#3f8fd6"),
    "logstore os": Peer(functools.partial(ours.in_folder, durability="os"), "written", "#9cc7ee"),
    "dict": Peer(memory.dict_store, "memory", "#9e9e9e", keeps=memory.KEPT),
    "original FULL": Peer(
        functools.partial(original.original, synchronous="FULL"), "on disk", "#8d6e63", modules=("aiosqlite",)
    ),
    "original NORMAL": Peer(
        functools.partial(original.original, synchronous="NORMAL"), "written", "#bcaaa4", modules=("aiosqlite",)
    ),
    "mcp-persist SQLite": Peer(mcp_persist.sqlite, "on disk", "#c62828", modules=("mcp_persist", "aiosqlite")),
    "mcp-persist write-behind": Peer(
        mcp_persist.write_behind, "memory", "#e57373", modules=("mcp_persist", "aiosqlite")
    ),
    "mcp-persist Redis": Peer(mcp_persist.redis, "memory", "#f4b6b6", ("mcp_persist", "redis"), _REDIS),
    "FastMCP memory": Peer(fastmcp.memory, "memory", "#6a1b9a", modules=("fastmcp",), keeps=fastmcp.KEPT),
    "FastMCP disk": Peer(fastmcp.disk, "written", "#9c5cc4", modules=("fastmcp", "diskcache"), keeps=fastmcp.KEPT),
    "FastMCP Redis": Peer(fastmcp.redis, "memory", "#d1b3e3", ("fastmcp", "redis"), _REDIS, keeps=fastmcp.KEPT),
    "Redis Streams always": Peer(
        functools.partial(redis_streams.streams, appendfsync="always"), "on disk", "#ef6c00", ("redis",), _REDIS
    ),
    "Redis Streams everysec": Peer(
        functools.partial(redis_streams.streams, appendfsync="everysec"), "memory", "#ffb74d", ("redis",), _REDIS
    ),
    "NATS JetStream": Peer(nats.jetstream, "written", "#2e7d32", ("nats",), "nats-server"),
}


def missing(names: Iterable[str]) -> str | None:
    """Return why the peers of these names cannot all be measured here; None when they can."""
    for peer in map(PEERS.__getitem__, names):
        for module in peer.modules:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed; the extra `bench` has it"
        if peer.program is not None and find_program(peer.program) is None:
            return f"there is no {peer.program} here"
    return None
