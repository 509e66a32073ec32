"""Which process serves which session, as the engine's face shows it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from logstore.storage.checkpointer import Checkpointer
from logstore.storage.opening import OpenStore
from logstore.storage.registry import Session


class Sessions:
    """The sessions of a store; see `Registry`. Reached as `Log.sessions`.

    Args:
        ready: Opens the store when it is not open, and returns it with its checkpointer.
    """

    def __init__(self, ready: Callable[[], Awaitable[tuple[OpenStore, Checkpointer]]]) -> None:
        self._ready = ready

    async def open(self, key: str, data: bytes, stream_prefix: str = "") -> Session:
        """Add a session that this process serves; on return it is on disk.

        Args:
            key: A hash that it is found by; the catalogue shows it.
            data: What to find again.
            stream_prefix: What the names of its streams, and of no others, begin with: when the session has ended,
                retention drops them.
        """
        store, _ = await self._ready()
        now_us = time.time_ns() // 1000
        incarnation = store.lane.incarnation
        return await asyncio.to_thread(store.registry.open_session, key, incarnation, now_us, data, stream_prefix)

    async def find(self, key: str) -> Session | None:
        """Return a session that has not ended."""
        store, _ = await self._ready()
        return await asyncio.to_thread(store.registry.find, key)

    async def end(self, key: str) -> None:
        """End a session; on return that is on disk."""
        store, _ = await self._ready()
        now_us = time.time_ns() // 1000
        await asyncio.to_thread(store.registry.end_session, key, store.lane.incarnation, now_us)

    async def take_over(self, key: str) -> Session | None:
        """Serve a session from here on, if its owner is dead.

        On return the owner's events are recovered, and ids drawn here are above all of them.

        Returns:
            The session; its `incarnation` tells whether it is this process's now. None when it has ended.
        """
        store, checkpointer = await self._ready()

        def take() -> tuple[Session | None, int]:
            session = store.registry.find(key)
            if session is None or store.is_alive(session.incarnation):
                return session, 0
            store.recover_lane_of(session.incarnation)
            now_us = time.time_ns() // 1000
            session = store.registry.take_over(key, session.incarnation, store.lane.incarnation, now_us)
            return session, store.highest_reserved()

        # In the checkpoint's thread: it is the one that adopts lanes.
        session, floor = await checkpointer.run(take)
        store.lane.ids.advance(floor)
        return session
