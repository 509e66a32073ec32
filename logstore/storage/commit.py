"""Group commit: whatever queued while the last sync ran goes out as one write and one sync.

The event loop owns all state. It writes what is small itself, and has the kernel sync it; what takes longer, a new file
or a large batch, is a job of the journal's thread, which also syncs where the kernel cannot do it beside the process.
One of them has the journal at a time, so that none needs a lock.

When the disk fails, the file that failed is given up and its events are written again to a new file, under the same
ids, as soon as one can be had. Until then events are volatile: in bounded memory, seen in this process, and told.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Final, NamedTuple

from logstore.errors import StoreClosedError, WriteFailedError
from logstore.storage.batch import Batch
from logstore.storage.journal_work import JournalWork
from logstore.storage.kernel_sync import KernelSync
from logstore.storage.lane import Lane
from logstore.storage.latency import Latencies
from logstore.storage.options import LogOptions
from logstore.storage.record import Event, check_stream_name, encode_frame
from logstore.storage.tail import Generation, StreamTail, Tail
from logstore.storage.unwritten import Unwritten
from logstore.storage.worker import Timers

logger = logging.getLogger("logstore")

_FIRST_RETRY_S: Final = 0.05
_LAST_RETRY_S: Final = 5.0
_REWRITE_EVENTS: Final = 2_000
_SLOW_COMMIT_S: Final = 1.0
_WRITTEN_HERE_BYTES: Final = 256 << 10
"""The largest batch that the loop writes itself: a tenth of a millisecond."""
_SLOW_WRITE_S: Final = 0.02
_NOT_HERE_S: Final = 5.0
"""For so long the journal's thread writes, once a write has kept the loop waiting: the disk is busy."""
_LINGER_S: Final = 0.005
"""For so long events wait for which nobody does, so that those behind them are committed with them."""
_TIMED_ONE_IN: Final = 64
"""Of the appends that write in the call: two looks at the clock cost a hundredth of such a one."""


class Failure(NamedTuple):
    """Why the journal cannot be written, and since when (microseconds since 1970)."""

    reason: str
    since_us: int


