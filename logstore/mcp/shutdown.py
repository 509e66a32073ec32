"""When the HTTP server is told to stop.

An ASGI app hears of it only when all its responses have ended, so responses that never end would hold the server up.
sse-starlette, which the SDK's streams are made with, looks at the server and ends its responses; one that is never sent
anywhere tells us.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus
from starlette.types import Message

_HOURS: Final = 24 * 3600
_PAUSE_S: Final = 0.25
"""Between two looks, while the server goes on being told to stop."""


class ServerWatch:
    """Whether the server was told to stop; for a moment also when another one of this process was.

    Args:
        on_stop: Called when it was, and then again and again.
    """

    def __init__(self, on_stop: Callable[[], None]) -> None:
        self._on_stop = on_stop
        self._until_s = 0.0

    @property
    def is_stopping(self) -> bool:
        """Whether streams that begin now are ended at once."""
        return AppStatus.should_exit or time.monotonic() < self._until_s

    async def watch(self) -> None:
        """Look, for ever."""
        while True:
            response = EventSourceResponse(_nothing(), ping=_HOURS)
            await response({"type": "http", "method": "GET"}, _never, _nowhere)
            self._until_s = time.monotonic() + 4 * _PAUSE_S
            self._on_stop()
            await asyncio.sleep(_PAUSE_S)


async def _nothing() -> AsyncIterator[bytes]:
    await asyncio.get_running_loop().create_future()
    yield b""


async def _never() -> Message:
    await asyncio.get_running_loop().create_future()
    return {}


async def _nowhere(message: Message) -> None:
    pass
