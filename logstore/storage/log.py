"""The engine's face: append, read, follow, sessions, statistics."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sqlite3
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from logstore.errors import DamageError, GapError, StoreClosedError, UnknownEventError, WriteFailedError
from logstore.storage.catalogue import StreamSummary
from logstore.storage.checkpointer import Checkpointer
from logstore.storage.commit import Failure, GroupCommit
from logstore.storage.figures import Health, LogStats, ProcessStats, Publisher
from logstore.storage.files import Disk
from logstore.storage.follow import Followers
from logstore.storage.foreign import Foreign
from logstore.storage.header import frame_seed
from logstore.storage.ids import parse_event_id
from logstore.storage.lane import is_held, lane_folders
from logstore.storage.latency import Latencies
from logstore.storage.opening import OpenStore, log_folder
from logstore.storage.options import LogOptions
from logstore.storage.reader import Reader, contiguous
from logstore.storage.record import FIRST_PAGE_EVENTS, FLAG_FINAL, Event, decode_frame, decode_stamp, next_page_events
from logstore.storage.sessions import Sessions
from logstore.storage.tail import Tail

_T = TypeVar("_T")


class _Standing(NamedTuple):
    """What differs once a stream may have grown without the own tail showing it.

    Attributes:
        others: What other lanes had written, see `Foreign.moves`.
        evictions: The own tail's: what came since may have left it again.
    """

    others: int
    evictions: int


class Log:
    """A durable log of streams, shared by the processes that open it.

    One `Log` serves one event loop at a time. Nothing touches the disk before `open`, which the first call does by
    itself.

    Args:
        path: The catalogue; the log lies beside it, `events-log/` for `events.db`.
        options: Settings.
        disk: The file door.
    """

    def __init__(self, path: str | Path, options: LogOptions | None = None, disk: Disk | None = None) -> None:
        self.path = Path(path)
        self.options = options or LogOptions()
        self._disk = disk or Disk()
        self._tail = Tail(self.options.cache_bytes, self.options.cached_events_per_stream)
        self._parts: _Parts | None = None
        self._opening: asyncio.Future[OpenStore] | None = None
        self._not_opened: Failure | None = None
        self._closing: asyncio.Future[None] | None = None
        self._closed = False
        self._disowned = False
        self._hits = 0
        self._misses = 0
        self._read_latencies = Latencies()
        self.sessions = Sessions(self._session_parts)

    @property
    def folder(self) -> Path:
        """The folder of the log, which all processes share that have the store open."""
        return log_folder(self.path)

    # Opening and closing.

    async def open(self) -> None:
        """Open the store, made when there is none; what dead processes left is recovered first. Idempotent.

        Raises:
            NotAStoreError: The path cannot hold a store.
            FormatVersionError: A newer release wrote it.
            StoreLockedError: A restore is under way, or all lanes are in use.
            DamageError: The registry is damaged.
            WriteFailedError: The disk refuses.
            StoreClosedError: The log was closed before.
        """
        if self._closed:
            raise StoreClosedError(f"the store {self.path} is closed")
        if self._parts is None:
            store = await self._opened_files()
            if self._closed:
                # `close` waits for the same files and gives them back.
                raise StoreClosedError(f"the store {self.path} is closed")
            if self._parts is None:
                try:
                    self._parts = _Parts(store, self._tail, self.options, self._disk, self._published)
                except OSError as error:
                    # The other lanes cannot be looked at; the files stay open for the next try.
                    self._note_not_opened(error)
                    raise WriteFailedError(f"the store {self.path} cannot be opened: {error}") from error
                _open_logs.add(self)
        self._parts.bind()

    async def _opened_files(self) -> OpenStore:
        """Open the files once, for all who ask; a caller that is cancelled leaves that to the others, or to `close`."""
        # An earlier loop may have ended before it was done.
        if self._opening is None or self._opening.cancelled():
            opening = asyncio.to_thread(OpenStore, self._disk, self.path, self.options.segment_bytes)
            self._opening = asyncio.ensure_future(opening)
        try:
            store = await asyncio.shield(self._opening)
        except Exception as error:
            self._opening = None
            self._note_not_opened(error)
            raise
        self._not_opened = None
        return store

    def _note_not_opened(self, error: Exception) -> None:
        since_us = self._not_opened.since_us if self._not_opened else time.time_ns() // 1000
        self._not_opened = Failure(str(error), since_us)

    async def close(self) -> None:
        """Commit and checkpoint everything, and give the lane back. Idempotent.

        On return every event that is not volatile is in segments; when that fails, in journals that the next opening
        recovers.
        """
        self._closed = True
        if self._disowned:
            return
        # One task, that a cancelled caller does not end half-way, and whose end every caller waits for.
        if self._closing is None or self._closing.cancelled():
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self.sessions.close()
        if self._parts is not None:
            await self._parts.close()
            _open_logs.discard(self)
        elif self._opening is not None:
            try:
                store = await asyncio.shield(self._opening)
            except Exception:
                # Whoever opened it has been told.
                return
            await asyncio.to_thread(store.close, empty=True)

    async def __aenter__(self) -> Log:
        """Open the store."""
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the store."""
        await self.close()

    def _opened(self) -> _Parts:
        if self._parts is None or self._closed:
            raise StoreClosedError(f"the store {self.path} is {'closed' if self._closed else 'not open yet'}")
        return self._parts

    async def _ready(self) -> _Parts:
        await self.open()
        return self._opened()

    async def _session_parts(self) -> tuple[OpenStore, Checkpointer]:
        parts = await self._ready()
        return parts.store, parts.checkpointer

    # Appending.

    async def append(self, stream: str, payload: bytes, flags: int = 0) -> str:
        """Append one event and return its id.

        On return the event is as durable as the options say: on disk with `always`, handed to the operating system
        with `interval` and `os`. While the disk fails and the policy is `degrade`, it is in memory only; see `health`.

        Args:
            stream: Name of the stream: 1 to 512 bytes of UTF-8 without control characters.
            payload: What to store.
            flags: `FLAG_…` bits of `record`.

        Raises:
            InvalidStreamError: The name cannot be stored.
            InvalidMessageError: The event is larger than 64 MiB.
            WriteFailedError: The disk failed and the policy is `raise`.
            StoreClosedError: The log was closed.
        """
        commit = (self._parts or await self._ready()).commit
        if not commit.is_ready():
            await commit.ready()
        event_id, committed = commit.add(stream, payload, flags)
        if committed is not None:
            await committed
        return str(event_id)

    def add(
        self, stream: str, payload: bytes, flags: int = 0, *, wait: bool = True
    ) -> tuple[int, asyncio.Future[None] | None] | None:
        """Take an event without waiting; return its id and what is to be awaited, None where nothing is.

        The event is stored, as durably as `append` says, when that is done. For who appends for others: a coroutine
        less, a fifteenth of an append.

        Args:
            stream: As `append`.
            payload: As `append`.
            flags: As `append`.
            wait: False for who asks `is_stored` later, before anybody is shown the id: nothing is to be awaited then,
                unless about a mebibyte is queued.

        Returns:
            None when there is something to wait for first, as before the first call: then `append` is to be used.

        Raises:
            InvalidStreamError, InvalidMessageError, WriteFailedError: As `append`.
        """
        parts = self._parts
        if parts is None or not parts.commit.is_ready():
            return None
        return parts.commit.add(stream, payload, flags, wait=wait)

    def is_stored(self, event_id: int) -> bool:
        """Whether an event of this log is stored, as durably as `append` says, or was refused.

        While the disk fails and the policy is `degrade` it is in memory.
        """
        return self._parts is None or self._parts.commit.is_stored(event_id)

    async def until_stored(self, event_id: int) -> None:
        """Return when it is."""
        if self._parts is not None:
            await self._parts.commit.until_stored(event_id)

    async def append_many(self, items: Sequence[tuple[str, bytes, int]]) -> list[str]:
        """Append events `(stream, payload, flags)` in one commit and return their ids in the order given.

        Durable on return, and errors, as `append`; all of them are stored or none.
        """
        commit = (self._parts or await self._ready()).commit
        if not items:
            return []
        if not commit.is_ready():
            await commit.ready()
        ids, committed = commit.add_many(items)
        if committed is not None:
            await committed
        return list(map(str, ids))

    # Reading.

    async def stream_of(self, event_id: str) -> str | None:
        """Return the stream of an event, or None for an id that the store does not have or never wrote.

        Raises:
            DamageError: The catalogue, or a journal of another process, cannot be read.
        """
        parts = await self._ready()
        number = parse_event_id(event_id)
        if number is None:
            return None
        return self._tail.stream_of(number) or await parts.read(parts.reader.stream_of, number)

    async def read(self, stream: str, after: str | None = None, limit: int = 1000) -> list[Event]:
        """Return a stream's first events after an id, in order; none when there is nothing after it.

        Args:
            stream: Name of the stream.
            after: Id of the last event that the reader holds; None to read from the oldest kept one.
            limit: Most events to return.

        Raises:
            UnknownEventError: `after` is not an event id.
            GapError: The next event existed and is gone; what comes before a gap is returned first.
            DamageError: The catalogue, or a journal of another process, cannot be read.
        """
        parts = await self._ready()
        start = 0 if after is None else parse_event_id(after)
        if start is None:
            raise UnknownEventError(f"{str(after)[:40]!r} is not an event id")
        return (await self._page(parts, stream, start, limit))[0]

    async def _page(self, parts: _Parts, stream: str, start: int, limit: int) -> tuple[list[Event], _Standing | None]:
        """As `read`; and, when it is known that nothing was behind them, how all stood before the disk was asked."""
        started_s = time.monotonic()
        owner = self._tail.streams.get(stream)
        own: list[bytes] = []
        lost = 0
        if owner is not None:
            own, lost = owner.after(start, limit), owner.lost
        end: _Standing | None = None
        if start and owner is not None and owner.covers(start) and parts.foreign.moves() == owner.others:
            self._hits += 1
            found = [decode_frame(frame) for frame in own]
        else:
            self._misses += 1
            before = self._standing(parts)
            found, is_last = await parts.read(parts.reader.read, stream, start, limit, own)
            end = before if is_last else None
        self._read_latencies.record(time.monotonic() - started_s)
        if lost > start:
            found, end = [event for event in found if event.id <= lost], None
            if not found:
                raise GapError(stream, str(start), "events were in memory only, and too many while the disk failed")
        events = contiguous(stream, start, found)
        return events, end if len(events) == len(found) else None

    async def resume(self, after: str) -> tuple[str, AsyncGenerator[list[Event], None]] | None:
        """Return the stream of an event, and what comes after it, page by page up to the newest; each has an event.

        None for an id that the store does not have or never wrote.

        Raises:
            GapError, DamageError: As `read`, here and from the generator.
            StoreClosedError: The log was closed, here and from the generator.
        """
        parts = await self._ready()
        number = parse_event_id(after)
        if number is None:
            return None
        stream = self._tail.stream_of(number)
        if stream is None:
            started_s = time.monotonic()
            before = self._standing(parts)
            is_own = self._tail.streams.__contains__
            found = await parts.read(parts.reader.resume, number, FIRST_PAGE_EVENTS, is_own)
            if found is None:
                return None
            stream, page = found
            if page is not None:
                self._misses += 1
                self._read_latencies.record(time.monotonic() - started_s)
                events = contiguous(stream, number, page.events)
                is_last = page.is_last and len(events) == len(page.events)
                return stream, self._pages(stream, events, before if is_last else None)
        # The log may have been closed meanwhile, and the other lanes with it.
        parts = await self._ready()
        return stream, self._pages(stream, *await self._page(parts, stream, number, FIRST_PAGE_EVENTS))

    async def _pages(
        self, stream: str, events: list[Event], end: _Standing | None
    ) -> AsyncGenerator[list[Event], None]:
        """Yield a page, and those that follow."""
        while events:
            yield events
            # The stream may have grown while its last page was sent. When nothing has, the disk need not be asked.
            parts, last = await self._ready(), events[-1].id
            owner = self._tail.streams.get(stream)
            if end is not None and end == self._standing(parts) and (owner is None or not owner.has_after(last)):
                return
            events, end = await self._page(parts, stream, last, next_page_events(events))

    def _standing(self, parts: _Parts) -> _Standing:
        return _Standing(parts.foreign.moves(), self._tail.evictions)

    async def unanswered(self, prefix: str) -> list[str]:
        """Return the streams of requests that have no answer yet, whose names begin with a prefix.

        Of streams that live processes write only those that are in segments already.

        Raises:
            DamageError: The catalogue cannot be read.
        """
        parts = await self._ready()
        with self._index_errors():
            found = await parts.read(parts.store.catalogue.unanswered, prefix)
        return [stream for stream, last_id in found if not await self._is_answered(stream, str(last_id))]

    async def _is_answered(self, stream: str, after: str) -> bool:
        """Whether a stream's last event, which comes after this one or is it, is an answer."""
        last: Event | None = None
        while events := await self.read(stream, after):
            last = events[-1]
            after = last.event_id
        return last is not None and bool(last.flags & FLAG_FINAL)

    async def follow(self, stream: str, after: str | None = None) -> AsyncIterator[Event]:
        """Yield a stream's events after an id, then those to come, each once and in order, until the log is closed.

        Events of other processes arrive within 50 ms of their commit.

        Raises:
            GapError: As `read`.
        """
        parts = await self._ready()
        limit = FIRST_PAGE_EVENTS
        with parts.followers.subscribed(stream) as wake:
            while not self._closed:
                wake.clear()
                events = await self.read(stream, after, limit)
                for event in events:
                    yield event
                if events:
                    after, limit = events[-1].event_id, next_page_events(events)
                else:
                    await wake.wait()

    def disown(self) -> None:
        """Refuse everything from here on, in a forked child: its parent goes on writing."""
        self._closed = self._disowned = True
        if self._parts is not None:
            self._parts.commit.disown()

    async def maintain(self, job: Callable[[OpenStore], _T]) -> _T:
        """Run a job on the open files in a thread of its own, one after another, beside everything else.

        `close` waits for it; a job that takes long looks at `OpenStore.stopping`.

        Raises:
            Exception: What the job raised.
        """
        parts = await self._ready()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(parts.maintenance_thread, job, parts.store)

    # Telling.

    def health(self) -> Health:
        """Return whether the log keeps its promises at this moment."""
        if self._parts is None and self._not_opened is not None and not self._closed:
            return Health("failed", *self._not_opened, 0)
        if self._parts is None or self._closed:
            return Health("closed", None, None, 0)
        commit = self._parts.commit
        if commit.failure is not None:
            refused = self.options.on_write_failure == "raise"
            return Health("failed" if refused else "degraded", *commit.failure, commit.volatile_events)
        if commit.stuck is not None:
            return Health("degraded", f"journals cannot be emptied: {commit.stuck}", None, commit.volatile_events)
        if commit.volatile_events:
            # The disk is back, the last of them are being written.
            return Health("degraded", commit.last_error, None, commit.volatile_events)
        return Health("ok", None, None, 0)

    def stream_summaries(self) -> list[StreamSummary]:
        """Return the totals of every stream, those events included that are not in segments yet.

        Raises:
            DamageError: The catalogue cannot be read.
        """
        catalogue = self._opened().store.catalogue
        with self._index_errors():
            totals = {summary.stream: summary for summary in catalogue.summaries()}
        fresh: dict[str, list[bytes]] = {}
        for generation in self._tail.generations:
            for owner, frame in zip(generation.owners, generation.frames, strict=True):
                fresh.setdefault(owner.name, []).append(frame)
        for stream, frames in fresh.items():
            known = totals.get(stream)
            # Of some the checkpoint has committed what the tail does not know yet.
            events = [event for event in map(decode_frame, frames) if known is None or event.id > int(known.last_id)]
            if not events:
                continue
            totals[stream] = StreamSummary(
                stream=stream,
                events=(known.events if known else 0) + len(events),
                first_id=known.first_id if known else events[0].event_id,
                last_id=events[-1].event_id,
                first_time_us=known.first_time_us if known else events[0].time_us,
                last_time_us=events[-1].time_us,
                bytes=(known.bytes if known else 0) + sum(map(len, frames[-len(events) :])),
            )
        return list(totals.values())

    def stats(self) -> LogStats:
        """Return figures of this open log.

        Raises:
            DamageError: The catalogue cannot be read.
        """
        parts = self._opened()
        store = parts.store
        with self._index_errors():
            streams, events, segment_bytes = store.catalogue.totals()
        folders = [folder for number, folder in lane_folders(self._disk, store.root) if number != store.lane.number]
        return LogStats(
            **msgspec.structs.asdict(self._process_stats(parts)),
            streams=streams,
            events=events,
            segment_bytes=segment_bytes,
            journal_bytes=_size_of(store.lane.folder.glob("*.journal")),
            database_bytes=_size_on_disk(self.path, store.root),
            open_lanes=1 + sum(is_held(self._disk, folder) for folder in folders),
        )

    def _process_stats(self, parts: _Parts) -> ProcessStats:
        commit, checkpointer = parts.commit, parts.checkpointer
        oldest = next((generation.frames[0] for generation in self._tail.generations if generation.frames), None)
        age_us = 0 if oldest is None else time.time_ns() // 1000 - decode_stamp(oldest).time_us
        return ProcessStats(
            appended=commit.appended,
            commits=commit.commits,
            checkpoints=checkpointer.checkpoints,
            cache_hits=self._hits,
            cache_misses=self._misses,
            volatile_events=commit.volatile_events,
            memory_bytes=self._tail.bytes,
            unsegmented_bytes=self._tail.unsegmented_bytes,
            checkpoint_lag_s=max(0, age_us) / 1_000_000,
            latencies={
                "append": commit.append_latencies.summary(),
                "commit": commit.commit_latencies.summary(),
                "read": self._read_latencies.summary(),
                "checkpoint": checkpointer.latencies.summary(),
            },
        )

    def _published(self) -> tuple[Health, ProcessStats]:
        return self.health(), self._process_stats(self._opened())

    @contextlib.contextmanager
    def _index_errors(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DamageError(
                self.path,
                0,
                0,
                f"SQLite says: {error}. An open store makes a damaged index again within seconds; "
                f"if this one does not, run `logstore reindex {self.path}`",
            ) from error


class _Parts:
    """Everything that an open log works with."""

    def __init__(
        self,
        store: OpenStore,
        tail: Tail,
        options: LogOptions,
        disk: Disk,
        published: Callable[[], tuple[Health, ProcessStats]],
    ) -> None:
        seed = frame_seed(store.store_id)
        self.store = store
        self.foreign = foreign = Foreign(disk, store.root, store.lane.number)
        self.reader = Reader(disk, store.root, store.catalogue, foreign, seed, options.retention)
        # One thread reads: its journals of other lanes need no lock, and reads of one stream cannot overtake.
        self._read_thread = ThreadPoolExecutor(1, thread_name_prefix="logstore-read")
        self.maintenance_thread = ThreadPoolExecutor(1, thread_name_prefix="logstore-maintenance")
        self.followers = Followers(foreign, self._read_thread)
        self.commit = GroupCommit(
            store.lane,
            tail,
            options,
            seed,
            disk.kernel_sync,
            # What was seen last is enough: a move since then only sends the next read to the disk.
            others=lambda: foreign.moves_seen,
            on_visible=self.followers.grown,
        )
        self.checkpointer = Checkpointer(store, tail, self.commit)
        # In the checkpoint's thread: figures that wait behind one are late, an append is not.
        self.publisher = Publisher(disk, store.lane.folder, store.lane.incarnation, published, self.checkpointer.give)
        self.commit.on_sealed = self.checkpointer.start
        self.commit.on_bind = self._bind_others
        self._tail = tail

    def bind(self) -> None:
        """Serve the running loop; an earlier one must be closed."""
        self.commit.bind()

    def _bind_others(self) -> None:
        self.checkpointer.bind()
        self.followers.bind()
        self.publisher.bind()

    async def read(self, question: Callable[..., _T], *arguments: Any) -> _T:
        """Ask something of the disk in the thread that reads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._read_thread, functools.partial(question, *arguments))

    async def close(self) -> None:
        """Finish in order: the journal, its way into segments, the readers, the files."""
        self.publisher.close()
        self.store.stopping.set()
        await self.commit.close()
        self.followers.close()
        await asyncio.to_thread(self.maintenance_thread.shutdown, cancel_futures=True)
        await self.checkpointer.close()
        await self.read(self.foreign.close)
        self._read_thread.shutdown()
        await asyncio.to_thread(self.publisher.remove)
        await asyncio.to_thread(self.store.close, empty=not self._tail.generations)


def _size_on_disk(path: Path, root: Path) -> int:
    """Return the bytes of everything that belongs to a store."""
    files = [path, path.with_name(f"{path.name}-wal")]
    for folder, _, names in os.walk(root):
        files += [Path(folder, name) for name in names]
    return _size_of(files)


def _size_of(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            # Checkpointed since the look at its folder.
            continue
    return total


_open_logs: weakref.WeakSet[Log] = weakref.WeakSet()


def is_serving() -> bool:
    """Whether a log is open in this process: whatever else runs in it shares the interpreter lock with its appends."""
    return bool(_open_logs)


def _disown_in_child() -> None:
    for log in list(_open_logs):
        log.disown()


os.register_at_fork(after_in_child=_disown_in_child)
