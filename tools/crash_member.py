"""A process of the campaign of many processes: it writes, reads and follows until it is killed, and checks what comes.

What it is to serve it hears on a pipe, a line each: `serve SLOT ID…`, `release SLOT`, `quiet`, `write`, `compact`,
`back-up`, `clock MILLISECONDS` behind, `stop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

from crash_chores import compact_eagerly
from crash_kill import BrokenPromiseError
from crash_ledger import (
    ID_BYTES,
    RECORD,
    STREAMS_A_SLOT,
    Mark,
    Track,
    name_of,
    payload_of,
    streams_of,
    tasks_of,
)
from crash_writer import POLL_S
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget
from logstore.storage import Log, LogOptions

_TAKE_OVER_S: Final = 240.0
_BATCHES: Final = (1, 1, 1, 1, 2, 3, 8, 20, 60, 100)
_WEIGHTS: Final = (3, 1)
"""Of a task's streams: the first grows faster."""
_LOOK_PAUSE_S: Final = 0.05
_clock: Final = time.time_ns


@dataclass(frozen=True)
class Follow:
    """A stream to follow: after an event, or from its beginning with 0."""

    stream: int
    after: int


@dataclass(frozen=True)
class Sample:
    """Events of a stream that were acknowledged before the process began."""

    stream: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Orders:
    """What a process is told when it begins.

    Attributes:
        path: The catalogue of the store.
        pool: Where it puts backups.
        reports: Where processes report what was acknowledged to them, and shown.
        life: Number of the process, never used twice.
        seed: What sizes and streams are drawn from.
        options: How it opens the store.
        behind_ms: How far its clock is behind the machine's, in milliseconds, when it begins.
        follows: What it follows.
        samples: What it looks for.
    """

    path: Path
    pool: Path
    reports: Path
    life: int
    seed: int
    options: LogOptions
    behind_ms: int
    follows: tuple[Follow, ...]
    samples: tuple[Sample, ...]


def report_path(reports: Path, life: int) -> Path:
    """Return the file to which a process reports what was acknowledged to it."""
    return reports / f"{life}.acknowledged"


def shown_path(reports: Path, life: int, place: int) -> Path:
    """Return the file to which a process reports what its n-th follower was shown."""
    return reports / f"{life}-{place}.shown"


def counts_path(reports: Path, life: int) -> Path:
    """Return the file to which a process writes what it counts, a line each."""
    return reports / f"{life}.counts"


def set_clock_back(milliseconds: int) -> None:
    """Have this process see a clock that is behind the machine's: one that was set back, or put right again."""
    time.__dict__["time_ns"] = lambda: _clock() - milliseconds * 1_000_000


def live(orders: Orders, commands: int) -> None:
    """Do as is told until the process is killed, or told to stop."""
    set_clock_back(orders.behind_ms)
    asyncio.run(_Member(orders, commands).live())


