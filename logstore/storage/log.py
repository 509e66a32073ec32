"""The engine's face: append, read, follow, sessions, statistics."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

from logstore.errors import GapError, StoreClosedError, UnknownEventError
from logstore.storage.catalogue import StreamSummary
from logstore.storage.commit import GroupCommit
from logstore.storage.files import Disk
from logstore.storage.foreign import Foreign
from logstore.storage.header import frame_seed
from logstore.storage.ids import parse_event_id
from logstore.storage.opening import OpenStore
from logstore.storage.options import LogOptions
from logstore.storage.reader import Reader, contiguous
from logstore.storage.record import Event, decode_frame
from logstore.storage.registry import Session
from logstore.storage.tail import StreamTail, Tail
from logstore.storage.worker import Worker

logger = logging.getLogger("logstore")

_LOOK_AT_OTHERS_S: Final = 0.02
"""How often a process with followers looks whether other lanes have grown: four mapped words, microseconds."""
_ADOPT_S: Final = 1.0
_FIRST_RETRY_S: Final = 0.1
_LAST_RETRY_S: Final = 5.0

_T = TypeVar("_T")


class Health(NamedTuple):
    """Whether the log does what its options promise.

    Attributes:
        status: `ok`; `degraded` while events are kept in memory only, or journals cannot be emptied; `closed`.
        reason: What failed, None when nothing does.
        since_us: Since when, microseconds since 1970, None when nothing fails.
        volatile_events: Events that are in memory only.
    """

    status: Literal["ok", "degraded", "closed"]
    reason: str | None
    since_us: int | None
    volatile_events: int


class LogStats(NamedTuple):
    """Figures of one open log, since it was opened.

    Attributes:
        appended: Events appended.
        commits: Batches written to the journal.
        checkpoints: Times that journals were emptied into segments.
        cache_hits: Reads served from memory alone.
        cache_misses: Reads that went to the disk.
        volatile_events: Events that are in memory only, now.
        memory_bytes: Memory of tail and cache, now.
        unsegmented_bytes: Memory of the events that are in journals only, now.
        streams: Streams in segments.
        events: Events in segments.
        segment_bytes: Bytes of the segments.
        database_bytes: Bytes of catalogue, journals and segments on disk.
    """

    appended: int
    commits: int
    checkpoints: int
    cache_hits: int
    cache_misses: int
    volatile_events: int
    memory_bytes: int
    unsegmented_bytes: int
    streams: int
    events: int
    segment_bytes: int
    database_bytes: int


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
        self._store: OpenStore | None = None
        self._opening: asyncio.Lock | None = None
        self._closed = False
        self._hits = 0
        self._misses = 0
        self._checkpoints = 0
        self._checkpointing = False
        self._retry_s = _FIRST_RETRY_S
        self._followers: dict[str, set[asyncio.Event]] = {}
        self._seen_moves = 0
        self._looking = False
        self.sessions = Sessions(self)

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
        if self._store is not None:
            self._commit.bind()
            return
        if self._opening is None:
            self._opening = asyncio.Lock()
        async with self._opening:
            if self._closed:
                raise StoreClosedError(f"the store {self.path} is closed")
            if self._store is None:
                store = await asyncio.to_thread(OpenStore, self._disk, self.path, self.options.segment_bytes)
                self._start(store)

    def _start(self, store: OpenStore) -> None:
        self._foreign = foreign = Foreign(self._disk, store.root, store.lane.number)
        seed = frame_seed(store.store_id)
        self._reader = Reader(self._disk, store.root, store.catalogue, self._foreign, seed)
        # One thread reads: its journals of other lanes need no lock, and reads of one stream cannot overtake.
        self._read_thread = ThreadPoolExecutor(1, thread_name_prefix="logstore-read")
        self._checkpoint_worker = Worker("logstore-checkpoint")
        self._commit = GroupCommit(
            store.lane,
            self._tail,
            self.options,
            seed,
            # What was seen last is enough: a move since then only sends the next read to the disk.
            others=lambda: foreign.moves_seen,
            on_visible=self._wake_followers,
            on_sealed=self._start_checkpoint,
        )
        self._commit.bind()
        self._checkpoint_worker.bind(asyncio.get_running_loop())
        self._seen_moves = self._foreign.moves()
        self._store = store
        _open_logs.add(self)
        self._later(_ADOPT_S, self._adopt)

    async def close(self) -> None:
        """Commit and checkpoint everything, and give the lane back. Idempotent.

        On return every event that is not volatile is in segments; when that fails, in journals that the next opening
        recovers.
        """
        if self._closed:
            return
        self._closed = True
        store = self._store
        if store is None:
            return
        await self._commit.close()
        for event in [event for events in self._followers.values() for event in events]:
            event.set()
        while self._checkpointing:
            await self._checkpoint_turn(lambda: None)
        generations = [generation for generation in self._tail.generations if generation.sealed]
        if generations:
            try:
                await self._checkpoint_turn(lambda: store.checkpoint(self._tail, generations))
            except Exception as error:
                logger.error("the journals stay as they are, for the next opening: %s", error)
            else:
                self._tail.segmented(generations)
        await asyncio.get_running_loop().run_in_executor(self._read_thread, self._foreign.close)
        self._read_thread.shutdown()
        self._checkpoint_worker.stop()
        await asyncio.to_thread(store.close, empty=not self._tail.generations)
        _open_logs.discard(self)

    async def __aenter__(self) -> Log:
        """Open the store."""
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the store."""
        await self.close()

    def _opened(self) -> OpenStore:
        if self._store is None or self._closed:
            raise StoreClosedError(f"the store {self.path} is {'closed' if self._closed else 'not open yet'}")
        return self._store

    async def _ready(self) -> OpenStore:
        await self.open()
        self._checkpoint_worker.bind(asyncio.get_running_loop())
        return self._opened()

    # Appending.

    async def append(self, stream: str, payload: bytes, flags: int = 0) -> str:
        """Append one event and return its id.

        On return the event is as durable as the options say: on disk with `always`, handed to the operating system
        with `interval` and `os`. While the disk fails and the policy is `degrade`, it is in memory only; see `health`.

        Args:
            stream: Name of the stream: 1 to 512 bytes of UTF-8, printable.
            payload: What to store.
            flags: `FLAG_…` bits of `record`.

        Raises:
            InvalidStreamError: The name cannot be stored.
            InvalidMessageError: The event is larger than 64 MiB.
            WriteFailedError: The disk failed and the policy is `raise`.
            StoreClosedError: The log was closed.
        """
        if self._store is None:
            await self.open()
        return str(await self._commit.append(stream, payload, flags))

    async def append_many(self, items: Sequence[tuple[str, bytes, int]]) -> list[str]:
        """Append events `(stream, payload, flags)` in one commit and return their ids in the order given.

        Durable on return, and errors, as `append`; all of them are stored or none.
        """
        if self._store is None:
            await self.open()
        return [str(event_id) for event_id in await self._commit.append_many(items)]

    # Reading.

    async def stream_of(self, event_id: str) -> str | None:
        """Return the stream of an event, or None for an id that the store does not have or never wrote."""
        await self._ready()
        number = parse_event_id(event_id)
        if number is None:
            return None
        return self._tail.stream_of(number) or await self._read(self._reader.stream_of, number)

    async def read(self, stream: str, after: str | None = None, limit: int = 1000) -> list[Event]:
        """Return a stream's first events after an id, in order; none when there is nothing after it.

        Args:
            stream: Name of the stream.
            after: Id of the last event that the reader holds; None to read from the oldest kept one.
            limit: Most events to return.

        Raises:
            UnknownEventError: `after` is not an event id.
            GapError: The next event existed and is gone; what comes before a gap is returned first.
            DamageError: The catalogue cannot be read.
        """
        await self._ready()
        start = 0 if after is None else parse_event_id(after)
        if start is None:
            raise UnknownEventError(f"{after!r} is not an event id")
        owner = self._tail.streams.get(stream)
        own: list[bytes] = []
        if owner is not None:
            if owner.lost > start:
                raise GapError(stream, str(start), "events were in memory only, and too many while the disk failed")
            own = owner.after(start, limit)
            if start and owner.covers(start) and self._foreign.moves() == owner.others:
                self._hits += 1
                return contiguous(stream, start, [decode_frame(frame) for frame in own])
        self._misses += 1
        return contiguous(stream, start, await self._read(self._reader.read, stream, start, limit, own))

    async def follow(self, stream: str, after: str | None = None) -> AsyncIterator[Event]:
        """Yield a stream's events after an id, then those to come, each once and in order, until the log is closed.

        Events of other processes arrive within 50 ms of their commit.

        Raises:
            GapError: As `read`.
        """
        await self._ready()
        wake = asyncio.Event()
        # Subscribed before the first read: what is appended in between wakes the follower, it is not missed.
        self._followers.setdefault(stream, set()).add(wake)
        self._look_at_others()
        try:
            while not self._closed:
                wake.clear()
                while events := await self.read(stream, after):
                    for event in events:
                        yield event
                    after = events[-1].event_id
                if not self._closed:
                    await wake.wait()
        finally:
            waiting = self._followers[stream]
            waiting.discard(wake)
            if not waiting:
                del self._followers[stream]

    async def _read(self, question: Callable[..., _T], *arguments: Any) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._read_thread, functools.partial(question, *arguments))

    def _wake_followers(self, owners: Sequence[StreamTail]) -> None:
        if self._followers:
            self._wake({owner.name for owner in owners})

    def _wake(self, streams: set[str]) -> None:
        for stream in streams & self._followers.keys():
            for event in self._followers[stream]:
                event.set()

    def _look_at_others(self) -> None:
        """Wake followers when another process has written, again and again while there are any."""
        if self._looking or self._closed or not self._followers:
            return
        moves = self._foreign.moves()
        if moves == self._seen_moves:
            self._later(_LOOK_AT_OTHERS_S, self._look_at_others)
            return
        self._seen_moves = moves
        self._looking = True

        def done(grown: asyncio.Future[tuple[set[str], bool]]) -> None:
            self._looking = False
            if not grown.cancelled() and grown.exception() is None:
                streams, missed = grown.result()
                self._wake(set(self._followers) if missed else streams)
            self._later(_LOOK_AT_OTHERS_S, self._look_at_others)

        loop = asyncio.get_running_loop()
        loop.run_in_executor(self._read_thread, self._foreign.read_on).add_done_callback(done)

    # In the background.

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        if not self._closed:
            asyncio.get_running_loop().call_later(delay_s, action)

    def _start_checkpoint(self) -> None:
        """Bring finished journals into segments, unless that is going on."""
        store = self._store
        if self._checkpointing or self._closed or store is None:
            return
        generations = []
        for generation in self._tail.generations:
            if not generation.sealed:
                break
            generations.append(generation)
        if not generations:
            return
        self._checkpointing = True

        def done(error: BaseException | None) -> None:
            self._checkpointing = False
            if error is None:
                self._checkpoints += 1
                self._retry_s = _FIRST_RETRY_S
                self._tail.segmented(generations)
                self._commit.stuck = None
                self._commit.room_changed()
                self._start_checkpoint()
            else:
                if self._commit.stuck is None:
                    logger.error("journals cannot be emptied into segments: %s", error, exc_info=error)
                self._commit.stuck = str(error)
                self._commit.room_changed()
                self._retry_s = min(self._retry_s * 2, _LAST_RETRY_S)
                self._later(self._retry_s, self._start_checkpoint)

        self._checkpoint_worker.give(lambda: store.checkpoint(self._tail, generations), done)

    async def _checkpoint_turn(self, job: Callable[[], _T]) -> _T:
        """Run a job in the checkpoint's thread, after what it was given before."""
        loop = asyncio.get_running_loop()
        self._checkpoint_worker.bind(loop)
        turn: asyncio.Future[_T] = loop.create_future()

        def done(result: Any) -> None:
            if isinstance(result, BaseException):
                turn.set_exception(result)
            else:
                turn.set_result(result)

        self._checkpoint_worker.give(job, done)
        return await turn

    def _adopt(self) -> None:
        """Take over the journals of processes that died, now and then."""
        store = self._store
        if self._closed or store is None:
            return

        def done(result: int | BaseException) -> None:
            if isinstance(result, BaseException):
                logger.error("journals of a dead process cannot be adopted: %s", result)
            else:
                store.lane.ids.advance(result)
            self._later(_ADOPT_S, self._adopt)

        self._checkpoint_worker.give(store.adopt_dead_lanes, done)

    def _disown(self) -> None:
        """Refuse everything in a forked child: its parent goes on writing."""
        self._closed = True
        if self._store is not None:
            self._commit.disown()

    # Telling.

    def health(self) -> Health:
        """Return whether the log keeps its promises at this moment."""
        if self._store is None or self._closed:
            return Health("closed", None, None, 0)
        commit = self._commit
        if commit.failure is not None:
            return Health("degraded", commit.failure.reason, commit.failure.since_us, commit.volatile_events)
        if commit.stuck is not None:
            return Health("degraded", f"journals cannot be emptied: {commit.stuck}", None, commit.volatile_events)
        return Health("ok", None, None, commit.volatile_events)

    def stream_summaries(self) -> list[StreamSummary]:
        """Return the totals of every stream, those events included that are not in segments yet."""
        store = self._opened()
        totals = {summary.stream: summary for summary in store.catalogue.summaries()}
        fresh: dict[str, list[bytes]] = {}
        for generation in self._tail.generations:
            for owner, frame in zip(generation.owners, generation.frames, strict=True):
                fresh.setdefault(owner.name, []).append(frame)
        for stream, frames in fresh.items():
            first, last = decode_frame(frames[0]), decode_frame(frames[-1])
            known = totals.get(stream)
            if known is not None and int(known.last_id) >= first.id:
                # The checkpoint committed and the tail does not know yet.
                continue
            totals[stream] = StreamSummary(
                stream=stream,
                events=(known.events if known else 0) + len(frames),
                first_id=known.first_id if known else first.event_id,
                last_id=last.event_id,
                first_time_us=known.first_time_us if known else first.time_us,
                last_time_us=last.time_us,
                bytes=(known.bytes if known else 0) + sum(map(len, frames)),
            )
        return list(totals.values())

    def stats(self) -> LogStats:
        """Return figures of this open log."""
        store = self._opened()
        streams, events, segment_bytes = store.catalogue.totals()
        return LogStats(
            appended=self._commit.appended,
            commits=self._commit.commits,
            checkpoints=self._checkpoints,
            cache_hits=self._hits,
            cache_misses=self._misses,
            volatile_events=self._commit.volatile_events,
            memory_bytes=self._tail.bytes,
            unsegmented_bytes=self._tail.unsegmented_bytes,
            streams=streams,
            events=events,
            segment_bytes=segment_bytes,
            database_bytes=_size_on_disk(self.path, store.root),
        )


