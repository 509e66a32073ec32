"""What is kept of a session, so that any process may serve it: in the store's registry, or in memory.

Nothing of it is a secret: the session is found by a hash of its id, and the credential is a hash too.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Protocol

import msgspec
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, authorization_context
from starlette.types import Scope

from logstore.storage import Session


class SessionData(msgspec.Struct, frozen=True):
    """What it takes to serve a session again.

    Attributes:
        scope: Token of its `SessionScope`.
        credential: Hash of whom authentication said the client is.
        initialize: The body of the request that opened it.
    """

    scope: str
    credential: str
    initialize: bytes

    def encode(self) -> bytes:
        """Return it as the registry keeps it."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> SessionData:
        """Return what `encode` was given.

        Raises:
            msgspec.MsgspecError: It is something else.
        """
        return msgspec.json.decode(data, type=cls)


@lru_cache(maxsize=10_000)
def key_of(session_id: str) -> str:
    """Return what stands for a session id wherever it is kept: without authentication the id itself is a secret."""
    return hashlib.sha256(session_id.encode("latin-1")).hexdigest()


def client_of(scope: Scope) -> list[Any]:
    """Return whom authentication says the client of a request is, empty for nobody.

    The same parts as the SDK compares, so that a token that was renewed is the same client.
    """
    user = scope.get("user")
    if isinstance(user, AuthenticatedUser):
        context = authorization_context(user)
        return [context["client_id"], context["issuer"], context["subject"]]
    if getattr(user, "is_authenticated", False):
        return [type(user).__qualname__, getattr(user, "display_name", "")]
    return []


def credential_of(client: list[Any], token: str) -> str:
    """Return a hash that stands for a client, for one session."""
    return hashlib.sha256(token.encode() + msgspec.json.encode(client)).hexdigest()


class SessionKeeper(Protocol):
    """Where sessions are kept; `logstore.storage.Sessions` tells more."""

    async def incarnation(self) -> int:
        """Return what this process is called as an owner."""
        ...

    async def open(self, key: str, data: bytes, stream_prefix: str = "") -> Session:
        """Add a session that this process serves."""
        ...

    async def find(self, key: str) -> Session | None:
        """Return a session that has not ended."""
        ...

    async def all(self) -> list[Session]:
        """Return every session that has not ended."""
        ...

    async def take_over(self, key: str) -> Session | None:
        """Serve a session from here on, if nobody does."""
        ...

    async def release(self, key: str) -> None:
        """Let whoever is asked for a session next take it over."""
        ...

    async def touch(self, key: str) -> None:
        """Renew the time of a session's last change."""
        ...

    async def end(self, key: str, *, unchanged_since_us: int | None = None) -> None:
        """End a session, unless it changed since."""
        ...

    async def is_alive(self, incarnation: int) -> bool:
        """Whether an owner lives."""
        ...

    async def unserved(self, keys: Iterable[str]) -> set[str]:
        """Return those of the sessions whose owner is dead."""
        ...


class MemorySessions:
    """The sessions of a store in memory, which one process has."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    async def incarnation(self) -> int:
        """Return what this process is called as an owner."""
        return 1

    async def open(self, key: str, data: bytes, stream_prefix: str = "") -> Session:
        """Add a session."""
        now_us = _now_us()
        session = self._sessions[key] = Session(key, 1, now_us, data, stream_prefix, now_us)
        return session

    async def find(self, key: str) -> Session | None:
        """Return a session that has not ended."""
        return self._sessions.get(key)

    async def all(self) -> list[Session]:
        """Return every session that has not ended."""
        return list(self._sessions.values())

    async def take_over(self, key: str) -> Session | None:
        """Return a session that has not ended."""
        await self.touch(key)
        return self._sessions.get(key)

    async def release(self, key: str) -> None:
        """Note that a session is idle from here on."""
        await self.touch(key)

    async def touch(self, key: str) -> None:
        """Renew the time of a session's last change."""
        if key in self._sessions:
            self._sessions[key] = self._sessions[key]._replace(changed_us=_now_us())

    async def end(self, key: str, *, unchanged_since_us: int | None = None) -> None:
        """End a session, unless it changed since."""
        session = self._sessions.get(key)
        if session is not None and (unchanged_since_us is None or session.changed_us <= unchanged_since_us):
            del self._sessions[key]

    async def is_alive(self, incarnation: int) -> bool:
        """Whether an owner lives: this process does."""
        return True

    async def unserved(self, keys: Iterable[str]) -> set[str]:
        """Return those of the sessions whose owner is dead: none."""
        return set()


def _now_us() -> int:
    return time.time_ns() // 1000
