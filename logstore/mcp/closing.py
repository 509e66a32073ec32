"""A tool that closes its stream closes it wherever the client reads it.

The SDK's `close_sse_stream` knows the connections that the SDK serves; a resumed one is the layer's, perhaps on another
worker. `Server.middleware` is where the SDK lets one replace what a handler calls.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from mcp.server.context import ServerRequestContext

from logstore.mcp.scope import current_session
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

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: _Next) -> Any:
        """Serve one message."""
        session = current_session.get()
        if session is None or ctx.close_sse_stream is None or ctx.close_standalone_sse_stream is None:
            return await call_next(ctx)
        name = session.name_of(str(ctx.request_id))
        return await call_next(
            replace(
                ctx,
                close_sse_stream=self._both(ctx.close_sse_stream, name),
                close_standalone_sse_stream=self._both(
                    ctx.close_standalone_sse_stream, session.name_of(STANDALONE_STREAM)
                ),
            )
        )

    def _both(self, close: _Close, name: str) -> _Close:
        async def close_everywhere() -> None:
            await close()
            await self._end_stream(name)

        return close_everywhere
