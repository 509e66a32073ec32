"""What a worker of the rig is told, and what it and the test both know."""

from __future__ import annotations

import hashlib
import socket
from typing import Any, Final, Literal

import msgspec

from logstore.storage import Durability

USERS = ("alice", "bob")
"""Who may come to a server with authentication; the bearer token of each is the name."""

ServerKind = Literal["mcpserver", "lowlevel", "fastmcp"]

ORDERS_VARIABLE: Final = "LOGSTORE_RIG_ORDERS"
"""Where `application` finds its orders, in JSON."""


class Orders(msgspec.Struct, frozen=True, tag=True):
    """What a worker is told.

    Attributes:
        path: The catalogue of the store.
        port: Where to listen.
        control: Port of the test's conductor.
        log: File that gets what the worker says on stderr.
        server: Which framework.
        auth: Whether clients need a bearer token.
        durability: As in `PersistentEventStore`.
        stop_s: How long a graceful stop may take before uvicorn cuts what is open.
        bare: Whether the SDK gets the store itself, without the resume layer.
        options: For `resumable_http_app`.
    """

    path: str
    port: int
    control: int
    log: str
    server: ServerKind = "mcpserver"
    auth: bool = False
    durability: Durability = "always"
    stop_s: int = 30
    bare: bool = False
    options: dict[str, Any] = {}


class Reap(msgspec.Struct, frozen=True, tag=True):
    """Tells the nursery to wait for the end of a worker; the answer is its exit status, negative for a signal."""

    pid: int


def text_of_size(label: str, size: int) -> str:
    """Return a text of so many characters that no other label gives."""
    block = hashlib.sha256(label.encode()).hexdigest()
    return (block * (size // len(block) + 1))[:size]


def bound_socket(port: int) -> socket.socket:
    """Return a socket bound to a port of this machine, 0 for a free one, that others may be bound to as well.

    The test holds such a socket without listening on it: nobody else gets the port while a worker is being restarted.
    """
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    return bound
