"""What keeps the sessions of a process in order: done every so often, as long as the app runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from logstore.mcp.custody import Custody, LayerOptions

logger = logging.getLogger("logstore.mcp")

_TICK_S: Final = 0.25


async def keep_house(custody: Custody, options: LayerOptions) -> None:
    """Keep the sessions of this process in order, for ever."""
    ttl_s = options.ttl_s
    works = [
        _Work(_TICK_S, custody.adopt_followed),
        _Work(min(1.0, (options.session_idle_s or ttl_s) / 4), custody.park_idle),
        _Work(1.0, custody.record_again),
        _Work(min(600.0, ttl_s / 24), custody.expire),
    ]
    if custody.peers is not None:
        works.append(_Work(60.0, custody.sweep_sockets))
        await custody.sweep_sockets()
    while True:
        await asyncio.sleep(min(work.every_s for work in works))
        for work in works:
            await work.do_if_due()


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
