"""The process that the kill campaign kills: it writes for ever, and tells what was acknowledged.

Run as a script, with its orders as JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

# Run as a script, this folder is on the path and the checkout is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logstore.storage import Durability, Log, LogOptions
from logstore.storage.files import Disk

DEADLINE_S: Final = 30.0
POLL_S: Final = 0.002
_WRITERS: Final = 4
_STREAMS: Final = 6
"""Of each slot; a slot is what one process serves, and another takes over."""


@dataclasses.dataclass(frozen=True)
class Orders:
    """What a writing process is told.

    Attributes:
        path: The catalogue of the store.
        oracle: File that gets a line for every acknowledged call.
        seed: What sizes and streams are drawn from.
        run: Number of the run.
        process: Number of the process in it, which is the slot that it serves; a line on its stdin gives it slot 0 too.
        die_at: Which change of the disk kills it, None when the campaign does.
        durability: As in `LogOptions`, like the rest.
        journal_file_bytes: Small, so that files rotate all the time.
        journal_bytes: Small, so that appends wait now and then.
        checkpoint_interval_s: Short, so that checkpoints run all the time.
        segment_bytes: Small, so that segments are sealed.
    """

    path: str
    oracle: str
    seed: int
    run: int
    process: int
    die_at: int | None
    durability: Durability
    journal_file_bytes: int
    journal_bytes: int
    checkpoint_interval_s: float
    segment_bytes: int


class DyingDisk(Disk):
    """The real disk; its n-th change kills the process, a write after half of it."""

    def __init__(self, die_at: int) -> None:
        self._changes = itertools.count(1)
        self._die_at = die_at

    def _change(self) -> None:
        if self._dies():
            self._die()

    def _dies(self) -> bool:
        return next(self._changes) == self._die_at

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def create(self, path: Path) -> int:
        """Count, then do it."""
        self._change()
        return super().create(path)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """Count, then do it."""
        if self._dies():
            super().write(fd, data[: len(data) // 2], offset)
            self._die()
        super().write(fd, data, offset)

    def extend(self, fd: int, length: int) -> None:
        """Count, then do it."""
        self._change()
        super().extend(fd, length)

    def sync(self, fd: int) -> None:
        """Count, then do it."""
        self._change()
        super().sync(fd)

    def sync_folder(self, folder: Path) -> None:
        """Count, then do it."""
        self._change()
        super().sync_folder(folder)

    def rename(self, source: Path, target: Path) -> None:
        """Count, then do it."""
        self._change()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        """Count, then do it."""
        self._change()
        super().unlink(path)


class Call(NamedTuple):
    """One append, of one event or several; `number` counts the calls of a writer."""

    run: int
    process: int
    writer: int
    number: int


class Mark(NamedTuple):
    """What a payload says of its event."""

    stream: str
    call: Call
    place: int
    of: int


def payload_of(mark: Mark) -> bytes:
    """Return the payload of an event: its mark, and bytes that follow from it."""
    text = "|".join(map(str, (mark.stream, *mark.call, mark.place, mark.of))) + "|"
    rng = random.Random(text)
    size = rng.randrange(20_000) if rng.random() < 0.02 else rng.randrange(800)
    return text.encode() + rng.randbytes(size)


def mark_of(payload: bytes) -> Mark | None:
    """Return what a payload says, or None when it is not what was stored."""
    fields = payload.split(b"|", 7)
    try:
        run, process, writer, number, index, count = map(int, fields[1:7])
        mark = Mark(fields[0].decode(), Call(run, process, writer, number), index, count)
    except ValueError:
        return None
    return mark if payload_of(mark) == payload else None


def streams_of(slot: int) -> list[str]:
    """Return the streams of a slot."""
    return [f"slot{slot}/stream{number}" for number in range(_STREAMS)]


async def write_until_killed(orders: Orders) -> None:
    """Open the store, serve the slot, and write from several tasks at once for ever."""
    disk = Disk() if orders.die_at is None else DyingDisk(orders.die_at)
    options = LogOptions(
        durability=orders.durability,
        journal_file_bytes=orders.journal_file_bytes,
        journal_bytes=orders.journal_bytes,
        checkpoint_interval_s=orders.checkpoint_interval_s,
        segment_bytes=orders.segment_bytes,
        memory_bytes=1 << 20,
        cached_events_per_stream=10,
        sync_interval_s=0.02,
    )
    inherit = asyncio.Event()
    loop = asyncio.get_running_loop()
    threading.Thread(target=_wait_for_word, args=(loop, inherit), daemon=True).start()
    log = Log(orders.path, options, disk)
    await log.open()
    await _serve(log, orders.process)
    report = os.open(orders.oracle, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(report, b"ready\n")
    streams = streams_of(orders.process)
    async with asyncio.TaskGroup() as tasks:
        for writer in range(_WRITERS):
            tasks.create_task(_write(log, orders, writer, streams, report))
        if orders.process > 0:
            await inherit.wait()
            await _serve(log, 0)
            os.write(report, b"inherited\n")
            streams += streams_of(0)


def _wait_for_word(loop: asyncio.AbstractEventLoop, inherit: asyncio.Event) -> None:
    if sys.stdin.readline():
        loop.call_soon_threadsafe(inherit.set)


async def _serve(log: Log, slot: int) -> None:
    """Make the session of a slot this process's own."""
    key = f"slot{slot}"
    if await log.sessions.find(key) is None:
        await log.sessions.open(key, b"")
        return
    own = (await log.sessions.open(f"of process {os.getpid()}", b"")).incarnation
    async with asyncio.timeout(DEADLINE_S):
        while True:
            session = await log.sessions.take_over(key)
            if session is not None and session.incarnation == own:
                return
            await asyncio.sleep(POLL_S)


async def _write(log: Log, orders: Orders, writer: int, streams: Sequence[str], report: int) -> None:
    rng = random.Random(f"{orders.seed} {orders.run} {orders.process} {writer}")
    for number in itertools.count():
        call = Call(orders.run, orders.process, writer, number)
        count = rng.choice((1, 1, 1, 1, 2, 7))
        chosen = rng.choices(streams, k=count)
        marks = [Mark(stream, call, index, count) for index, stream in enumerate(chosen)]
        if count == 1:
            ids = [await log.append(marks[0].stream, payload_of(marks[0]))]
        else:
            ids = await log.append_many([(mark.stream, payload_of(mark), 0) for mark in marks])
        line = json.dumps([call, list(zip(chosen, ids, strict=True))])
        os.write(report, line.encode() + b"\n")
        # In the modes without a sync an append may not suspend at all.
        await asyncio.sleep(0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(write_until_killed(Orders(**json.loads(sys.argv[1]))))
