"""Serve an MCP server over HTTP with an event store, each session by itself."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, Protocol, cast

from starlette.applications import Starlette

from logstore.errors import ConfigurationError
from logstore.mcp.base import LogEventStore
from logstore.mcp.closing import StreamClosing
from logstore.mcp.custody import LayerOptions
from logstore.mcp.layer import ResumeLayer
from logstore.mcp.scoped_store import ScopedEventStore

_STATELESS: Final = "stateless mode cannot resume: the SDK gives a stateless transport no event store"
_FOREVER_S: Final = 1e9
"""To FastMCP None means its own setting."""


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


def resumable_http_app(
    server: SdkServer | FastMcpServer,
    store: LogEventStore,
    *,
    session_idle_s: float | None = 1800.0,
    session_ttl_hours: float = 24.0,
    drain_s: float = 10.0,
    **sdk_options: Any,
) -> Starlette:
    """Return an ASGI app that serves an MCP server, and resumes its sessions and streams from a store.

    On any worker that has the same store open, after any restart, and for nobody but the client whose session it is.
    The store opens and closes with the app's lifespan: where this app is mounted under another, that one has to enter
    `app.router.lifespan_context(app)`. `logstore/docs/deploying.md` tells what is promised, and what cannot be.

    Args:
        server: An `MCPServer` or low-level `Server` of the SDK, or a FastMCP server.
        store: Where events and sessions are kept.
        session_idle_s: After this many seconds without a request, a running call or a reader a session leaves memory;
            it comes back with its next request. None keeps all.
        session_ttl_hours: A session that nobody used for this long is ended.
        drain_s: What running calls may take to finish when the server stops; then they end with an error.
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
    options = LayerOptions(session_idle_s, session_ttl_hours, drain_s, sdk_options.get("retry_interval"))
    if "session_idle_timeout" in inspect.signature(build).parameters:
        # The SDK's timer does not see who reads a session through the log.
        sdk_options["session_idle_timeout"] = _FOREVER_S if adapted else None
    app: Starlette = build(event_store=ScopedEventStore(store, adapted=adapted), **sdk_options)
    layer, endpoint = _wrap_endpoint(app, store, options)
    if _is_stateless(endpoint):
        raise ConfigurationError(_STATELESS)
    if not adapted:
        cast("Any", server).middleware.append(StreamClosing(layer.end_stream))
    app.router.lifespan_context = _lifespan_with(app, endpoint, layer, store)
    return app


def _check_options(store: LogEventStore, sdk_options: dict[str, Any]) -> None:
    if not isinstance(store, LogEventStore):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(f"the store must be one of logstore's, not {type(store).__name__}")
    if "event_store" in sdk_options:
        raise ConfigurationError("event_store is the second argument of resumable_http_app, not an option")
    if "session_idle_timeout" in sdk_options:
        raise ConfigurationError("say session_idle_s: the SDK's session_idle_timeout does not see who reads a session")
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


def _wrap_endpoint(app: Starlette, store: LogEventStore, options: LayerOptions) -> tuple[ResumeLayer, Any]:
    """Put the layer around the MCP endpoint, inside the middleware that authenticates; return both."""
    for route in app.routes:
        holder: Any = route
        endpoint: Any = getattr(route, "app", None)
        while endpoint is not None and not hasattr(endpoint, "session_manager"):
            holder, endpoint = endpoint, getattr(endpoint, "app", None)
        if endpoint is None:
            continue
        layer = holder.app = ResumeLayer(endpoint, store, options)
        return layer, endpoint
    raise ConfigurationError("the app has no streamable HTTP endpoint; only that transport can resume")


def _lifespan_with(app: Starlette, endpoint: Any, layer: ResumeLayer, store: LogEventStore) -> Any:
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[Any, None]:
        stateless = False
        try:
            async with store, cast("AbstractAsyncContextManager[Any]", inner(app)) as state:
                stateless = _is_stateless(endpoint)
                if not stateless:
                    async with layer.running(app, state):
                        yield state
        except RuntimeError as error:
            # The SDK's older releases refuse an idle timeout in this mode, in words of their own.
            stateless = "supported in stateless mode" in str(error)
            if not stateless:
                raise
        if stateless:
            # Raised inside, it would come out wrapped in the group of the manager's tasks.
            raise ConfigurationError(_STATELESS)

    return lifespan