class GroupCommit:
    """Takes events from many tasks and makes them durable together.

    Args:
        lane: The lane to write.
        tail: Where events become visible.
        options: Settings.
        seed: Start value of the frames' checksums.
        kernel_sync: Makes what syncs beside the process, on the first loop; without it the journal's thread does.
        others: Returns a number that changes when another lane has written.
        on_visible: Called with the streams of events that became visible.

    Attributes:
        on_sealed: Called when a journal file is finished.
        on_bind: Called when another event loop is served from now on.
        failure: Set while the journal cannot be written.
        stuck: Why journals cannot be emptied into segments, None while they can; set by the checkpoint.
        appended: Events that became visible.
        commits: Batches written.
        last_error: What failed last, also after it mended.
        append_latencies: How long appends waited for their commit.
        commit_latencies: How long writing and syncing a batch took.
    """

    def __init__(
        self,
        lane: Lane,
        tail: Tail,
        options: LogOptions,
        seed: int,
        kernel_sync: Callable[[], KernelSync | None],
        *,
        others: Callable[[], int],
        on_visible: Callable[[Sequence[StreamTail]], None],
    ) -> None:
        self._lane = lane
        self._tail = tail
        self._options = options
        self._seed = seed
        self._others = others
        self._on_visible = on_visible
        self.on_sealed: Callable[[], None] = lambda: None
        self.on_bind: Callable[[], None] = lambda: None
        self._sync_each = options.durability == "always"
        self._raises = options.on_write_failure == "raise"
        self._limit = options.unsegmented_bytes
        self._loop: asyncio.AbstractEventLoop | None = None
        # To see whether the caller's loop is the one that is served: asking for the running loop is a system call in
        # CPython 3.11, which was a tenth of an append.
        self._loop_runs: Callable[[], bool] = lambda: False
        self._thread = 0
        self._turn_s = 0.0
        self._sync_due = False
        self._here_again_s = 0.0
        self._work = JournalWork(lane, kernel_sync, self._schedule)
        self._timers = Timers()
        self._pending = Batch()
        self._in_flight: Batch | None = None
        self._scheduled = False
        # Whether the last commit was of one event: then it is not worth a turn of the loop to wait for others.
        self._alone = False
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False
        self._unwritten = Unwritten(tail, options.volatile_bytes)
        self._retry_s = _FIRST_RETRY_S
        self.failure: Failure | None = None
        self.stuck: str | None = None
        self.appended = 0
        self.commits = 0
        self.last_error: str | None = None
        self.append_latencies = Latencies()
        self.commit_latencies = Latencies()

    # Appending.

    def is_ready(self) -> bool:
        """Whether an event may be added at once; if not, `ready` is to be awaited first."""
        return self._loop_runs() and get_ident() == self._thread and self._room.is_set()

    def add(
        self, stream: str, payload: bytes, flags: int, *, wait: bool = True
    ) -> tuple[int, asyncio.Future[None] | None]:
        """Add one event; return its id and what is done when it is as durable as the options say, None when it is.

        With `wait=False` there is None also where `until_stored` tells it later, unless very much is queued.

        Not a coroutine: one more of them that is entered again after the commit would be a twentieth of an append.
        """
        now_us = time.time_ns() // 1000
        owner = self._tail.streams.get(stream) or self._begin_stream(stream)
        event_id = self._lane.ids.next(now_us)
        frame = encode_frame(Event(event_id, owner.last, now_us, stream, flags, payload), self._seed)
        owner.last = event_id
        if self.failure is not None:
            self._show_volatile([event_id], [frame], [owner])
        elif wait and not self._sync_each and self._can_write_now(event_id):
            self._write_now([event_id], [frame], [owner])
        else:
            pending = self._pending
            pending.ids.append(event_id)
            pending.frames.append(frame)
            pending.owners.append(owner)
            if not (wait or pending.unheard):
                self._timers.start("linger", _LINGER_S, self._want_pending)
            if wait or not pending.takes_unheard(frame):
                return event_id, self._commit_of(pending)
        return event_id, None

    def add_many(self, items: Sequence[tuple[str, bytes, int]]) -> tuple[list[int], asyncio.Future[None] | None]:
        """As `add`, events that are committed together, all of them or none; the ids are in the order given."""
        now_us = time.time_ns() // 1000
        owners = [self._tail.streams.get(stream) or self._begin_stream(stream) for stream, _, _ in items]
        last = {owner: owner.last for owner in owners}
        ids: list[int] = []
        frames: list[bytes] = []
        # Nothing is queued before all of it is encoded: one message that cannot be stored refuses the whole call.
        for owner, (stream, payload, flags) in zip(owners, items, strict=True):
            event_id = self._lane.ids.next(now_us)
            frames.append(encode_frame(Event(event_id, last[owner], now_us, stream, flags, payload), self._seed))
            ids.append(event_id)
            last[owner] = event_id
        for owner, newest in last.items():
            owner.last = newest
        if self.failure is not None:
            self._show_volatile(ids, frames, owners)
        elif not self._sync_each and self._can_write_now(ids[-1]):
            self._write_now(ids, frames, owners)
        else:
            self._pending.add(ids, frames, owners)
            return ids, self._commit_of(self._pending)
        return ids, None

    def _begin_stream(self, name: str) -> StreamTail:
        check_stream_name(name)
        return self._tail.stream(name, self._others())

    async def ready(self) -> None:
        """Take up the running loop, and wait for room in the journal while that helps."""
        if not self._closed:
            self.bind()
        while not (self._room.is_set() or self._closed or self.failure):
            if self.stuck is None:
                await self._room.wait()
            elif not self._work.is_free:
                # What is done to the journal belongs to the file that is given up next: its end must be known.
                await self._settle()
            else:
                self._fail(OSError(f"the journal is full, and cannot be emptied into segments: {self.stuck}"), Batch())
        if self._closed:
            raise StoreClosedError("the store is closed")
        if self.failure is not None and self._raises:
            raise self._refusal()

    def bind(self) -> None:
        """Serve the running loop; an earlier one must be closed."""
        running = asyncio.get_running_loop()
        if self._loop is running:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise StoreClosedError("the store is used from two event loops at once; open one store for each")
        self._loop = running
        self._loop_runs = running.is_running
        self._thread = get_ident()
        # Events belong to the loop that they were first waited for on.
        self._room = asyncio.Event()
        self.room_changed()
        self._work.bind(running)
        self._scheduled = False
        self._timers.bind(running)
        self._want_pending()
        if self._tail.generations:
            self._timers.start("sync", self._options.sync_interval_s, self._start_sync)
            self._timers.start("rotate", self._options.checkpoint_interval_s, self.rotate)
            self._timers.start("rewrite", self._retry_s, self._start_rewrite)
        self.on_bind()

    def is_stored(self, event_id: int) -> bool:
        """Whether an event of this lane is as durable as the options say, or was refused."""
        return self._batch_of(event_id) is None

    async def until_stored(self, event_id: int) -> None:
        """Return when it is."""
        if self._batch_of(event_id) is self._pending:
            self._pending.want()
            if self._sync_each or self._is_turn_due():
                self._schedule()
            else:
                # There is no sync that others could share.
                self._dispatch()
        while (batch := self._batch_of(event_id)) is not None:
            listener: asyncio.Future[None] = asyncio.Future(loop=self._loop)
            batch.listeners.append(listener)
            with contextlib.suppress(WriteFailedError):
                await listener

    def _want_pending(self) -> None:
        if self._pending.ids:
            self._pending.want()
            self._schedule()

    def _batch_of(self, event_id: int) -> Batch | None:
        for batch in (self._pending, self._in_flight):
            if batch is not None and batch.ids and batch.ids[0] <= event_id <= batch.ids[-1]:
                return batch
        return None

    async def flush(self, prefix: str) -> None:
        """Return when the events are stored that were added before to streams whose names begin so."""
        for batch in (self._in_flight, self._pending):
            if batch is not None:
                for owner, event_id in zip(reversed(batch.owners), reversed(batch.ids), strict=True):
                    if owner.name.startswith(prefix):
                        await self.until_stored(event_id)
                        break

    def _commit_of(self, batch: Batch) -> asyncio.Future[None]:
        """Return a future that is done when the batch is committed."""
        waiter: asyncio.Future[None] = asyncio.Future(loop=self._loop)
        batch.want()
        batch.waiters.append(waiter)
        if self._alone and self._work.is_free:
            self._dispatch()
        elif not self._scheduled:
            self._schedule()
        return waiter

    # Committing in batches.

    def _schedule(self) -> None:
        """Hand the queue over, if it is wanted, once every task that runs in this turn of the loop has added to it."""
        if not self._scheduled and self._work.is_free and self._pending.is_wanted and self._loop is not None:
            self._scheduled = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._scheduled = False
        if not (self._work.is_free and self._pending.ids):
            return
        batch = self._in_flight = self._pending
        batch.want()
        self._alone = batch.appends == 1
        sync, self._sync_due = self._sync_each or self._sync_due, False
        started_s = time.monotonic()
        if (
            started_s >= self._here_again_s
            and self._lane.can_write_inline(batch.ids[-1], self._options.journal_file_bytes)
            and sum(map(len, batch.frames)) <= _WRITTEN_HERE_BYTES
        ):
            self._commit_here(batch, sync, started_s)
        else:
            self._pending = Batch()
            self._work.give(lambda: self._commit(batch, sync), lambda result: self._committed(batch, sync, result))

    def _commit_here(self, batch: Batch, sync: bool, started_s: float) -> None:
        """Write one batch in this turn of the loop; for the sync the loop does not wait. Errors are the waiters'."""
        written = functools.partial(self._written, batch, sync, started_s)
        self._pending = Batch()
        try:
            self._lane.write(batch.frames, batch.ids[-1])
            if (now_s := time.monotonic()) - started_s > _SLOW_WRITE_S:
                self._here_again_s = now_s + _NOT_HERE_S
            if sync:
                self._work.sync(written)
            else:
                written(None)
        except BaseException as error:
            # A signal's handler may raise between any two steps: the file is given up then, as after an error of it.
            was_decided = batch.is_decided
            written(error)
            if was_decided or not isinstance(error, Exception):
                raise

    def _written(self, batch: Batch, sync: bool, started_s: float, error: BaseException | None) -> None:
        """Show a batch that the loop has written, and synced if that was wanted; only the first call counts."""
        if batch.is_decided:
            return
        if error is not None:
            self._committed(batch, sync, error)
            return
        try:
            self._lane.show()
            assert self._lane.journal is not None
            ordinal = self._lane.journal.header.number
            self._note_commit(started_s)
        except BaseException as problem:
            self._committed(batch, sync, problem)
            raise
        self._committed(batch, sync, ordinal)

    def _commit(self, batch: Batch, sync: bool) -> int:
        """Write one batch, in the journal's thread, and return the ordinal of the file that has it."""
        lane = self._lane
        started_s = time.monotonic()
        if lane.journal is not None and lane.journal.end >= self._options.journal_file_bytes:
            lane.rotate()
        lane.write(batch.frames, batch.ids[-1])
        assert lane.journal is not None
        if sync:
            lane.sync()
        lane.show()
        self._note_commit(started_s)
        return lane.journal.header.number

    def _note_commit(self, started_s: float) -> None:
        took_s = time.monotonic() - started_s
        self.commit_latencies.record(took_s)
        if took_s > _SLOW_COMMIT_S and self._lane.journal is not None:
            reason = "the disk is slow, or the event loop was kept from its tasks"
            logger.warning("writing or syncing %s took %.1f s: %s", self._lane.journal.path, took_s, reason)

    def _committed(self, batch: Batch, synced: bool, result: int | BaseException) -> None:
        batch.is_decided = True
        self._in_flight = None
        if isinstance(result, BaseException):
            self._fail(result, batch)
            return
        self._show(self._current(result), batch.ids, batch.frames, batch.owners, synced=synced)
        batch.release()
        self.append_latencies.record(time.monotonic() - batch.wanted_s, batch.appends)

    def _current(self, ordinal: int) -> Generation:
        """Return the generation of the file just written; the ones before it are finished."""
        generation = self._tail.generation(ordinal)
        for earlier in self._tail.generations:
            if earlier is not generation and not earlier.sealed:
                self._seal(earlier)
        return generation

    def _seal(self, generation: Generation) -> None:
        generation.synced = len(generation.ids)
        generation.sealed = True
        self.on_sealed()

    def _show(
        self,
        generation: Generation,
        ids: list[int],
        frames: list[bytes],
        owners: list[StreamTail],
        *,
        synced: bool,
    ) -> None:
        """Make events visible that the journal has."""
        self._tail.show(generation, ids, frames, owners)
        self.appended += len(ids)
        self.commits += 1
        if synced:
            generation.synced = len(generation.ids)
        elif self._options.durability == "interval":
            self._timers.start("sync", self._options.sync_interval_s, self._start_sync)
        self._timers.start("rotate", self._options.checkpoint_interval_s, self.rotate)
        if self._tail.unsegmented_bytes > self._limit:
            self._room.clear()
            self.rotate()
        self._on_visible(owners)

    # Writing inside the call, in `interval` and `os` mode: three times the rate of a commit at the end of the turn.

    def _is_turn_due(self) -> bool:
        """Whether the next append must wait for a turn of the loop.

        A task that never waits keeps the loop, and with it the timers, to itself.
        """
        now_s = time.monotonic()
        if now_s - self._turn_s <= self._options.sync_interval_s:
            return False
        self._turn_s = now_s
        self._sync_due = self._options.durability == "interval"
        return True

    def _can_write_now(self, event_id: int) -> bool:
        if self._is_turn_due():
            return False
        file_bytes = self._options.journal_file_bytes
        return self._work.is_free and not self._pending.ids and self._lane.can_write_inline(event_id, file_bytes)

    def _write_now(self, ids: list[int], frames: list[bytes], owners: list[StreamTail]) -> None:
        lane = self._lane
        timed = self.commits % _TIMED_ONE_IN == 0
        started_s = time.monotonic() if timed else 0.0
        try:
            lane.write(frames, ids[-1])
        except BaseException as error:
            batch = Batch()
            batch.add(ids, frames, owners)
            self._fail(error, batch)
            if not isinstance(error, OSError):
                raise
            if self._raises:
                raise self._refusal() from error
            return
        lane.show()
        assert lane.journal is not None
        self._show(self._tail.generation(lane.journal.header.number), ids, frames, owners, synced=False)
        if timed:
            self.append_latencies.record(time.monotonic() - started_s, _TIMED_ONE_IN)

    def _start_sync(self) -> None:
        generations = self._tail.generations
        if self.failure is not None or not generations or generations[-1].sealed:
            return
        if not self._work.is_free:
            self._timers.start("sync", self._options.sync_interval_s, self._start_sync)
            return
        generation = generations[-1]
        started_s = time.monotonic()

        def synced(error: BaseException | None) -> None:
            if error is not None:
                self._fail(error, Batch())
            else:
                generation.synced = len(generation.ids)
                self._note_commit(started_s)

        # Appends queue meanwhile: a write beside a sync could fail into it.
        self._work.sync(synced)

    def rotate(self) -> None:
        """Finish the journal file, so that a checkpoint can take it."""
        generations = self._tail.generations
        if self.failure is not None or not generations or generations[-1].sealed:
            return
        if not self._work.is_free:
            self._timers.start("rotate", _FIRST_RETRY_S, self.rotate)
            return
        self._work.give(self._lane.rotate, self._rotated)

    def _rotated(self, error: BaseException | None) -> None:
        if error is not None:
            self._fail(error, Batch())
            return
        for generation in self._tail.generations:
            if not generation.sealed:
                self._seal(generation)

    def room_changed(self) -> None:
        """Let appends look again whether there is room: a checkpoint has emptied journals, or could not."""
        self._room.set()
        refused = self._closed or (self._raises and self.failure is not None)
        if refused or self._tail.unsegmented_bytes > self._limit:
            self._room.clear()

    # Failing, and coming back.

    @property
    def volatile_events(self) -> int:
        """Events that are in memory only."""
        return len(self._unwritten)

    def _refusal(self) -> WriteFailedError:
        assert self.failure is not None
        return WriteFailedError(f"the event was not stored: {self.failure.reason}")

    def _fail(self, error: BaseException, batch: Batch) -> None:
        """Note that the journal failed, and decide what becomes of everything that it may not hold."""
        if not isinstance(error, OSError):
            logger.error("a commit was broken off", exc_info=error)
        first = self.failure is None
        self.failure = self.failure or Failure(str(error) or repr(error), time.time_ns() // 1000)
        self.last_error = str(error)
        if first and self._lane.journal is not None:
            # The file that is given up goes through the checkpoint even if none of its events are visible: left behind,
            # it would bring what was refused back once the next file, which says where it ends, is gone.
            self._tail.generation(self._lane.journal.header.number)
        for generation in self._unwritten.gather():
            self._seal(generation)
        queued, self._pending = self._pending, Batch()
        for failed in (batch, queued):
            if self._raises:
                for owner in failed.owners:
                    # The refused ids were never shown: the next event must not name one as its predecessor.
                    owner.last = owner.ids[-1] if owner.ids else 0
                    self._tail.drop_empty(owner)
                failed.release(self._refusal())
            else:
                self._show_volatile(failed.ids, failed.frames, failed.owners)
                failed.release()
        if first:
            logger.error(
                "the journal in %s cannot be written: %s. Until it can, %s",
                self._lane.folder,
                error,
                "appends raise" if self._raises else "new events are kept in memory only",
            )
            self._retry_s = _FIRST_RETRY_S
            self._timers.start("rewrite", self._retry_s, self._start_rewrite)
        self.room_changed()

    def _show_volatile(self, ids: list[int], frames: list[bytes], owners: list[StreamTail]) -> None:
        self._unwritten.show(ids, frames, owners)
        self.appended += len(ids)
        self._on_visible(owners)

    def _start_rewrite(self) -> None:
        """Try to write everything that no file holds to a new one."""
        if not self._unwritten.gathering:
            return
        if not self._work.is_free:
            self._timers.start("rewrite", self._retry_s, self._start_rewrite)
            return
        if self.stuck is not None and self._tail.unsegmented_bytes - self._unwritten.memory_bytes > self._limit:
            self._rewritten(0, OSError(self.stuck))
            return
        ids, frames = self._unwritten.copy()
        fresh = self.failure is not None
        last_id = ids[-1] if ids else 0
        self._work.give(lambda: self._rewrite(ids, frames, fresh), lambda result: self._rewritten(last_id, result))

    def _rewrite(self, ids: list[int], frames: list[bytes], fresh: bool) -> int:
        """Write events that no file holds, in the journal's thread; `fresh` to a new file after a failure."""
        lane = self._lane
        if fresh:
            lane.abandon()
        try:
            if fresh:
                lane.begin_rewrite()
            # Without events an empty batch shows whether the disk works.
            for start in range(0, max(1, len(ids)), _REWRITE_EVENTS):
                part = slice(start, start + _REWRITE_EVENTS)
                lane.write(frames[part], ids[part][-1] if ids else 0)
            assert lane.journal is not None
            lane.sync()
            if fresh:
                lane.publish_rewrite()
        except BaseException:
            if fresh:
                lane.discard()
            raise
        lane.show()
        return lane.journal.header.number

    def _rewritten(self, last_id: int, result: int | BaseException) -> None:
        """Go back to normal: new events wait again while those follow that came as the thread wrote."""
        if isinstance(result, BaseException):
            self._retry_s = min(self._retry_s * 2, _LAST_RETRY_S)
            self._unwritten.not_written()
            self._fail(result, Batch())
            self._timers.start("rewrite", self._retry_s, self._start_rewrite)
            return
        if self.failure is not None:
            logger.warning("the journal in %s is written again", self._lane.folder)
            self.failure = None
        for generation in self._unwritten.written(last_id, result):
            self._seal(generation)
        self._start_rewrite()
        self._timers.start("rotate", self._options.checkpoint_interval_s, self.rotate)
        self.room_changed()

    # Closing.

    async def close(self) -> None:
        """Commit what is queued, finish the journal, end the thread.

        A journal that fails to the end leaves what it holds to the next opening; what is in memory only is lost, and
        logged.
        """
        self.bind()
        self._closed = True
        # Who waits for room is woken, and whoever comes now is sent the same way: to be told that the store is closed.
        self.room_changed()
        self._timers.stop()
        await self._settle()
        if self._unwritten.gathering:
            # The last chance: a journal longer than it should be is better than losing what it would hold.
            self.stuck = None
            self._start_rewrite()
            await self._settle()
        if self.volatile_events:
            logger.error("%d events were in memory only and are lost: %s", self.volatile_events, self.last_error)
        self.rotate()
        await self._settle()
        self._work.close()

    async def _settle(self) -> None:
        """Return when nothing is queued and nobody is at the journal."""
        assert self._loop is not None
        while not self._work.is_free or self._pending.ids:
            if self._work.is_free:
                self._dispatch()
            else:
                await self._work.ended()

    def disown(self) -> None:
        """Refuse everything in a forked child, which has neither the thread nor the lane."""
        self._closed = True
        self._room.clear()
