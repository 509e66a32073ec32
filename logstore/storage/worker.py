"""What works beside the tasks of an event loop: a thread with results back on the loop, and timers."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

Job = Callable[[], Any]
Done = Callable[[Any], None]
"""Called on the loop with what the job returned, or with the exception that it raised."""


class Worker:
    """Runs jobs in the order given.

    A queue and one thread: an executor's hop costs a commit a third more, 260 against 188 µs.

    Args:
        name: Name of the thread, as debuggers show it.
    """

    def __init__(self, name: str) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: queue.SimpleQueue[tuple[Job, Done] | None] = queue.SimpleQueue()
        self._results: deque[tuple[Done, Any]] = deque()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bring results to this loop from now on, and those that an earlier one did not live to see."""
        self._loop = loop
        self._drain()

    def give(self, job: Job, done: Done) -> None:
        """Queue a job."""
        self._jobs.put((job, done))

    def stop(self) -> None:
        """End the thread once its jobs are done."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (given := self._jobs.get()) is not None:
            job, done = given
            try:
                result = job()
            except BaseException as error:
                result = error
            self._results.append((done, result))
            # Closures hold what they worked on; while the thread waits nothing should.
            del given, job, done, result
            # The loop may be closed already: the next one drains.
            with contextlib.suppress(RuntimeError):
                if self._loop is not None:
                    self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        while self._results:
            done, result = self._results.popleft()
            done(result)


class Timers:
    """Timers by name, at most one of a name set at a time; they end with their loop, or with `stop`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._set: dict[str, asyncio.TimerHandle] = {}

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run on this loop from now on; what was set on an earlier one is forgotten."""
        self._loop = loop
        self._set.clear()

    def start(self, name: str, delay_s: float, action: Callable[[], None]) -> None:
        """Run an action later, unless one of that name waits already, or the loop is closed."""
        if name in self._set or self._loop is None or self._loop.is_closed():
            return

        def fire() -> None:
            del self._set[name]
            action()

        self._set[name] = self._loop.call_later(delay_s, fire)

    def stop(self) -> None:
        """Cancel what is set, and set nothing more."""
        for timer in self._set.values():
            timer.cancel()
        self._set.clear()
        self._loop = None
