"""What an open log tells of itself: to its process, and through a small file in its lane to everybody else.

```
lanes/0003/figures.json            of the process that holds the lane, or held it last and died
```

The file is renamed into place and not synced: it must cost nothing, and after a power cut there is nobody left whom it
describes. It is removed when the log is closed; a process that died leaves it, and its free lock says that it is dead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from asyncio import get_running_loop
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from logstore.storage.files import Disk
from logstore.storage.latency import Latency
from logstore.storage.record import MAX_TIME_US
from logstore.storage.worker import Done, Job, Timers
from logstore.version import __version__

logger = logging.getLogger("logstore")

_FILE: Final = "figures.json"
_MOST_BYTES: Final = 64 << 10
_INTERVAL_S: Final = 5.0
_TimeUs = Annotated[int, msgspec.Meta(ge=0, le=MAX_TIME_US)]
_AT_LEAST_EVERY_S: Final = 60.0
"""So that figures older than this tell of a process that hangs, or cannot write."""


class Health(NamedTuple):
    """Whether the log does what its options promise.

    Attributes:
        status: `ok`; `degraded` while events are kept in memory only, or journals cannot be emptied; `failed` while
            appends are refused, or when the store could not be opened; `closed`.
        reason: What failed, None when nothing does.
        since_us: Since when, microseconds since 1970, None when nothing fails or it is not known.
        volatile_events: Events that are in memory only.
    """

    status: Literal["ok", "degraded", "failed", "closed"]
    reason: str | None
    since_us: int | None
    volatile_events: int


class ProcessStats(msgspec.Struct, frozen=True, kw_only=True):
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
        checkpoint_lag_s: Age in seconds of the oldest event that is not in segments, 0 when all are.
        latencies: By operation. `append` is what a caller waits, the queue and the commit: the longest wait of its
            batch, and of appends that write in the call one in 64 is timed. `commit` is a batch's write and sync, in
            `interval` mode the interval's sync. `read` is a page of events, from memory or disk. `checkpoint`.
    """

    appended: int
    commits: int
    checkpoints: int
    cache_hits: int
    cache_misses: int
    volatile_events: int
    memory_bytes: int
    unsegmented_bytes: int
    checkpoint_lag_s: float
    latencies: dict[str, Latency]


class LogStats(ProcessStats, frozen=True, kw_only=True):
    """Figures of one open log, and of the store that it is of.

    Attributes:
        streams: Streams in segments.
        events: Events in segments.
        segment_bytes: Bytes of the segments.
        journal_bytes: Bytes of this log's own journals, which wait to be emptied into segments.
        database_bytes: Bytes of catalogue, journals and segments on disk.
        open_lanes: How many times the store is open, by this process and others.
    """

    streams: int
    events: int
    segment_bytes: int
    journal_bytes: int
    database_bytes: int
    open_lanes: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a process publishes.

    Attributes:
        pid: Its process id.
        incarnation: Of its lane; another one than the lane's: they are those of an earlier holder.
        version: Of this package.
        opened_us: When it opened the store, microseconds since 1970.
        published_us: When it published this.
        status: As `Health`; likewise `reason` and `since_us`.
        stats: Its figures.
    """

    pid: int
    incarnation: int
    version: str
    opened_us: _TimeUs
    published_us: _TimeUs
    status: Literal["ok", "degraded", "failed", "closed"]
    reason: str | None
    since_us: _TimeUs | None
    stats: ProcessStats


_decoder = msgspec.json.Decoder(Figures)


def read_figures(disk: Disk, folder: Path) -> Figures | None:
    """Return what the last holder of a lane published; None when there is nothing, or a crash has spoilt it."""
    try:
        fd = disk.open(folder / _FILE)
    except FileNotFoundError:
        return None
    try:
        return _decoder.decode(disk.read(fd, _MOST_BYTES, 0))
    except (ValueError, RecursionError, msgspec.MsgspecError):
        # Not only what is no JSON: text that is no UTF-8, and nesting without end.
        return None
    finally:
        disk.close(fd)


class Publisher:
    """Publishes the figures of one open log every few seconds while they change. Used on the event loop.

    Args:
        disk: The file door.
        folder: Of the lane.
        incarnation: Of the lane.
        ask: Returns what is to be published.
        give: Runs a job in a thread that may wait for the disk; see `Worker.give`.
    """

    def __init__(
        self,
        disk: Disk,
        folder: Path,
        incarnation: int,
        ask: Callable[[], tuple[Health, ProcessStats]],
        give: Callable[[Job, Done], None],
    ) -> None:
        self._disk = disk
        self._path = folder / _FILE
        self._incarnation = incarnation
        self._ask = ask
        self._give = give
        self._opened_us = time.time_ns() // 1000
        self._timers = Timers()
        self._published: tuple[Health, ProcessStats] | None = None
        self._published_s = 0.0
        self._failing = False

    def bind(self) -> None:
        """Publish from the running loop, now and from now on."""
        self._timers.bind(get_running_loop())
        self._timers.start("publish", 0, self._publish)

    def _publish(self) -> None:
        found = self._ask()
        now_s = time.monotonic()
        if found == self._published and now_s - self._published_s < _AT_LEAST_EVERY_S:
            self._timers.start("publish", _INTERVAL_S, self._publish)
            return
        health, stats = found
        figures = Figures(
            pid=os.getpid(),
            incarnation=self._incarnation,
            version=__version__,
            opened_us=self._opened_us,
            published_us=time.time_ns() // 1000,
            status=health.status,
            reason=health.reason,
            since_us=health.since_us,
            stats=stats,
        )

        def done(error: BaseException | None) -> None:
            if error is None:
                self._published, self._published_s = found, now_s
            elif not self._failing:
                # Who reads them sees by their age that they are not new.
                logger.warning("the figures of this process cannot be published: %s", error)
            self._failing = error is not None
            self._timers.start("publish", _INTERVAL_S, self._publish)

        data = msgspec.json.encode(figures)
        self._give(lambda: self._replace(data), done)

    def _replace(self, data: bytes) -> None:
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        self._disk.unlink(temporary)
        try:
            fd = self._disk.create(temporary)
            try:
                self._disk.write(fd, data, 0)
            finally:
                self._disk.close(fd)
            self._disk.rename(temporary, self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                self._disk.unlink(temporary)
            raise

    def close(self) -> None:
        """Publish nothing more."""
        self._timers.stop()

    def remove(self) -> None:
        """Take back what was published, while the lane is held; blocks, once the thread given at first has ended."""
        # A file that stays is that of a lane that nobody holds.
        with contextlib.suppress(OSError):
            self._disk.unlink(self._path)
