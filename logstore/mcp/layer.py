"""The resume layer: who serves a request of a session.

ASGI middleware around the MCP endpoint, inside authentication. A session lives in the SDK of one worker, its owner, and
requests go there, wherever they arrive; a resume is answered right here, from the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any, Final, NamedTuple

import anyio
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
from logstore.mcp.custody import LOOK_AGAIN_S, Custody, LayerOptions, LiveSession
from logstore.mcp.forwarding import Forwarding, send_back
from logstore.mcp.housekeeping import keep_house
from logstore.mcp.peers import CALL_KEY, Outcome, PeerCall, Peers
from logstore.mcp.resume import Resumption
from logstore.mcp.revival import (
    MAX_INITIALIZE_BYTES,
    SESSION_HEADER,
    InnerResponse,
    initialize_of,
    session_id_in,
    with_session_id,
)
from logstore.mcp.scope import SessionScope, current_session
from logstore.mcp.sdk import STANDALONE_STREAM
from logstore.mcp.sessions import client_of, credential_of, key_of
from logstore.mcp.shutdown import ServerWatch
from logstore.storage import Session

logger = logging.getLogger("logstore.mcp")

_REFUSAL_S: Final = 0.05
"""Every refusal takes this long: how long the look took would tell whether there is something to be found."""
_MAX_BODY_BYTES: Final = 4 << 20

_VERSION_HEADER: Final = b"mcp-protocol-version"
_LAST_EVENT_HEADER: Final = b"last-event-id"
_ONCE: Final = (SESSION_HEADER, _VERSION_HEADER, _LAST_EVENT_HEADER)

_TWICE: Final = "Bad Request: Mcp-Session-Id, Mcp-Protocol-Version and Last-Event-ID may come once each"
_TOO_LARGE: Final = "clientInfo and capabilities are larger than a session may keep"
_MOVING: Final = "the session is being moved to another server process; nothing was done, try again"
_NOT_LOOKED_UP: Final = "the stream cannot be read just now, try again"
_NOT_NOW: Final = "the session cannot be taken over just now; nothing was done, try again"


class _Head(NamedTuple):
    """What the layer reads of a request's headers."""

    session_id: str | None
    version: str | None
    last_event_id: str | None

    @classmethod
    def of(cls, scope: Scope) -> _Head | None:
        """Read them; None when one comes twice: the SDK would take the one, and this layer have checked the other."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if len(headers) != len(scope["headers"]) and any(
            sum(name == each for name, _ in scope["headers"]) > 1 for each in _ONCE
        ):
            return None
        return cls(
            _text(headers.get(SESSION_HEADER)),
            _text(headers.get(_VERSION_HEADER)),
            _text(headers.get(_LAST_EVENT_HEADER)),
        )


class ResumeLayer:
    """See the module.

    Args:
        app: The MCP endpoint; it has a `session_manager`.
        store: Where events and sessions are kept.
        options: Settings.

    Attributes:
        app: The endpoint.
        custody: The sessions that this process serves.
        connections: The open responses of this process that carry streams.
    """

    def __init__(self, app: Any, store: LogEventStore, options: LayerOptions) -> None:
        self.app: ASGIApp = app
        self._endpoint = app
        self._store = store
        self._options = options
        self.connections = Connections()
        self.custody = Custody(app, store, options, self.connections)
        self._forwarding = Forwarding(self.custody, options, self._max_body_bytes)
        self._server = ServerWatch(self._end_streams)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        head = _Head.of(scope)
        if head is None:
            await answers.refusal(400, _TWICE)(scope, receive, send)
            return
        if head.version is not None and head.version not in HANDSHAKE_PROTOCOL_VERSIONS:
            # Revisions without sessions have nothing to resume.
            await self.app(scope, receive, send)
            return
        connection = Connection(receive, send)
        try:
            resumes = scope["method"] == "GET" and bool(head.last_event_id)
            if self._server.is_stopping and await self._forwarding.leave_to_others(
                head.session_id, scope, connection, resumes=resumes
            ):
                return
            if head.session_id is None:
                await self._serve_new(scope, connection)
            elif resumes and head.last_event_id is not None:
                await self._resume(head.session_id, head.last_event_id, scope, connection)
            else:
                await self._serve(head.session_id, scope, connection)
        finally:
            if connection.stream:
                self.connections.remove(connection)
            await connection.finish()

    # Requests that the SDK serves.

    async def _serve_new(self, scope: Scope, connection: Connection) -> None:
        """Serve a request without a session; it may open one."""
        session = SessionScope()
        if not connection.received and not await connection.read(self._max_body_bytes()):
            await connection.answer(answers.refusal(413, "Request body too large"))
            return
        initialize = initialize_of(connection.body)
        if len(initialize) > MAX_INITIALIZE_BYTES:
            await connection.answer(answers.refusal(413, _TOO_LARGE, request_id=connection.request_id))
            return

        async def bind(message: Message) -> None:
            # Before its client knows of it: the next request may come at once, and to any worker.
            session_id = session_id_in(message.get("headers", ())) if message["status"] < 400 else None
            if session_id is not None:
                credential = credential_of(client_of(scope), session.token)
                live = LiveSession(key_of(session_id), session, credential, initialize)
                live.sdk_id, live.opening = session_id, scope
                await self.custody.bind(live)

        connection.on_start = bind
        await self._call_sdk(session, scope, connection)

    async def _call_sdk(self, session: SessionScope, scope: Scope, connection: Connection) -> None:
        call: PeerCall | None = scope.get(CALL_KEY)

        def note(connection: Connection) -> None:
            """Note that the SDK gets the request, and which stream the response carries."""
            if call is not None:
                call.begin()
            # Whatever else has a body, the SDK does not read it.
            request_id = connection.request_id if scope["method"] == "POST" else None
            if request_id is not None:
                self.connections.add(session.begin(request_id), connection)

        connection.on_received = note
        if (log := self._store.opened) is not None:
            connection.hold_back(session, log)
        if connection.received:
            connection.rewind()
            note(connection)
        token = current_session.set(session)
        try:
            await self.app(scope, connection.receive, connection.send)
        finally:
            current_session.reset(token)
            if (primed := session.primed.pop(connection.stream, None)) is not None:
                # The SDK ended it, with the server, before the client had an id to come back with.
                await connection.finish(b"id: %b\r\ndata: \r\n\r\n" % primed.encode())
            if connection.status >= 400 or not connection.status:
                # It was refused; nothing runs.
                session.refused(connection.stream)

    async def _serve(self, session_id: str, scope: Scope, connection: Connection) -> None:
        """Serve a request of a session, here or where its owner is."""
        key = key_of(session_id)
        began_s = time.monotonic()
        while connection.waits and time.monotonic() - began_s < self._options.patience_s:
            live = self.custody.live.get(key) or await self._look_for(key, began_s, scope, connection)
            if live is not None and not live.may_use(scope):
                await self._refuse(answers.unknown_session(), began_s, connection)
            elif live is not None and await self._serve_live(live, session_id, scope, connection):
                return
            elif self.custody.closed:
                break
            elif connection.waits:
                await asyncio.sleep(LOOK_AGAIN_S)
        if connection.waits and (call := scope.get(CALL_KEY)) is not None:
            await send_back(call, connection, stopping=self.custody.closed)
        elif connection.waits:
            await connection.answer(answers.unavailable(_MOVING, connection.request_id))

    async def _look_for(self, key: str, began_s: float, scope: Scope, connection: Connection) -> LiveSession | None:
        """Find a session that this process does not serve: pass the request on, or take the session over.

        Returns:
            The session, when it is served here now. None when the request was answered, or is to be tried again.
        """
        found = await self.custody.find(key, scope)
        if found is None:
            await self._refuse(answers.unknown_session(), began_s, connection)
            return None
        session, peers = found[0], self.custody.peers
        if session.released or session.incarnation == self.custody.own or peers is None:
            return await self._adopt(key, connection)
        if await self._may_be_alive(session.incarnation, peers):
            call: PeerCall | None = scope.get(CALL_KEY)
            if call is not None:
                # One hop only; who passed it on looks again.
                await send_back(call, connection, stopping=False)
                return None
            if await self._forwarding.pass_on(session.incarnation, peers, scope, connection) is not Outcome.UNREACHABLE:
                return None
            if await self.custody.keeper.is_alive(session.incarnation):
                return None
            peers.forget(session.incarnation)
        return await self._adopt(key, connection)

    async def _may_be_alive(self, worker: int, peers: Peers) -> bool:
        """Whether another worker lives; without asking the disk when its socket is there, which is tried next."""
        return peers.is_listed(worker) or await self.custody.keeper.is_alive(worker)

    async def _adopt(self, key: str, connection: Connection) -> LiveSession | None:
        """Take a session over because a request needs it; answer that when it cannot be."""
        try:
            return await self.custody.adopt(key)
        except (OSError, LogstoreError) as error:
            logger.error("a session cannot be taken over: %s", error)
            await connection.answer(answers.unavailable(_NOT_NOW, connection.request_id))
            return None

    async def _serve_live(self, live: LiveSession, session_id: str, scope: Scope, connection: Connection) -> bool:
        """Serve a request of a session that lives here; return False when it does no more."""
        live.requests += 1
        try:
            if scope["method"] == "DELETE":
                await connection.answer(_response(await self.custody.end(live, scope) or InnerResponse(200, [], b"")))
                return True
            refused = await self.custody.revive(live, scope) if live.sdk_id is None else None
            if refused is not None:
                # Not 404: the session is well, and would be lost to its client.
                await connection.answer(_response(refused._replace(status=max(refused.status, 503))))
                return True
            if live.scope.closed or live.sdk_id is None:
                return False
            if scope["method"] == "GET":
                if not await self._is_acceptable(scope, connection):
                    return True
                self.connections.add(live.scope.name_of(STANDALONE_STREAM), connection)
                await self._end_earlier(connection)
            connection.on_start = self._watching(live, session_id)
            if live.sdk_id != session_id:
                scope = {**scope, "headers": with_session_id(scope["headers"], live.sdk_id)}
            await self._call_sdk(live.scope, scope, connection)
            return True
        finally:
            live.requests -= 1
            live.used_s = time.monotonic()

    def _watching(self, live: LiveSession, session_id: str) -> Callable[[Message], Awaitable[None]]:
        """Return what looks at the beginning of the SDK's response."""

        async def watch(message: Message) -> None:
            if message["status"] == 404:
                # The SDK has lost the session, and its client is told so.
                await self.custody.forget(live)
            if live.sdk_id != session_id:
                message["headers"] = with_session_id(message["headers"], session_id)

        return watch

    # Resuming.

    async def _resume(self, session_id: str, last_event_id: str, scope: Scope, connection: Connection) -> None:
        began_s = time.monotonic()
        if not await self._is_acceptable(scope, connection):
            return
        key = key_of(session_id)
        live = self.custody.live.get(key)
        session = live.scope if live is not None and live.may_use(scope) else None
        owner: Session | None = None
        if live is None and (found := await self.custody.find(key, scope)) is not None:
            session = found[1]
            owner = found[0]
            if owner.released or not await self.custody.keeper.is_alive(owner.incarnation):
                live = await self._adopt(key, connection)
                if connection.status:
                    return
        if session is None:
            await self._refuse(answers.unknown_session(), began_s, connection)
            return
        try:
            resumption = await Resumption.begin(await self._store.log(), session, last_event_id)
        except (OSError, LogstoreError) as error:
            logger.error("a resume cannot be looked up: %s", error)
            await connection.answer(answers.unavailable(_NOT_LOOKED_UP))
            return
        if resumption is None:
            if live is None and await self._resume_at_owner(owner, scope, connection):
                return
            await self._refuse(answers.unknown_event(), began_s, connection)
            return
        self.connections.add(resumption.stream, connection)
        await self._end_earlier(connection)
        # The owner of a session that lives here cannot die without the reader.
        followed = Counter({key: 1} if live is None else {})
        self.custody.followed += followed
        try:
            await resumption.answer(connection, session_id, self._options.retry_ms)
        finally:
            self.custody.followed -= followed
            if live is not None:
                live.used_s = time.monotonic()

    async def _resume_at_owner(self, owner: Session | None, scope: Scope, connection: Connection) -> bool:
        """Have a stream resumed where its session lives: while the disk fails, only that worker has the newest events.

        Returns:
            Whether the request was answered.
        """
        peers = self.custody.peers
        if owner is None or owner.incarnation == self.custody.own or peers is None or CALL_KEY in scope:
            return False
        await self._forwarding.pass_on(owner.incarnation, peers, scope, connection)
        return bool(connection.status)

    async def _is_acceptable(self, scope: Scope, connection: Connection) -> bool:
        """Check what the SDK's transport checks before it serves a GET, and answer if something is wrong."""
        security = TransportSecurityMiddleware(self._endpoint.session_manager.security_settings)
        refused = await security.validate_request(Request(scope), is_post=False)
        if refused is None and not check_accept_headers(Request(scope))[1]:
            refused = answers.refusal(406, "Not Acceptable: Client must accept text/event-stream")
        if refused is not None:
            await connection.answer(refused)
        return refused is None

    async def _end_earlier(self, connection: Connection) -> None:
        """End the connections that carried a stream before this one, on whichever worker they are.

        A half-open one would stall the SDK's router once its buffers are full, and nothing more would be stored.
        """
        await self._end_everywhere(connection.stream, connection.began_ns)

    async def end_stream(self, name: str) -> None:
        """End the connections that carry a stream now, on whichever worker they are; the stream goes on."""
        await self._end_everywhere(name, time.time_ns())

    async def _end_everywhere(self, name: str, older_than_ns: int) -> None:
        self.end_connections(name, older_than_ns)
        if self.custody.peers is not None:
            await self.custody.peers.end_everywhere(name, older_than_ns)

    # What other workers ask.

    def end_connections(self, name: str, older_than_ns: int) -> None:
        """End the connections of a stream that began before a time."""
        self.connections.end(name, older_than_ns)

    def reading(self, tokens: Iterable[str]) -> list[str]:
        """Return those of the sessions that have connections."""
        return [token for token in tokens if self.connections.is_open(token)]

    # With the server.

    @contextlib.asynccontextmanager
    async def running(self, app: ASGIApp, state: Any) -> AsyncGenerator[None, None]:
        """Serve as long as the block lasts, which is within the lifespans of the store and of the SDK.

        Args:
            app: The whole app: what other workers pass on goes through authentication here too.
            state: What the lifespan gave to requests.
        """
        custody = self.custody
        await custody.open()
        folder = await self._store.shared_folder()
        if folder is not None:
            custody.peers = Peers(folder / "peers", custody.own, app, state, self)
            await custody.peers.open()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(keep_house, custody, self._options)
                tasks.start_soon(self._server.watch)
                try:
                    yield
                finally:
                    with anyio.CancelScope(shield=True):
                        self._end_streams()
                        await custody.drain()
                    tasks.cancel_scope.cancel()
        finally:
            if custody.peers is not None:
                with anyio.CancelScope(shield=True):
                    await custody.peers.close()

    def _end_streams(self) -> None:
        """End streams cleanly: the server waits for them before it stops."""
        self.connections.end_all()
        self._forwarding.end_all()

    # Answering.

    def _max_body_bytes(self) -> int:
        return int(getattr(self._endpoint.session_manager, "max_request_body_size", _MAX_BODY_BYTES))

    async def _refuse(self, response: Response, began_s: float, connection: Connection) -> None:
        """Refuse a session or an event, after a time that says nothing of what was found."""
        await asyncio.sleep(max(0.0, began_s + _REFUSAL_S - time.monotonic()))
        await connection.answer(response)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def _response(answer: InnerResponse) -> Response:
    return Response(answer.body, answer.status, media_type="application/json")
