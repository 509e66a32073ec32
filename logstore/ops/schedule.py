"""Maintenance of a store while it runs.

Every process that has the store open looks now and then; locks see to it that one of them does the work, for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from typing import Final

from logstore.config import EventStoreConfig
from logstore.errors import LogstoreError
from logstore.ops.maintenance import Tasks, run_round
from logstore.ops.verify.scrub import Scrub
from logstore.storage import Log
from logstore.storage.opening import OpenStore

logger = logging.getLogger("logstore")

_IDLE_SEGMENT_S: Final = 60.0
"""A stream that was silent as long gives up its open segment, so that compaction may have it."""
_SCRUB_BYTES_S: Final = 1 << 20
"""Rate at which segments are read through for damage, in bytes a second: a terabyte in twelve days."""


class Schedule:
    """Runs rounds of maintenance beside an open log. Used on the event loop.

    Args:
        log: The open log.
        tasks: What is to be done.
        interval_s: Time between the end of a round and the next.

    Attributes:
        rounds: How many have ended.
    """

    def __init__(self, log: Log, tasks: Tasks, interval_s: float) -> None:
        self._log = log
        self._tasks = tasks
        self._interval_s = interval_s
        self._running: asyncio.Task[None] | None = None
        self.rounds = 0

    @classmethod
    def of(cls, config: EventStoreConfig, log: Log) -> Schedule:
        """Return the schedule that a configuration asks for."""
        return cls(log, Tasks.of(config, log.path), config.maintenance_interval_s)

    def start(self) -> None:
        """Begin; the first round comes after the interval."""
        self._running = asyncio.get_running_loop().create_task(self._run(), name="logstore-schedule")

    async def stop(self) -> None:
        """End; a round under way goes on in its thread, and the closing of the log waits for it."""
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self._log.maintain(self._round)
            except Exception:
                # Nobody waits for this task: ended by an error it would leave the store to grow.
                logger.exception("a round of maintenance failed, the next one tries again")
            self.rounds += 1

    def _round(self, store: OpenStore) -> None:
        """Do what is due, unless another process is at it or has just been."""
        path = store.root / "maintenance.lock"
        lock = store.disk.lock(path)
        if lock is None:
            return
        with lock:
            # Also when the clock stepped back.
            if 0 <= time.time() - path.stat().st_mtime < self._interval_s / 2 and self.rounds:
                return
            self._work(store)
            os.utime(path)

    def _work(self, store: OpenStore) -> None:
        try:
            store.seal_idle_segments(time.time_ns() // 1000 - int(_IDLE_SEGMENT_S * 1_000_000))
            self._scrub(store)
        except (LogstoreError, OSError, sqlite3.Error) as error:
            logger.warning("segments could not be sealed or read through, the next round tries again: %s", error)
        run_round(store, self._tasks)

    def _scrub(self, store: OpenStore) -> None:
        """Read on through the segments."""
        with contextlib.closing(Scrub(store)) as scrub:
            scrub.step(int(_SCRUB_BYTES_S * self._interval_s))