class Sessions:
    """Which process serves which session; see `Registry`. Reached as `Log.sessions`."""

    def __init__(self, log: Log) -> None:
        self._log = log

    async def open(self, key: str, data: bytes) -> Session:
        """Add a session that this process serves; on return it is on disk.

        Args:
            key: A hash that it is found by; the catalogue shows it.
            data: What to find again.
        """
        store = await self._log._ready()
        registry, incarnation = store.registry, store.lane.incarnation
        return await asyncio.to_thread(registry.open_session, key, incarnation, time.time_ns() // 1000, data)

    async def find(self, key: str) -> Session | None:
        """Return a session that has not ended."""
        store = await self._log._ready()
        return await asyncio.to_thread(store.registry.find, key)

    async def end(self, key: str) -> None:
        """End a session; on return that is on disk."""
        store = await self._log._ready()
        now_us = time.time_ns() // 1000
        await asyncio.to_thread(store.registry.end_session, key, store.lane.incarnation, now_us)

    async def take_over(self, key: str) -> Session | None:
        """Serve a session from here on, if its owner is dead.

        On return the owner's events are recovered, and ids drawn here are above all of them.

        Returns:
            The session; its `incarnation` tells whether it is this process's now. None when it has ended.
        """
        store = await self._log._ready()

        def take() -> tuple[Session | None, int]:
            session = store.registry.find(key)
            if session is None or store.is_alive(session.incarnation):
                return session, 0
            highest = store.adopt_dead_lanes()
            now_us = time.time_ns() // 1000
            session = store.registry.take_over(key, session.incarnation, store.lane.incarnation, now_us)
            return session, max(highest, store.highest_reserved())

        session, floor = await self._log._checkpoint_turn(take)
        if session is not None and session.incarnation == store.lane.incarnation:
            store.lane.ids.advance(floor)
        return session


def _size_on_disk(path: Path, root: Path) -> int:
    """Return the bytes of everything that belongs to a store."""
    files = [path, path.with_name(f"{path.name}-wal")]
    for folder, _, names in os.walk(root):
        files += [Path(folder, name) for name in names]
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            # Checkpointed since the look at its folder.
            continue
    return total


_open_logs: weakref.WeakSet[Log] = weakref.WeakSet()


def _disown_in_child() -> None:
    for log in list(_open_logs):
        log._disown()


os.register_at_fork(after_in_child=_disown_in_child)
