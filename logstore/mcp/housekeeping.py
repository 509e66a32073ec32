"""What keeps the sessions of a process in order: done every so often, as long as the app runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import anyio

from logstore.mcp.custody import Custody, LayerOptions

logger = logging.getLogger("logstore.mcp")


async def keep_house(custody: Custody, options: LayerOptions) -> None:
    """Keep the sessions of this process in order, for ever."""
    ttl_s = options.ttl_s
    # Each by itself: a worker that does not react holds some of them up.
    async with anyio.create_task_group() as works:
        works.start_soon(_every, 0.25, custody.adopt_followed)
        works.start_soon(_every, min(1.0, (options.session_idle_s or ttl_s) / 4), custody.park_idle)
        works.start_soon(_every, 1.0, custody.record_again)
        works.start_soon(_every, min(600.0, ttl_s / 24), custody.expire)
        await custody.sweep_sockets()
        works.start_soon(_every, 60.0, custody.sweep_sockets)


async def _every(seconds: float, job: Callable[[], Awaitable[None]]) -> None:
    """Do something every so often, for ever; what fails is logged, and done again the next time."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await job()
        except Exception:
            logger.exception("what keeps sessions in order failed; it is tried again")
