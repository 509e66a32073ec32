"""What happens behind the appends: finished journals go to segments, dead processes' lanes are adopted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from logstore.errors import WriteFailedError
from logstore.storage.commit import GroupCommit
from logstore.storage.latency import Latencies
from logstore.storage.opening import OpenStore
from logstore.storage.tail import Generation, Tail
from logstore.storage.worker import Done, Job, Worker

logger = logging.getLogger("logstore")

_ADOPT_S: Final = 1.0
_FIRST_RETRY_S: Final = 0.1
_LAST_RETRY_S: Final = 5.0
_LOOK_S: Final = 0.2

_TIDY_STREAMS: Final = 500
"""Streams trimmed in one turn of the loop: about a millisecond."""

_T = TypeVar("_T")


class Checkpointer:
    """Runs checkpoints and adoptions of one open log in a thread, one at a time. Used on the event loop.

    Args:
        store: The open files.
        tail: Where the events are.
        commit: Told when there is room in the journals again, or when there will be none.

    Attributes:
        checkpoints: How many there were.
        latencies: How long they took.
    """

    def __init__(self, store: OpenStore, tail: Tail, commit: GroupCommit) -> None:
        self._store = store
        self._tail = tail
        self._commit = commit
        self._worker = Worker("logstore-checkpoint")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running = False
        self._closed = False
        self._retry_s = _FIRST_RETRY_S
        self._done = asyncio.Event()
        self.checkpoints = 0
        self.latencies = Latencies()

    def bind(self) -> None:
        """Serve the running loop; an earlier one must be closed."""
        running = asyncio.get_running_loop()
        if self._loop is not running:
            self._loop = running
            self._worker.bind(running)
            running.call_later(_ADOPT_S, self._adopt)
            self.start()

    def start(self) -> None:
        """Bring finished journals into segments, unless that is going on."""
        if self._running or self._closed:
            return
        generations = self._finished()
        if not generations:
            return
        self._running = True

        def done(error: BaseException | None) -> None:
            self._running = False
            if error is not None:
                self._failed(error)
                return
            self.checkpoints += 1
            # Whoever waits for this one has an event of its own.
            self._done.set()
            self._done = asyncio.Event()
            self._retry_s = _FIRST_RETRY_S
            self._tail.segmented(generations)
            self._tidy()
            self._commit.stuck = None
            self._commit.room_changed()
            self.start()

        self._worker.give(lambda: self._checkpoint(generations), done)

    def _checkpoint(self, generations: list[Generation]) -> None:
        started_s = time.monotonic()
        self._store.checkpoint(self._tail, generations)
        self.latencies.record(time.monotonic() - started_s)

    def _finished(self) -> list[Generation]:
        """Return the generations whose journals are finished, oldest first, without one missing between."""
        generations: list[Generation] = []
        for generation in self._tail.generations:
            if not generation.sealed:
                break
            generations.append(generation)
        return generations

    async def empty(self, prefix: str) -> None:
        """Return when the events are in segments that were added before to streams whose names begin so.

        Raises:
            WriteFailedError: They cannot be brought there.
        """
        await self._commit.flush(prefix)
        newest = self._tail.newest_unsegmented(prefix)
        while newest in self._tail.generations:
            failure = self._commit.failure
            reason = self._commit.stuck if failure is None else failure.reason
            if reason is not None:
                raise WriteFailedError(f"journals cannot be emptied into segments: {reason}")
            self._commit.rotate()
            # Not only after a checkpoint: while the journal fails there may be none.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._done.wait()

    def _tidy(self) -> None:
        if self._tail.tidy(_TIDY_STREAMS) and self._loop is not None:
            self._loop.call_soon(self._tidy)

    def _failed(self, error: BaseException) -> None:
        if self._commit.stuck is None:
            logger.error("journals cannot be emptied into segments, they wait: %s", error, exc_info=error)
        self._commit.stuck = str(error)
        self._commit.room_changed()
        self._retry_s = min(self._retry_s * 2, _LAST_RETRY_S)
        if self._loop is not None and not self._closed:
            self._loop.call_later(self._retry_s, self.start)

    def _adopt(self) -> None:
        """Take over the journals of processes that died, now and then."""
        if self._closed:
            return

        def done(result: int | BaseException) -> None:
            try:
                if isinstance(result, BaseException):
                    raise result
                self._store.lane.advance(result)
            except BaseException as error:
                logger.error("journals of a dead process cannot be adopted, they wait: %s", error)
            if self._loop is not None:
                self._loop.call_later(_ADOPT_S, self._adopt)

        self._worker.give(self._store.adopt_dead_lanes, done)

    def give(self, job: Job, done: Done) -> None:
        """Run a small job in the checkpoint's thread, after what it was given before; `done` gets what it returned."""
        self._worker.give(job, done)

    async def run(self, job: Callable[[], _T]) -> _T:
        """Run a job in the checkpoint's thread, after what it was given before.

        Raises:
            Exception: What the job raised.
        """
        turn: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

        def done(result: Any) -> None:
            if turn.done() or turn.get_loop().is_closed():
                return
            if isinstance(result, BaseException):
                turn.set_exception(result)
            else:
                turn.set_result(result)

        self._worker.give(job, done)
        return await turn

    async def close(self) -> None:
        """Bring everything that the journals hold into segments, and end the thread.

        When that fails the journals stay, for the next opening.
        """
        self.bind()
        self._closed = True
        while self._running:
            await self.run(lambda: None)
        generations = self._finished()
        if generations:
            try:
                await self.run(lambda: self._store.checkpoint(self._tail, generations))
            except Exception as error:
                logger.error("the journals stay as they are, for the next opening: %s", error)
            else:
                self._tail.segmented(generations)
        self._worker.stop()
