"""The sessions that this process serves: how they come, stay and go.

The registry says which process owns a session. Whoever is asked for one that nobody serves takes it over, answers the
calls that its last owner left, and opens it in its own SDK when the first request for that comes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple
from weakref import WeakValueDictionary

import msgspec
from starlette.types import ASGIApp, Scope

from logstore.errors import LogstoreError
from logstore.mcp import answers
from logstore.mcp.base import LogEventStore
from logstore.mcp.connections import Connections
from logstore.mcp.peers import Peers
from logstore.mcp.revival import InnerResponse, close_inside, open_inside
from logstore.mcp.scope import SessionScope
from logstore.mcp.sessions import SessionData, SessionKeeper, client_of, credential_of
from logstore.storage import Session

logger = logging.getLogger("logstore.mcp")

LOOK_AGAIN_S: Final = 0.02
_OWNER_PATIENCE_S: Final = 10.0


@dataclass(frozen=True)
class LayerOptions:
    """Settings of the resume layer.

    Attributes:
        session_idle_s: Without a request, a running call or a reader for this long a session is parked: it leaves
            memory, and comes back with its next request. None parks nothing.
        session_ttl_hours: A session that nobody used for this long is ended.
        drain_s: What running calls may take to finish when the server stops.
        retry_ms: What clients are told to wait before they come again, None for nothing.
    """

    session_idle_s: float | None = 1800.0
    session_ttl_hours: float = 24.0
    drain_s: float = 10.0
    retry_ms: int | None = None

    @property
    def patience_s(self) -> float:
        """How long a request waits for a session whose owner is about to go, in seconds."""
        return self.drain_s + _OWNER_PATIENCE_S

    @property
    def ttl_s(self) -> float:
        """`session_ttl_hours` in seconds."""
        return self.session_ttl_hours * 3600


class LiveSession:
    """A session that this process serves.

    Attributes:
        key: What it is kept under.
        scope: Its place in the log.
        credential: See `credential_of`.
        initialize: The request that opened it.
        sdk_id: The SDK's id of it, None while the SDK does not have it: it comes back with the next request.
        opening: ASGI scope of the request on whose behalf the SDK has it.
        requests: How many are being served.
        used_s: When the last one ended; monotonic seconds.
        touched_s: When the registry was last told that it is in use; monotonic seconds.
    """

    __slots__ = (
        "_client",
        "credential",
        "initialize",
        "key",
        "opening",
        "requests",
        "scope",
        "sdk_id",
        "touched_s",
        "used_s",
    )

    def __init__(self, key: str, scope: SessionScope, credential: str, initialize: bytes) -> None:
        self.key = key
        self.scope = scope
        self.credential = credential
        self.initialize = initialize
        self.sdk_id: str | None = None
        self.opening: Scope = {}
        self.requests = 0
        self._client: list[Any] | None = None
        self.used_s = self.touched_s = time.monotonic()

    @property
    def waits_for_sdk(self) -> bool:
        """Whether it is served here, and the SDK does not have it."""
        return self.sdk_id is None and not self.scope.closed

    def may_use(self, scope: Scope) -> bool:
        """Whether the sender of a request is the client that opened the session."""
        client = client_of(scope)
        if client == self._client:
            return True
        if self.credential != credential_of(client, self.scope.token):
            return False
        # For the next request: the hash costs as much as everything else that is looked at.
        self._client = client
        return True


class _Change(NamedTuple):
    """What the registry is to be told of a session."""

    what: Literal["opened", "ended", "released"]
    tell: Callable[[], Awaitable[Any]]


class Custody:
    """The sessions of this process.

    Args:
        app: The MCP endpoint.
        store: Where events and sessions are kept.
        options: Settings.
        connections: The open responses.

    Attributes:
        live: The sessions that this process serves, by key.
        followed: Sessions that others serve and readers here follow, with how many do.
        own: What this process is called as an owner.
        keeper: The registry.
        peers: The other workers, None when there can be none.
        closed: Whether no session is taken over any more.
    """

    def __init__(self, app: ASGIApp, store: LogEventStore, options: LayerOptions, connections: Connections) -> None:
        self._app = app
        self._store = store
        self._options = options
        self._connections = connections
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._unrecorded: dict[str, _Change] = {}
        self.live: dict[str, LiveSession] = {}
        self.followed: Counter[str] = Counter()
        self.own = 0
        self.keeper: SessionKeeper
        self.peers: Peers | None = None
        self.closed = False

    async def open(self) -> None:
        """Begin."""
        self.keeper = await self._store.sessions()
        self.own = await self.keeper.incarnation()

    # Coming.

    async def bind(self, live: LiveSession) -> None:
        """Make a session known that the SDK has opened."""
        self.live[live.key] = live
        data = SessionData(live.scope.token, live.credential, live.initialize).encode()
        await self._record(live.key, _Change("opened", lambda: self.keeper.open(live.key, data, live.scope.prefix)))

    async def find(self, key: str, scope: Scope) -> tuple[Session, SessionScope] | None:
        """Return a session that the sender of a request may use, and its place in the log; None for any other."""
        session = await self.keeper.find(key)
        if session is None or self._is_expired(session) or self._is_ended(key):
            return None
        try:
            data = SessionData.decode(session.data)
        except (ValueError, RecursionError, msgspec.MsgspecError) as error:
            # Nobody can serve it, whoever put it there.
            logger.error("the registry has a session that cannot be read: %s", error)
            return None
        is_its_client = data.credential == credential_of(client_of(scope), data.scope)
        return (session, SessionScope(data.scope)) if is_its_client else None

    async def adopt(self, key: str) -> LiveSession | None:
        """Take a session over that nobody serves; return None when somebody does, or when it has ended.

        Calls that its last owner did not answer end with an error, for nobody ever will. The registry decides who
        takes over, and only that process writes it; if it dies in between, the next one does.

        Raises:
            OSError, LogstoreError: The disk refuses; nothing has changed.
        """
        async with self._lock(key):
            live = self.live.get(key)
            if live is not None or self.closed or self._is_ended(key):
                return live
            pending = self._unrecorded.get(key)
            if pending is not None and pending.what == "released":
                # It was not let go yet, and is not to be behind this back.
                del self._unrecorded[key]
            session = await self.keeper.take_over(key)
            if session is None or session.incarnation != self.own:
                return None
            data = SessionData.decode(session.data)
            live = LiveSession(key, SessionScope(data.scope), data.credential, data.initialize)
            await self._answer_lost(await (await self._store.log()).unanswered(live.scope.prefix))
            self.live[key] = live
            return live

    async def _answer_lost(self, streams: list[str]) -> None:
        if streams:
            logger.warning("%d calls end with an error: the process that ran them is gone", len(streams))
            log = await self._store.log()
            await log.append_many([answers.lost_event(stream) for stream in streams])

    async def revive(self, live: LiveSession, scope: Scope) -> InnerResponse | None:
        """See to it that the SDK has a session; return its answer when it refuses.

        Args:
            live: The session.
            scope: Of the request on whose behalf it is done.
        """
        if live.sdk_id is not None:
            return None
        async with self._lock(live.key):
            if not live.waits_for_sdk:
                return None
            opened = await open_inside(self._app, live.scope, live.initialize, scope)
            if opened.status >= 400 or opened.session_id is None:
                logger.error("a session could not be opened again: the SDK answers %d", opened.status)
                return opened
            live.sdk_id, live.opening = opened.session_id, scope
            return None

    # Going.

    async def end(self, live: LiveSession, scope: Scope) -> InnerResponse | None:
        """End a session everywhere, because its client wants to; return the SDK's answer when it refuses."""
        if live.sdk_id is not None:
            ended = await close_inside(self._app, live.scope, live.sdk_id, scope)
            if ended.status >= 400 and ended.status != 404:
                return ended
        await self.forget(live)
        return None

    async def forget(self, live: LiveSession) -> None:
        """End a session that the SDK does not have any more."""
        async with self._lock(live.key):
            if self.live.get(live.key) is not live:
                return
            del self.live[live.key]
            live.scope.closed = True
            await self._record(live.key, _Change("ended", lambda: self.keeper.end(live.key)))
        now_ns = time.time_ns()
        self._connections.end(live.scope.prefix, now_ns)
        if self.peers is not None:
            await self.peers.end_everywhere(live.scope.prefix, now_ns)

    async def let_go(self, live: LiveSession) -> bool:
        """Stop serving a session in which nothing runs, for whoever is asked for it next; return whether it is gone."""
        async with self._lock(live.key):
            if self.live.get(live.key) is not live:
                return True
            if live.scope.running or live.requests:
                return False
            del self.live[live.key]
            live.scope.closed = True
            if live.sdk_id is not None:
                await close_inside(self._app, live.scope, live.sdk_id, live.opening)
            await self._record(live.key, _Change("released", lambda: self.keeper.release(live.key)))
            return True

    async def drain(self) -> None:
        """Let running calls finish for a while, then end them with an error."""
        log = self._store.opened
        async for _ in _until(self._options.drain_s):
            # Until it is stored, an answer has not left either.
            if all(
                not live.scope.running and (log is None or log.is_stored(live.scope.newest))
                for live in self.live.values()
            ):
                break
        self.closed = True
        lost: list[str] = []
        for live in self.live.values():
            live.scope.closed = True
            lost += live.scope.running
        self.live.clear()
        try:
            await self._answer_lost(lost)
        except LogstoreError as error:
            logger.error("calls that were still running end without an answer: %s", error)

    # Keeping order; each is called every now and then.

    async def park_idle(self) -> None:
        """Let sessions go that nobody uses."""
        if self._options.session_idle_s is None:
            return
        since_s = time.monotonic() - self._options.session_idle_s
        idle = [live for live in self.live.values() if self._is_idle(live, since_s)]
        tokens = [live.scope.token for live in idle]
        read = await self.peers.read_elsewhere(tokens) if tokens and self.peers else set[str]()
        for live in idle:
            if live.scope.token in read:
                live.used_s = time.monotonic()
            elif self._is_idle(live, since_s):
                await self.let_go(live)

    def _is_idle(self, live: LiveSession, since_s: float) -> bool:
        return (
            live.used_s < since_s
            and not live.requests
            and not live.scope.running
            and not self._connections.is_open(live.scope.token)
        )

    async def expire(self) -> None:
        """Tell the registry which sessions are in use, and end those that nobody uses."""
        now_s = time.monotonic()
        for live in list(self.live.values()):
            if live.requests or live.used_s > live.touched_s or self._connections.is_open(live.scope.token):
                live.touched_s = now_s
                await self.keeper.touch(live.key)
        before_us = self._expired_before_us()
        for session in await self.keeper.all():
            if self._is_expired(session):
                await self.keeper.end(session.key, unchanged_since_us=before_us)

    def _is_expired(self, session: Session) -> bool:
        return session.key not in self.live and session.changed_us < self._expired_before_us()

    def _expired_before_us(self) -> int:
        return time.time_ns() // 1000 - int(self._options.ttl_s * 1_000_000)

    async def adopt_followed(self) -> None:
        """Take sessions over whose owner died while somebody reads them here: their calls end with an error."""
        if self.followed:
            for key in await self.keeper.unserved(list(self.followed)):
                await self.adopt(key)

    async def sweep_sockets(self) -> None:
        """Remove the sockets that dead workers left."""
        if self.peers is not None:
            for worker in self.peers.others():
                if not await self.keeper.is_alive(worker):
                    self.peers.forget(worker)

    async def record_again(self) -> None:
        """Try again what the registry could not be told."""
        for key in list(self._unrecorded):
            async with self._lock(key):
                # It may have been told meanwhile, or not be so any more.
                if (change := self._unrecorded.pop(key, None)) is not None:
                    await self._record(key, change)

    def _is_ended(self, key: str) -> bool:
        """Whether a session has ended here, though the registry does not know it yet."""
        pending = self._unrecorded.get(key)
        return pending is not None and pending.what == "ended"

    async def _record(self, key: str, change: _Change) -> None:
        """Tell the registry; what the disk refuses is tried again until it does not."""
        earlier = self._unrecorded.pop(key, None)
        try:
            if earlier is not None and earlier.what == "opened":
                # It knows nothing of the session; of one that has ended nor need it.
                if change.what == "ended":
                    return
                await earlier.tell()
            await change.tell()
        except ValueError as error:
            logger.error("a session cannot be kept, it ends with this process: %s", error)
        except Exception as error:
            logger.error("the registry cannot be written, sessions stay where they are: %s", error)
            self._unrecorded[key] = change if earlier is None else _both(earlier, change)

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())


def _both(first: _Change, second: _Change) -> _Change:
    """Return two changes as one, which is called what the second is."""

    async def tell() -> None:
        await first.tell()
        await second.tell()

    return _Change(second.what, tell)


async def _until(seconds: float) -> AsyncIterator[None]:
    """Yield a few times a second, up to a time."""
    for _ in range(int(seconds / LOOK_AGAIN_S) + 1):
        yield
        await asyncio.sleep(LOOK_AGAIN_S)
