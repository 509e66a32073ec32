"""Serve an MCP server over HTTP with an event store, each session by itself."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, Protocol, cast
from weakref import WeakValueDictionary

import msgspec
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logstore.errors import ConfigurationError
from logstore.mcp.base import LogEventStore
from logstore.mcp.scope import SessionScope, current_session
from logstore.mcp.scoped_store import ScopedEventStore

logger = logging.getLogger("logstore.mcp")

_SESSION_HEADER: Final = b"mcp-session-id"
_STATELESS: Final = "stateless mode cannot resume: the SDK gives a stateless transport no event store"


class SdkServer(Protocol):
    """An `MCPServer` or a low-level `Server` of the SDK."""

    def streamable_http_app(self, *args: Any, **options: Any) -> Starlette:
        """Return an ASGI app that serves MCP."""
        ...


class FastMcpServer(Protocol):
    """A FastMCP server."""

    def http_app(self, *args: Any, **options: Any) -> Starlette:
        """Return an ASGI app that serves MCP."""
        ...


def resumable_http_app(server: SdkServer | FastMcpServer, store: LogEventStore, **sdk_options: Any) -> Starlette:
    """Return an ASGI app that serves an MCP server and keeps its streams in a store.

    No event of one session reaches another. The store opens and closes with the app's lifespan: where this app is
    mounted under another, that one has to enter `app.router.lifespan_context(app)`.

    Args:
        server: An `MCPServer` or low-level `Server` of the SDK, or a FastMCP server.
        store: Where events are kept.
        **sdk_options: Passed on to `streamable_http_app` of the SDK or `http_app` of FastMCP, such as
            `streamable_http_path` and `path`, `json_response`, `retry_interval`, `transport_security`.

    Raises:
        ConfigurationError: Stateless mode, which gives a transport no store; an `event_store` among the options; a
            store that raises when the disk fails, which would hang the session; a server or store of another kind.
    """
    _check_options(store, sdk_options)
    adapted = hasattr(server, "http_app")
    build = getattr(server, "http_app" if adapted else "streamable_http_app", None)
    if build is None:
        raise ConfigurationError(f"{type(server).__name__} is neither a server of the MCP SDK nor of FastMCP")
    app: Starlette = build(event_store=ScopedEventStore(store, adapted=adapted), **sdk_options)
    endpoint = _wrap_endpoint(app, store)
    if _is_stateless(endpoint):
        raise ConfigurationError(_STATELESS)
    app.router.lifespan_context = _lifespan_with(app, endpoint, store)
    return app


class SessionScoping:
    """ASGI middleware around the MCP endpoint, inside authentication: runs each request in the scope of its session.

    The SDK's tasks for a session start in the request that opens it, and so carry its scope; it goes when they do.
    """

    def __init__(self, app: ASGIApp, store: LogEventStore) -> None:
        self.app = app
        self._store = store
        self._sessions: WeakValueDictionary[str, SessionScope] = WeakValueDictionary()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        session_id = _session_id_in(scope["headers"])
        session = None if session_id is None else self._sessions.get(_key_of(session_id))
        if session is None:
            # It opens a session, or names one that the SDK will not know either.
            session = SessionScope()
        if session_id is None:
            send = self._binding(session, send)
        elif scope["method"] == "DELETE":
            send = self._ending(session_id, session, send)
        token = current_session.set(session)
        try:
            await self.app(scope, receive, send)
        finally:
            current_session.reset(token)

    def _binding(self, session: SessionScope, send: Send) -> Send:
        async def bind_first(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                session_id = _session_id_in(message.get("headers", ()))
                if session_id is not None:
                    await self._bind(session_id, session)
            await send(message)

        return bind_first

    async def _bind(self, session_id: str, session: SessionScope) -> None:
        """Make a session known before its client is: the next request may come at once."""
        key = _key_of(session_id)
        self._sessions[key] = session
        try:
            data = msgspec.json.encode({"scope": session.token})
            await self._store.session_opened(key, data, session.name_of(""))
        except Exception:
            # The session lives in this process all the same.
            logger.exception("a session could not be recorded")

    def _ending(self, session_id: str, session: SessionScope, send: Send) -> Send:
        async def end_first(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self._sessions.pop(_key_of(session_id), None)
                session.end()
                try:
                    await self._store.session_ended(_key_of(session_id))
                except Exception:
                    logger.exception("the end of a session could not be recorded")
            await send(message)

        return end_first


def _check_options(store: LogEventStore, sdk_options: dict[str, Any]) -> None:
    if not isinstance(store, LogEventStore):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(f"the store must be one of logstore's, not {type(store).__name__}")
    if "event_store" in sdk_options:
        raise ConfigurationError("event_store is the second argument of resumable_http_app, not an option")
    if sdk_options.get("stateless_http"):
        raise ConfigurationError(_STATELESS)
    if store.raises_on_write_failure:
        raise ConfigurationError(
            "on_write_failure must be degrade here: an exception ends the SDK's message router, and every later call "
            "of the session hangs"
        )


def _is_stateless(endpoint: Any) -> bool:
    # FastMCP makes its session manager when the lifespan begins, from settings of its own.
    return endpoint.session_manager is not None and bool(endpoint.session_manager.stateless)


def _wrap_endpoint(app: Starlette, store: LogEventStore) -> Any:
    """Put `SessionScoping` around the MCP endpoint, inside the middleware that authenticates; return the endpoint."""
    for route in app.routes:
        holder: Any = route
        endpoint: Any = getattr(route, "app", None)
        while endpoint is not None and not hasattr(endpoint, "session_manager"):
            holder, endpoint = endpoint, getattr(endpoint, "app", None)
        if endpoint is None:
            continue
        holder.app = SessionScoping(endpoint, store)
        return endpoint
    raise ConfigurationError("the app has no streamable HTTP endpoint; only that transport can resume")


def _lifespan_with(app: Starlette, endpoint: Any, store: LogEventStore) -> Any:
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[Any, None]:
        async with store, cast("AbstractAsyncContextManager[Any]", inner(app)) as state:
            stateless = _is_stateless(endpoint)
            if not stateless:
                yield state
        if stateless:
            # Raised inside, it would come out wrapped in the group of the manager's tasks.
            raise ConfigurationError(_STATELESS)

    return lifespan


def _session_id_in(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    return next((value.decode("latin-1") for name, value in headers if name.lower() == _SESSION_HEADER), None)


def _key_of(session_id: str) -> str:
    """Return what stands for a session id wherever it is kept: without authentication the id itself is a secret."""
    return hashlib.sha256(session_id.encode("latin-1")).hexdigest()
