"""The resume layer: who serves a request of a session, and what becomes of sessions.

ASGI middleware around the MCP endpoint, inside authentication. A session lives in the SDK of one worker, its owner;
the registry says which. Requests of a session go to its owner; a resume is answered here, from the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

import anyio
import msgspec
from mcp.server.streamable_http import check_accept_headers
from mcp.server.transport_security import TransportSecurityMiddleware
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logstore.errors import LogstoreError
from logstore.mcp import answers
from logstore.mcp.base import LogEventStore
from logstore.mcp.connections import Connection, Connections
from logstore.mcp.peers import CALL_KEY, Outcome, PeerCall, Peers
from logstore.mcp.resume import Resumption
from logstore.mcp.revival import SESSION_HEADER, close_inside, open_inside, session_id_in, with_session_id
from logstore.mcp.scope import RequestId, SessionScope, current_session
from logstore.mcp.sdk import STANDALONE_STREAM
from logstore.mcp.sessions import SessionData, SessionKeeper, credential_of, key_of
from logstore.mcp.shutdown import until_server_stops
from logstore.storage import Session

logger = logging.getLogger("logstore.mcp")

_OWNER_PATIENCE_S: Final = 10.0
"""How long a request waits for a session whose owner is about to go, or to be replaced."""
_LOOK_AGAIN_S: Final = 0.02
_REFUSAL_S: Final = 0.05
"""Every refusal takes this long: how long the look took would tell whether there is something to be found."""
_TICK_S: Final = 0.25
_MAX_BODY_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class LayerOptions:
    """Settings of the layer.

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


class _Envelope(msgspec.Struct):
    """What the layer reads of a message."""

    id: RequestId | None = None
    method: str | None = None


_decode_envelope = msgspec.json.Decoder(_Envelope).decode


class _Head(NamedTuple):
    """What the layer reads of a request's headers."""

    session_id: str | None
    version: str | None
    last_event_id: str | None

    @classmethod
    def of(cls, scope: Scope) -> _Head:
        session_id = version = last_event_id = None
        for name, value in scope["headers"]:
            if name == SESSION_HEADER:
                session_id = value.decode("latin-1")
            elif name == b"mcp-protocol-version":
                version = value.decode("latin-1")
            elif name == b"last-event-id":
                last_event_id = value.decode("latin-1")
        return cls(session_id, version, last_event_id)


class _LiveSession:
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
        self.used_s = self.touched_s = time.monotonic()


