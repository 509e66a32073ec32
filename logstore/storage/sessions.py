"""Which process serves which session, as the engine's face shows it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

from logstore.storage.checkpointer import Checkpointer
from logstore.storage.opening import OpenStore
from logstore.storage.registry import Session


class Sessions:
    """The sessions of a store; see `Registry`. Reached as `Log.sessions`.

    Args:
        ready: Opens the store when it is not open, and returns it with its checkpointer.
        sync: Returns when everything that was acknowledged is on disk.
    """

    def __init__(
        self,
        ready: Callable[[], Awaitable[tuple[OpenStore, Checkpointer]]],
        sync: Callable[[], Awaitable[None]],
    ) -> None:
        self._ready = ready
        self._sync = sync

    async def incarnation(self) -> int:
        """Return what this opening of the store is called as an owner."""
        store, _ = await self._ready()
        return store.lane.incarnation

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

    async def all(self) -> list[Session]:
        """Return every session that has not ended, oldest first."""
        store, _ = await self._ready()
        return await asyncio.to_thread(store.registry.sessions)

    async def end(self, key: str, *, unchanged_since_us: int | None = None) -> None:
        """End a session; on return that is on disk.

        Args:
            key: The session.
            unchanged_since_us: End it only if its last change is not after this, in microseconds since 1970.
        """
        store, _ = await self._ready()
        now_us = time.time_ns() // 1000
        incarnation = store.lane.incarnation
        await asyncio.to_thread(
            store.registry.end_session, key, incarnation, now_us, unchanged_since_us=unchanged_since_us
        )

    async def release(self, key: str) -> None:
        """Let whoever is asked for a session of this process next take it over; on return that is on disk.

        The caller writes nothing to its streams any more.
        """
        store, _ = await self._ready()
        # Or a power cut could take these events, and leave those that the next owner appends behind them.
        await self._sync()
        await asyncio.to_thread(store.registry.release, key, store.lane.incarnation, time.time_ns() // 1000)

    async def touch(self, key: str) -> None:
        """Renew the time of the last change of a session of this process."""
        store, _ = await self._ready()
        own = store.lane.incarnation
        await asyncio.to_thread(store.registry.take_over, key, own, own, time.time_ns() // 1000)

    async def unserved(self, keys: Iterable[str]) -> set[str]:
        """Return those of the sessions whose owner is dead."""
        store, _ = await self._ready()

        def look() -> set[str]:
            found = [session for key in keys if (session := store.registry.find(key)) and not session.released]
            dead = {owner for owner in {each.incarnation for each in found} if not store.is_alive(owner)}
            return {session.key for session in found if session.incarnation in dead}

        return await asyncio.to_thread(look)

    async def is_alive(self, incarnation: int) -> bool:
        """Whether the opening with this incarnation still has the store open."""
        store, _ = await self._ready()
        return await asyncio.to_thread(store.is_alive, incarnation)

    async def take_over(self, key: str) -> Session | None:
        """Serve a session from here on, if its owner is dead or has released it.

        On return the owner's events are recovered, and ids drawn here are above all of them.

        Returns:
            The session; its `incarnation` tells whether it is this process's now. None when it has ended.
        """
        store, checkpointer = await self._ready()

        def take() -> tuple[Session | None, int]:
            session = store.registry.find(key)
            if session is None:
                return None, 0
            if not session.released:
                if store.is_alive(session.incarnation):
                    return session, 0
                store.recover_lane_of(session.incarnation)
            now_us = time.time_ns() // 1000
            session = store.registry.take_over(key, session.incarnation, store.lane.incarnation, now_us)
            return session, store.highest_reserved()

        # In the checkpoint's thread: it is the one that adopts lanes.
        session, floor = await checkpointer.run(take)
        store.lane.ids.advance(floor)
        return session