class _Member:
    def __init__(self, orders: Orders, commands: int) -> None:
        self._orders = orders
        self._commands = commands
        self._heard: asyncio.Queue[str] = asyncio.Queue()
        self._half_line = ""
        self._log = Log(orders.path, orders.options)
        self._report = _report_to(report_path(orders.reports, orders.life))
        self._counts = _report_to(counts_path(orders.reports, orders.life))
        self._quiet = False
        self._stopping = False
        self._released: set[int] = set()
        self._changed = asyncio.Event()
        self._writers: dict[int, list[asyncio.Task[None]]] = {}
        self._beside: list[asyncio.Task[None]] = []
        self._rng = random.Random(f"{orders.seed} {orders.life}")

    async def live(self) -> None:
        asyncio.get_running_loop().add_reader(self._commands, self._hear)
        async with self._log, asyncio.TaskGroup() as tasks:
            self._beside += [tasks.create_task(self._follow(n, each)) for n, each in enumerate(self._orders.follows)]
            self._beside.append(tasks.create_task(self._look()))
            while (command := await self._heard.get()) != "stop":
                self._obey(tasks, *command.split())
            self._stopping = True
            self._tell_writers()
            # A compaction ends early when the log is closed; who waited for it here would wait for all of it.
            for task in self._beside:
                task.cancel()

    def _hear(self) -> None:
        data = os.read(self._commands, 1 << 16)
        if not data:
            # The campaign is gone.
            os._exit(0)
        *lines, self._half_line = (self._half_line + data.decode()).split("\n")
        for line in lines:
            self._heard.put_nowait(line)

    def _obey(self, tasks: asyncio.TaskGroup, word: str, *rest: str) -> None:
        numbers = [int(each) for each in rest]
        if word in ("quiet", "write"):
            self._quiet = word == "quiet"
            self._tell_writers()
        elif word == "serve":
            tasks.create_task(self._serve(tasks, numbers[0], numbers[1:]))
        elif word == "release":
            tasks.create_task(self._release(numbers[0]))
        elif word == "clock":
            set_clock_back(numbers[0])
        else:
            self._beside.append(tasks.create_task(self._compact() if word == "compact" else self._back_up()))

    # Writing.

    async def _serve(self, tasks: asyncio.TaskGroup, slot: int, newest: list[int]) -> None:
        """Make the session of a slot this process's own; then all that was acknowledged is there, and write on."""
        sessions = self._log.sessions
        own = await sessions.incarnation()
        if await sessions.find(f"slot{slot}") is None:
            await sessions.open(f"slot{slot}", b"", f"slot{slot}/")
        else:
            async with asyncio.timeout(_TAKE_OVER_S):
                while True:
                    session = await sessions.take_over(f"slot{slot}")
                    if session is not None and session.incarnation == own:
                        break
                    await asyncio.sleep(POLL_S)
        for stream, event_id in enumerate(newest, slot * STREAMS_A_SLOT):
            if event_id:
                await self._look_for(stream, event_id)
        self._writers[slot] = [tasks.create_task(self._write(slot, task)) for task in tasks_of(slot)]

    async def _release(self, slot: int) -> None:
        """Give a slot to whoever is asked for it next."""
        self._released.add(slot)
        self._tell_writers()
        await asyncio.wait(self._writers[slot])
        await self._log.sessions.release(f"slot{slot}")

    def _tell_writers(self) -> None:
        """Have the writers look whether they are to write on."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _is_over(self, slot: int) -> bool:
        return self._stopping or slot in self._released

    async def _write(self, slot: int, task: int) -> None:
        log, life = self._log, self._orders.life
        rng = random.Random(f"{self._orders.seed} {life} {task}")
        written = dict.fromkeys(streams_of(task), 0)
        streams = list(written)
        for call in itertools.count():
            while self._quiet and not self._is_over(slot):
                await self._changed.wait()
            if self._is_over(slot):
                return
            of = rng.choice(_BATCHES)
            marks: list[Mark] = []
            for stream in rng.choices(streams, _WEIGHTS, k=of):
                marks.append(Mark(stream, life, written[stream], call, of))
                written[stream] += 1
            if of == 1:
                ids = [await log.append(name_of(marks[0].stream), payload_of(marks[0]))]
            else:
                ids = await log.append_many([(name_of(mark.stream), payload_of(mark), 0) for mark in marks])
            lines = (RECORD.pack(mark.stream, of, call, int(each)) for mark, each in zip(marks, ids, strict=True))
            os.write(self._report, b"".join(lines))
            # In the modes without a sync an append may not suspend at all.
            await asyncio.sleep(0)

    # Reading.

    async def _follow(self, place: int, follow: Follow) -> None:
        track = Track(follow.stream, whole=follow.after == 0)
        report = _report_to(shown_path(self._orders.reports, self._orders.life, place))
        async for event in self._log.follow(name_of(follow.stream), str(follow.after) if follow.after else None):
            track.take(event.id, event.payload)
            os.write(report, event.id.to_bytes(ID_BYTES, "little"))

    async def _look(self) -> None:
        """Look for events of the past, and for those that other processes have been acknowledged this moment."""
        while True:
            await asyncio.sleep(self._rng.expovariate(1 / _LOOK_PAUSE_S))
            if (health := self._log.health()).status != "ok":
                raise BrokenPromiseError(f"nothing failed, and the log says {health}")
            if self._orders.samples and self._rng.random() < 0.3:
                await self._look_for_sample(self._rng.choice(self._orders.samples))
            elif (newest := self._newest()) is not None:
                await self._look_for(*newest)

    def _newest(self) -> tuple[int, int] | None:
        """Return stream and id of an event that some process has reported last."""
        reports = sorted(self._orders.reports.glob("*.acknowledged"))
        with contextlib.suppress(FileNotFoundError), FileIO(self._rng.choice(reports)) as report:
            lines = report.seek(0, os.SEEK_END) // RECORD.size
            if lines:
                report.seek((lines - 1) * RECORD.size)
                stream, _, _, event_id = RECORD.unpack(report.read(RECORD.size))
                return stream, event_id
        return None

    async def _look_for(self, stream: int, event_id: int) -> None:
        """Find one event by its id, and by its place."""
        name = name_of(stream)
        if (found := await self._log.stream_of(str(event_id))) != name:
            raise BrokenPromiseError(f"event {event_id} of {name} was acknowledged and is said to be in {found}")
        events = await self._log.read(name, str(event_id - 1), 3)
        if not events or events[0].id != event_id:
            ids = [event.id for event in events]
            raise BrokenPromiseError(f"event {event_id} of {name} was acknowledged, after the id before come {ids}")
        self._take(stream, [(event.id, event.payload) for event in events])

    async def _look_for_sample(self, sample: Sample) -> None:
        name = name_of(sample.stream)
        events = await self._log.read(name, str(sample.ids[0] - 1), len(sample.ids))
        if tuple(event.id for event in events) != sample.ids:
            raise BrokenPromiseError(f"of {name} {sample.ids} were acknowledged and {[e.id for e in events]} read")
        self._take(sample.stream, [(event.id, event.payload) for event in events])

    def _take(self, stream: int, events: list[tuple[int, bytes]]) -> None:
        track = Track(stream, whole=False)
        for event_id, payload in events:
            track.take(event_id, payload)
        self._count(Counter({"events looked for": len(events)}))

    # What a server does beside.

    async def _compact(self) -> None:
        self._count(await self._log.maintain(compact_eagerly))

    async def _back_up(self) -> None:
        pool = FolderTarget(self._orders.pool)
        result = await self._log.maintain(lambda store: create_backup(store, pool))
        if result.damaged:
            raise BrokenPromiseError(f"a backup found damage: {result}")
        self._count(Counter({"backups by a writing process": 1}))

    def _count(self, counts: Counter[str]) -> None:
        os.write(self._counts, "".join(f"{count} {what}\n" for what, count in counts.items()).encode())


def _report_to(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
