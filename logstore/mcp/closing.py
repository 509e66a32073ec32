"""A tool that closes its stream closes it wherever the client reads it.

The SDK's `close_sse_stream` knows the connections that the SDK serves; a resumed one is the layer's, perhaps on another
worker. `Server.middleware` is where the SDK lets one replace what a handler calls.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from mcp.server.context import ServerRequestContext

from logstore.mcp.scope import SessionScope, current_session
from logstore.mcp.sdk import STANDALONE_STREAM

_Close = Callable[[], Awaitable[None]]
_Next = Callable[[ServerRequestContext[Any, Any]], Awaitable[Any]]


class StreamClosing:
    """Middleware of the SDK's servers.

    Args:
        end_stream: Ends the connections that carry a stream, by its name in the log.
    """

    def __init__(self, end_stream: Callable[[str], Awaitable[None]]) -> None:
        self._end_stream = end_stream

    def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: _Next) -> Awaitable[Any]:
        """Serve one message."""
        session = current_session.get()
        if session is not None and ctx.close_sse_stream is not None and ctx.close_standalone_sse_stream is not None:
            # In place, and without a coroutine of its own: this runs for every request, and few tools close anything.
            ctx.close_sse_stream = partial(self._close, ctx.close_sse_stream, session, str(ctx.request_id))
            ctx.close_standalone_sse_stream = partial(
                self._close, ctx.close_standalone_sse_stream, session, STANDALONE_STREAM
            )
        return call_next(ctx)

    async def _close(self, close: _Close, session: SessionScope, stream_id: str) -> None:
        await close()
        await self._end_stream(session.name_of(stream_id))
