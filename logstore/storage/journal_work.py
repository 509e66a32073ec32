"""What is done to a lane's journal while the event loop goes on: one thing at a time, in a thread or in the kernel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from logstore.storage.kernel_sync import KernelSync
from logstore.storage.lane import Lane
from logstore.storage.worker import Job, Worker


class JournalWork:
    """Has jobs and syncs done to a journal, which the loop leaves alone meanwhile.

    Args:
        lane: Whose journal it is.
        make_kernel_sync: Makes what syncs beside the process, on the first loop; without it the thread does.
        on_free: Called on the loop after each end.

    Attributes:
        is_free: Whether nothing is done to the journal now.
    """

    def __init__(
        self, lane: Lane, make_kernel_sync: Callable[[], KernelSync | None], on_free: Callable[[], None]
    ) -> None:
        self._lane = lane
        self._make_kernel_sync = make_kernel_sync
        self._on_free = on_free
        self._worker = Worker("logstore-journal")
        self._kernel_sync: KernelSync | None = None
        self._is_bound = False
        # What is told the end of what is done now.
        self._ending: Callable[[Any], None] | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self.is_free = True

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell ends to this loop from now on, and those that an earlier one did not live to see."""
        if not self._is_bound:
            self._kernel_sync = self._make_kernel_sync()
            self._is_bound = True
        self._worker.bind(loop)
        if self._kernel_sync is not None:
            try:
                self._kernel_sync.bind(loop)
            except (NotImplementedError, OSError):
                self._drop_kernel_sync()

    def give(self, job: Job, done: Callable[[Any], None]) -> None:
        """Run a job in the thread; `done` is called with what it returned, or with the exception that it raised."""
        self._worker.give(job, self._begin(done))

    def sync(self, done: Callable[[BaseException | None], None]) -> None:
        """Sync the journal, in the kernel where it can, else in the thread; `done` is called, at once for some errors.

        Durable when it is called with None.
        """

        def synced(error: BaseException | None) -> None:
            try:
                if error is None:
                    # The thread has noted it already, which is the same twice.
                    self._lane.synced()
            except BaseException as problem:
                done(problem)
                raise
            done(error)

        end = self._begin(synced)
        if self._kernel_sync is not None:
            try:
                if self._lane.begin_sync(self._kernel_sync, end):
                    return
            except OSError as error:
                end(error)
                return
            except BaseException as error:
                # A signal's handler has raised: what the kernel was asked for is not known.
                self._drop_kernel_sync()
                end(error)
                raise
            self._drop_kernel_sync()
        self._worker.give(self._lane.sync, end)

    def _begin(self, done: Callable[[Any], None]) -> Callable[[Any], None]:
        """Take the journal, until what is returned is called with how it ended."""

        def end(result: Any) -> None:
            if self._ending is not end:
                # Told already.
                return
            self._ending, self.is_free = None, True
            try:
                done(result)
                self._on_free()
            finally:
                waiting, self._waiting = self._waiting, []
                for turn in waiting:
                    if not (turn.done() or turn.get_loop().is_closed()):
                        turn.set_result(None)

        self._ending, self.is_free = end, False
        return end

    def _drop_kernel_sync(self) -> None:
        kernel_sync, self._kernel_sync = self._kernel_sync, None
        if kernel_sync is not None:
            kernel_sync.close()

    async def ended(self) -> None:
        """Return when what is done now has ended; something may be done again."""
        if not self.is_free:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn

    def close(self) -> None:
        """End the thread once its jobs are done."""
        self._worker.stop()
        self._drop_kernel_sync()