class ResumeLayer:
    """See the module.

    Args:
        app: The MCP endpoint; it has a `session_manager`.
        store: Where events and sessions are kept.
        options: Settings.
    """

    def __init__(self, app: Any, store: LogEventStore, options: LayerOptions) -> None:
        self.app: ASGIApp = app
        self._endpoint = app
        self._store = store
        self._options = options
        self._connections = Connections()
        self._passing: set[Connection] = set()
        self._live: dict[str, _LiveSession] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # Sessions that another worker serves and readers here follow.
        self._followed: Counter[str] = Counter()
        self._unrecorded: dict[str, Callable[[], Awaitable[Any]]] = {}
        self._keeper: SessionKeeper
        self._peers: Peers | None = None
        self._own = 0
        self._draining = False

    # Requests.

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        head = _Head.of(scope)
        if head.version is not None and head.version not in HANDSHAKE_PROTOCOL_VERSIONS:
            # Revisions without sessions have nothing to resume.
            await self.app(scope, receive, send)
            return
        connection = Connection(receive, send)
        try:
            if head.session_id is None:
                await self._serve_new(scope, connection)
            elif scope["method"] == "GET" and head.last_event_id:
                await self._resume(head.session_id, head.last_event_id, scope, connection)
            else:
                await self._serve(head.session_id, scope, connection)
        finally:
            if connection.stream:
                self._connections.remove(connection)
            await connection.finish()

    async def _serve_new(self, scope: Scope, connection: Connection) -> None:
        """Serve a request without a session; it may open one."""
        session = SessionScope()

        async def bind(message: Message) -> None:
            session_id = session_id_in(message.get("headers", ())) if message["status"] < 400 else None
            if session_id is not None:
                await self._bind(session_id, session, scope, connection.body)

        connection.on_received = self._noting(session)
        connection.on_start = bind
        await self._call_sdk(session, scope, connection)

    async def _bind(self, session_id: str, scope: SessionScope, opening: Scope, initialize: bytes) -> None:
        """Make a session known before its client is: the next request may come at once, and to any worker."""
        live = _LiveSession(key_of(session_id), scope, credential_of(opening, scope.token), initialize)
        live.sdk_id, live.opening = session_id, opening
        self._live[live.key] = live
        data = SessionData(scope.token, live.credential, initialize).encode()
        await self._record(live.key, lambda: self._keeper.open(live.key, data, scope.prefix))

    async def _record(self, key: str, change: Callable[[], Awaitable[Any]]) -> None:
        """Change the registry; what the disk refuses is tried again until it does not."""
        try:
            await change()
        except ValueError as error:
            logger.error("a session cannot be kept, it ends with this process: %s", error)
        except Exception as error:
            logger.error("the registry cannot be written, sessions stay where they are: %s", error)
            self._unrecorded[key] = change

    def _noting(self, session: SessionScope) -> Callable[[Connection], None]:
        """Return what notes which stream a request's response carries, once it was received."""

        def note(connection: Connection) -> None:
            try:
                envelope = _decode_envelope(connection.body)
            except msgspec.MsgspecError:
                # The SDK says what is wrong with it.
                return
            if envelope.method is not None and envelope.id is not None:
                self._connections.add(session.begin(envelope.id), connection)

        return note

    async def _call_sdk(self, session: SessionScope, scope: Scope, connection: Connection) -> None:
        token = current_session.set(session)
        try:
            await self.app(scope, connection.receive, connection.send)
        finally:
            current_session.reset(token)
            if connection.status >= 400 or not connection.status:
                # It was refused; nothing runs.
                session.running.discard(connection.stream)

    async def _serve(self, session_id: str, scope: Scope, connection: Connection) -> None:
        """Serve a request of a session, here or where its owner is."""
        key = key_of(session_id)
        began_s = time.monotonic()
        while time.monotonic() - began_s < _OWNER_PATIENCE_S:
            live = self._live.get(key)
            if live is None:
                live = await self._look_for(key, began_s, scope, connection)
            elif live.credential != credential_of(scope, live.scope.token):
                await self._refuse(answers.unknown_session(), began_s, connection)
                return
            if live is None:
                if connection.status:
                    return
                await asyncio.sleep(_LOOK_AGAIN_S)
            elif await self._hand_back(live, scope, connection) or await self._serve_live(
                live, session_id, scope, connection
            ):
                return
        await _send(answers.unavailable("the session is being moved; try again"), connection)

    async def _look_for(self, key: str, began_s: float, scope: Scope, connection: Connection) -> _LiveSession | None:
        """Find a session that this process does not serve: pass the request on, or take the session over.

        Returns:
            The session, when it is served here now. None when the request was answered, or is to be tried again.
        """
        session = await self._find(key, scope)
        if session is None:
            await self._refuse(answers.unknown_session(), began_s, connection)
            return None
        call: PeerCall | None = scope.get(CALL_KEY)
        if call is not None and (session.released or session.incarnation != self._own or self._draining):
            # One hop only; who passed it on looks again.
            await _send_back(call, connection)
            return None
        if session.released or session.incarnation == self._own or self._peers is None:
            return await self._adopt_for(key, connection)
        if not connection.received and not await connection.read(self._max_body_bytes):
            await _send(answers.refusal(413, "Request body too large"), connection)
            return None
        outcome = await self._forward(session.incarnation, scope, connection)
        if outcome is Outcome.UNREACHABLE and not await self._keeper.is_alive(session.incarnation):
            self._peers.forget(session.incarnation)
            return await self._adopt_for(key, connection)
        if outcome is Outcome.SILENT:
            reason = "the server process that has this session does not react; the request may still be served"
            await _send(answers.unavailable(reason, _request_id(connection)), connection)
        if outcome is Outcome.LOST and scope["method"] == "POST":
            await _send(answers.lost(_request_id(connection)), connection)
        return None

    async def _forward(self, worker: int, scope: Scope, connection: Connection) -> Outcome:
        assert self._peers is not None
        self._passing.add(connection)
        try:
            return await self._peers.forward(worker, scope, connection)
        finally:
            self._passing.discard(connection)

    async def _find(self, key: str, scope: Scope) -> Session | None:
        """Return a session that the sender of a request may use."""
        session = await self._keeper.find(key)
        if session is None or self._is_expired(session):
            return None
        data = SessionData.decode(session.data)
        return session if data.credential == credential_of(scope, data.scope) else None

    def _is_expired(self, session: Session) -> bool:
        return session.key not in self._live and session.changed_us < self._expired_before_us()

    def _expired_before_us(self) -> int:
        return time.time_ns() // 1000 - int(self._options.session_ttl_hours * 3600 * 1_000_000)

    async def _hand_back(self, live: _LiveSession, scope: Scope, connection: Connection) -> bool:
        """Let a session go that another worker asks for while this one is about to stop, unless a call is running."""
        call: PeerCall | None = scope.get(CALL_KEY)
        if call is None or not self._draining:
            return False
        if not live.scope.closed:
            if live.scope.running or live.requests:
                return False
            await self._let_go(live)
        await _send_back(call, connection)
        return True

    async def _serve_live(self, live: _LiveSession, session_id: str, scope: Scope, connection: Connection) -> bool:
        """Serve a request of a session that lives here; return False when it does no more."""
        live.requests += 1
        try:
            if scope["method"] == "DELETE":
                await self._end(live, scope, connection)
                return True
            if live.sdk_id is None and not await self._revive(live, scope, connection):
                return bool(connection.status)
            if self._live.get(live.key) is not live:
                return False
            if scope["method"] == "GET":
                await self._end_earlier(live.scope.name_of(STANDALONE_STREAM), connection)
                self._connections.add(live.scope.name_of(STANDALONE_STREAM), connection)
            assert live.sdk_id is not None
            connection.on_start = self._watching(live, session_id)
            connection.on_received = self._noting(live.scope)
            if connection.received:
                connection.on_received(connection)
            if live.sdk_id != session_id:
                scope = {**scope, "headers": with_session_id(scope["headers"], live.sdk_id)}
            await self._call_sdk(live.scope, scope, connection)
            return True
        finally:
            live.requests -= 1
            live.used_s = time.monotonic()

    def _watching(self, live: _LiveSession, session_id: str) -> Callable[[Message], Awaitable[None]] | None:
        """Return what looks at the beginning of the SDK's response."""

        async def watch(message: Message) -> None:
            if message["status"] == 404:
                # The SDK has lost the session, and its client is told so.
                await self._forget(live)
            if live.sdk_id != session_id:
                message["headers"] = with_session_id(message["headers"], session_id)

        return watch

    # Resuming.

    async def _resume(self, session_id: str, last_event_id: str, scope: Scope, connection: Connection) -> None:
        began_s = time.monotonic()
        if not await self._is_acceptable(scope, connection):
            return
        key = key_of(session_id)
        live = self._live.get(key)
        if live is not None and live.credential == credential_of(scope, live.scope.token):
            session = live.scope
        else:
            found = None if live is not None else await self._find(key, scope)
            if found is None:
                await self._refuse(answers.unknown_session(), began_s, connection)
                return
            session = SessionScope(SessionData.decode(found.data).scope)
            if not found.released and not await self._keeper.is_alive(found.incarnation):
                live = await self._adopt_for(key, connection)
                if connection.status:
                    return
        resumption = await Resumption.begin(await self._store.log(), session, last_event_id)
        if resumption is None:
            await self._refuse(answers.unknown_event(), began_s, connection)
            return
        self._connections.add(resumption.stream, connection)
        await self._end_earlier(resumption.stream, connection)
        self._followed[key] += live is None
        try:
            await resumption.answer(connection, session_id, self._options.retry_ms)
        finally:
            if live is None:
                self._followed -= Counter({key: 1})
            else:
                live.used_s = time.monotonic()

    async def _is_acceptable(self, scope: Scope, connection: Connection) -> bool:
        """Check what the SDK's transport checks before it serves a GET, and answer if something is wrong."""
        request = Request(scope)
        security = TransportSecurityMiddleware(self._endpoint.session_manager.security_settings)
        refused = await security.validate_request(request, is_post=False)
        if refused is None and not check_accept_headers(request)[1]:
            refused = answers.refusal(406, "Not Acceptable: Client must accept text/event-stream")
        if refused is not None:
            await _send(refused, connection)
        return refused is None

    async def _end_earlier(self, stream: str, connection: Connection) -> None:
        """End the connections that carried a stream before, on whichever worker they are.

        A half-open one would stall the SDK's router once its buffers are full, and nothing more would be stored.
        """
        self._connections.end(stream, connection.began_ns)
        if self._peers is not None:
            await self._peers.tell_all("end", stream, connection.began_ns)

    # What other workers ask.

    def end_connections(self, name: str, older_than_ns: int) -> None:
        """End the connections of a stream that began before a time."""
        self._connections.end(name, older_than_ns)

    def is_reading(self, token: str) -> bool:
        """Whether connections of a session are open."""
        return self._connections.is_open(token)

    # The life of a session.

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    async def _adopt_for(self, key: str, connection: Connection) -> _LiveSession | None:
        """Take a session over because a request needs it; answer that when it cannot be."""
        try:
            return await self._adopt(key)
        except (OSError, LogstoreError) as error:
            logger.error("a session cannot be taken over: %s", error)
            await _send(answers.unavailable("the session cannot be taken over just now; try again"), connection)
            return None

    async def _adopt(self, key: str) -> _LiveSession | None:
        """Take a session over that nobody serves; return None when somebody does, or when it has ended.

        Calls that its last owner did not answer end with an error, for nobody ever will. The registry decides who
        takes over, and only that process writes it; if it dies in between, the next one does.
        """
        async with self._lock(key):
            live = self._live.get(key)
            if live is not None or self._draining:
                return live
            session = await self._keeper.take_over(key)
            if session is None or session.incarnation != self._own:
                return None
            data = SessionData.decode(session.data)
            scope = SessionScope(data.scope)
            await self._answer_lost(await (await self._store.log()).unanswered(scope.prefix))
            live = self._live[key] = _LiveSession(key, scope, data.credential, data.initialize)
            return live

    async def _answer_lost(self, streams: list[str]) -> None:
        if streams:
            logger.warning("%d calls end with an error: the process that ran them is gone", len(streams))
            log = await self._store.log()
            await log.append_many([answers.lost_event(stream) for stream in streams])

    async def _revive(self, live: _LiveSession, scope: Scope, connection: Connection) -> bool:
        """Open a session in the SDK again; return False when that was refused, which is the answer then."""
        async with self._lock(live.key):
            if live.sdk_id is not None or self._live.get(live.key) is not live:
                return live.sdk_id is not None
            opened = await open_inside(self.app, live.scope, live.initialize, scope)
            if opened.status >= 400 or opened.session_id is None:
                logger.error("a session could not be opened again: the SDK answers %d", opened.status)
                # Not 404: the session is well, and would be lost to its client.
                status = opened.status if opened.status >= 500 else 503
                await _send(Response(opened.body, status, media_type="application/json"), connection)
                return False
            live.sdk_id, live.opening = opened.session_id, scope
            return True

    async def _end(self, live: _LiveSession, scope: Scope, connection: Connection) -> None:
        """End a session everywhere, because its client wants to."""
        response = Response(status_code=200)
        if live.sdk_id is not None:
            ended = await close_inside(self.app, live.scope, live.sdk_id, scope)
            if ended.status >= 400 and ended.status != 404:
                await _send(Response(ended.body, ended.status, media_type="application/json"), connection)
                return
        await self._forget(live)
        await _send(response, connection)

    async def _forget(self, live: _LiveSession) -> None:
        """End a session that the SDK does not have any more."""
        if self._live.pop(live.key, None) is None:
            return
        live.scope.closed = True
        await self._record(live.key, lambda: self._keeper.end(live.key))
        now_ns = time.time_ns()
        self._connections.end(live.scope.prefix, now_ns)
        if self._peers is not None:
            await self._peers.tell_all("end", live.scope.prefix, now_ns)

    async def _let_go(self, live: _LiveSession) -> None:
        """Stop serving a session in which nothing runs; whoever is asked for it next does."""
        async with self._lock(live.key):
            if self._live.get(live.key) is not live or live.scope.running:
                return
            del self._live[live.key]
            live.scope.closed = True
            if live.sdk_id is not None:
                await close_inside(self.app, live.scope, live.sdk_id, live.opening)
            await self._record(live.key, lambda: self._keeper.release(live.key))

    def _is_idle(self, live: _LiveSession, since_s: float) -> bool:
        return (
            live.used_s < since_s
            and not live.requests
            and not live.scope.running
            and not self._connections.is_open(live.scope.token)
        )

    async def _park_idle(self) -> None:
        if self._options.session_idle_s is None:
            return
        since_s = time.monotonic() - self._options.session_idle_s
        for live in [live for live in self._live.values() if self._is_idle(live, since_s)]:
            if self._peers is not None and any(await self._peers.tell_all("reading", live.scope.token)):
                live.used_s = time.monotonic()
            elif self._is_idle(live, since_s):
                await self._let_go(live)

    async def _expire(self) -> None:
        """Tell the registry which sessions are in use, and end those that nobody uses."""
        now_s = time.monotonic()
        for live in list(self._live.values()):
            if live.requests or live.used_s > live.touched_s or self._connections.is_open(live.scope.token):
                live.touched_s = now_s
                await self._keeper.touch(live.key)
        before_us = self._expired_before_us()
        for session in await self._keeper.all():
            if self._is_expired(session):
                await self._keeper.end(session.key, unchanged_since_us=before_us)

    # With the server.

    @contextlib.asynccontextmanager
    async def running(self, app: ASGIApp, state: Any) -> AsyncGenerator[None, None]:
        """Serve as long as the block lasts, which is within the lifespans of the store and of the SDK.

        Args:
            app: The whole app: what other workers pass on goes through authentication here too.
            state: What the lifespan gave to requests.
        """
        self._keeper = await self._store.sessions()
        self._own = await self._keeper.incarnation()
        folder = await self._store.shared_folder()
        if folder is not None:
            self._peers = Peers(folder / "peers", self._own, app, state, self)
            await self._peers.open()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_house)
                tasks.start_soon(self._end_streams_with_the_server)
                try:
                    yield
                finally:
                    with anyio.CancelScope(shield=True):
                        await self._drain()
                    tasks.cancel_scope.cancel()
        finally:
            if self._peers is not None:
                with anyio.CancelScope(shield=True):
                    await self._peers.close()

    async def _keep_house(self) -> None:
        ttl_s = self._options.session_ttl_hours * 3600
        idle_s = self._options.session_idle_s or ttl_s
        works = [
            _Work(_TICK_S, self._look_after_followed),
            _Work(min(1.0, idle_s / 4), self._park_idle),
            _Work(1.0, self._record_again),
            _Work(min(600.0, ttl_s / 24), self._expire),
        ]
        while True:
            await asyncio.sleep(min(work.every_s for work in works))
            for work in works:
                await work.do_if_due()

    async def _look_after_followed(self) -> None:
        """Take over sessions whose owner died while somebody reads here: its calls end with an error."""
        if self._followed:
            for key in await self._keeper.unserved(list(self._followed)):
                await self._adopt(key)

    async def _record_again(self) -> None:
        changes, self._unrecorded = self._unrecorded, {}
        for key, change in changes.items():
            await self._record(key, change)

    async def _end_streams_with_the_server(self) -> None:
        """End streams cleanly when the server is told to stop: it waits for them before it says so here."""
        while True:
            await until_server_stops()
            self._end_streams()
            await asyncio.sleep(_TICK_S)

    def _end_streams(self) -> None:
        self._connections.end_all()
        for connection in self._passing:
            if connection.status:
                connection.end()

    async def _drain(self) -> None:
        """Let running calls finish for a while, then end them with an error."""
        self._draining = True
        self._end_streams()
        for _ in range(int(self._options.drain_s / _LOOK_AGAIN_S)):
            if not any(live.scope.running for live in self._live.values()):
                break
            await asyncio.sleep(_LOOK_AGAIN_S)
        lost: list[str] = []
        for live in self._live.values():
            live.scope.closed = True
            lost += live.scope.running
        try:
            await self._answer_lost(lost)
        except LogstoreError as error:
            logger.error("calls that were still running end without an answer: %s", error)

    # Answering.

    @property
    def _max_body_bytes(self) -> int:
        return int(getattr(self._endpoint.session_manager, "max_request_body_size", _MAX_BODY_BYTES))

    async def _refuse(self, response: Response, began_s: float, connection: Connection) -> None:
        """Refuse a session or an event, after a time that says nothing of what was found."""
        await asyncio.sleep(max(0.0, began_s + _REFUSAL_S - time.monotonic()))
        await _send(response, connection)


class _Work:
    """Something to be done every so often; what fails is logged, and done again the next time."""

    def __init__(self, every_s: float, job: Callable[[], Awaitable[None]]) -> None:
        self.every_s = every_s
        self._job = job
        self._due_s = time.monotonic() + every_s

    async def do_if_due(self) -> None:
        if time.monotonic() >= self._due_s:
            try:
                await self._job()
            except Exception:
                logger.exception("what keeps sessions in order failed; it is tried again")
            self._due_s = time.monotonic() + self.every_s


async def _send(response: Response, connection: Connection) -> None:
    await response({"type": "http", "method": "POST"}, connection.receive, connection.send)


async def _send_back(call: PeerCall, connection: Connection) -> None:
    call.again = True
    await _send(Response(status_code=503), connection)


def _request_id(connection: Connection) -> RequestId | None:
    """Return the id of the request that a connection brought, None for a notification or an answer."""
    try:
        envelope = _decode_envelope(connection.body)
    except msgspec.MsgspecError:
        return None
    return envelope.id if envelope.method is not None else None
