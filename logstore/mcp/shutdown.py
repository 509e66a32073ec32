"""When the HTTP server is told to stop.

An ASGI app hears of it only when all its responses have ended, so responses that never end would hold the server up.
sse-starlette, which the SDK's streams are made with, looks at the server and ends its responses; one that is never sent
anywhere tells us.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from sse_starlette import EventSourceResponse
from starlette.types import Message

_HOURS: Final = 24 * 3600


async def until_server_stops() -> None:
    """Return when the server was told to stop; also when another one of this process was, and then again and again."""
    response = EventSourceResponse(_nothing(), ping=_HOURS)
    await response({"type": "http", "method": "GET"}, _never, _nowhere)


async def _nothing() -> AsyncIterator[bytes]:
    await asyncio.get_running_loop().create_future()
    yield b""


async def _never() -> Message:
    await asyncio.get_running_loop().create_future()
    return {}


async def _nowhere(message: Message) -> None:
    pass
