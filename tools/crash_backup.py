"""The backup campaign: backups while many writers append in several processes, each restored and compared.

Run as a script, with its orders as JSON, it is one of the writing processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

# Run as a script, this folder is on the path and the checkout is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from crash_kill import BrokenPromiseError
from logstore.ops.access import StoreView, open_existing
from logstore.ops.backup.create import BackupResult, create_backup
from logstore.ops.backup.pool import FolderTarget
from logstore.ops.backup.restore import restore
from logstore.ops.backup.rotation import check_backup, delete_old
from logstore.storage import Durability, Log, LogOptions

PROCESSES: Final = 4
WRITERS: Final = 32
"""Of each process: together more than a hundred at once."""
_PAUSE_S: Final = 0.4
_DEADLINE_S: Final = 60.0
_BACKUPS_A_STORE: Final = 8
_ALMOST_NOTHING: Final = 0.02


@dataclasses.dataclass(frozen=True)
class Orders:
    """What a writing process is told.

    Attributes:
        path: The catalogue of the store.
        pool: Where it puts backups, when it is told to make one.
        report: File that gets a line for every acknowledged event.
        name: What its streams begin with.
        seed: What payloads and pauses are drawn from.
        durability: As in `LogOptions`.
    """

    path: str
    pool: str
    report: str
    name: str
    seed: int
    durability: Durability


def payload_of(stream: str, number: int) -> bytes:
    """Return the payload of a stream's n-th event."""
    rng = random.Random(f"{stream} {number}")
    size = 20_000 if rng.random() < 0.005 else rng.randrange(500)
    return f"{stream} {number} ".encode() + rng.randbytes(size)


async def write_until_told(orders: Orders) -> None:
    """Append from many tasks; make a backup for each line on stdin that says so, end when it ends."""
    options = LogOptions(
        durability=orders.durability,
        journal_file_bytes=64 << 10,
        journal_bytes=512 << 10,
        checkpoint_interval_s=0.1,
        segment_bytes=128 << 10,
        memory_bytes=4 << 20,
    )
    report = os.open(orders.report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    stopping = asyncio.Event()
    async with Log(orders.path, options) as log, asyncio.TaskGroup() as tasks:
        for writer in range(WRITERS):
            tasks.create_task(_write(log, orders, f"{orders.name}/writer{writer}", report, stopping))
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while await asyncio.to_thread(sys.stdin.readline):
            done = await log.maintain(lambda store: create_backup(store, FolderTarget(Path(orders.pool))))
            sys.stdout.write(msgspec.json.encode(done).decode() + "\n")
            sys.stdout.flush()
        stopping.set()


async def _write(log: Log, orders: Orders, stream: str, report: int, stopping: asyncio.Event) -> None:
    rng = random.Random(f"{orders.seed} {stream}")
    for number in itertools.count():
        if stopping.is_set():
            return
        await log.append(stream, payload_of(stream, number))
        os.write(report, f"{stream} {number}\n".encode())
        # Writers that come and go, as clients do: bursts and silence.
        await asyncio.sleep(rng.expovariate(1 / _PAUSE_S))


class _Writers:
    """A writing process."""

    def __init__(self, orders: Orders) -> None:
        self.name = orders.name
        self.report = Path(orders.report)
        self.killed = False
        self._errors = self.report.with_suffix(".stderr")
        with self._errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(dataclasses.asdict(orders))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BrokenPromiseError(f"{self.name} ended with {self._process.wait()}:\n{self._errors.read_text()}")
        return line

    def back_up(self) -> BackupResult:
        """Have it back up the store that it writes."""
        assert self._process.stdin is not None
        self._process.stdin.write("backup\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._line(), type=BackupResult)

    def kill(self) -> None:
        """End it as a crash does."""
        self.killed = True
        self._process.kill()
        self._process.wait()
        self._close()

    def stop(self) -> None:
        """Let it finish what it does.

        Raises:
            BrokenPromiseError: It failed.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        status = self._process.wait(_DEADLINE_S)
        self._close()
        errors = self._errors.read_text()
        if status or "Traceback" in errors or "ERROR" in errors:
            raise BrokenPromiseError(f"{self.name} ended with {status}:\n{errors}")

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def acknowledged(self) -> Counter[str]:
        """Return how many events of each stream it has reported, which it does once they are acknowledged."""
        counts: Counter[str] = Counter()
        if self.report.exists():
            for line in self.report.read_text().split("\n")[:-1]:
                stream, _, number = line.partition(" ")
                counts[stream] = int(number) + 1
        return counts


class _Store:
    """One store under load, its backups, and what is known of each."""

    def __init__(self, folder: Path, seed: int, rng: random.Random) -> None:
        self.folder = folder
        self.path = folder / "store" / "events.db"
        self.pool = folder / "pool"
        self.target = FolderTarget(self.pool)
        self.found: list[Counter[str]] = []
        self._seed = seed
        self._durability: Durability = rng.choice(("always", "always", "interval", "os"))
        self._lives = itertools.count()
        folder.mkdir(parents=True)
        self.writers = [self._start() for _ in range(PROCESSES)]
        self.dead: list[_Writers] = []

    def _start(self) -> _Writers:
        name = f"process{next(self._lives)}"
        report = str(self.folder / f"{name}.report")
        return _Writers(Orders(str(self.path), str(self.pool), report, name, self._seed, self._durability))

    def kill_one(self, rng: random.Random) -> None:
        """Kill a writing process and start another: a backup may find its journals."""
        victim = self.writers.pop(rng.randrange(len(self.writers)))
        victim.kill()
        self.dead.append(victim)

    def replace(self) -> None:
        """Start a process for each that was killed."""
        while len(self.writers) < PROCESSES:
            self.writers.append(self._start())

    def acknowledged(self) -> Counter[str]:
        """Return how many events of each stream are known to be acknowledged."""
        counts: Counter[str] = Counter()
        for writers in (*self.writers, *self.dead):
            counts += writers.acknowledged()
        return counts

    def back_up_from_outside(self) -> BackupResult:
        """Back up as the command does."""
        store = open_existing(self.path)
        try:
            return create_backup(store, self.target)
        finally:
            store.close(empty=True)

    def finish(self) -> None:
        """Stop the writers, and hold each backup against what was acknowledged in the end.

        Raises:
            BrokenPromiseError: It holds what never was.
        """
        for writers in self.writers:
            writers.stop()
        finally_acknowledged = self.acknowledged()
        killed = tuple(f"{writers.name}/" for writers in self.dead)
        for number, found in enumerate(self.found):
            for stream, count in found.items():
                # The last event of a killed writer may have been acknowledged to it without being reported by it.
                if count > finally_acknowledged[stream] + stream.startswith(killed or ("\0",)):
                    raise BrokenPromiseError(
                        f"backup {number} holds {count} events of {stream}, "
                        f"and {finally_acknowledged[stream]} were ever acknowledged"
                    )
        first, second = self.back_up_from_outside(), self.back_up_from_outside()
        if second.bytes_copied > _ALMOST_NOTHING * (first.bytes_copied + first.bytes_reused):
            raise BrokenPromiseError(f"the second of two backups copied {second.bytes_copied} bytes: {first}")

    def kill(self) -> None:
        """End all writers, after a failure."""
        for writers in self.writers:
            writers.kill()


def read_streams(path: Path) -> Counter[str]:
    """Return how many events each stream of a store has; all of them are what was written there, in order.

    Raises:
        BrokenPromiseError: They are not.
    """
    found: Counter[str] = Counter()
    with StoreView(path) as view:
        for summary in view.summaries():
            last = 0
            for number, event in enumerate(view.events(summary.stream)):
                if event.payload != payload_of(summary.stream, number) or event.id <= last:
                    raise BrokenPromiseError(
                        f"event {number} of {summary.stream} is {event.id}, {event.payload[:60]!r}, after {last}"
                    )
                last = event.id
                found[summary.stream] += 1
    return found


class BackupCampaign:
    """Backs up stores under load, restores each backup elsewhere, and compares.

    Args:
        folder: Where the stores go.
        seed: What everything is drawn from.

    Attributes:
        figures: What was done.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._store: _Store | None = None
        self.figures: Counter[str] = Counter()

    def run(self, number: int) -> None:
        """Make one backup, restore it, compare.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        rng = random.Random(f"{self._seed} {number}")
        try:
            if self._store is None or number % _BACKUPS_A_STORE == 0:
                self.finish()
                self._store = _Store(self._folder / f"{number:05d}", self._seed, rng)
            self._run(self._store, rng)
        except BaseException:
            if self._store is not None:
                self._store.kill()
            raise

    def _run(self, store: _Store, rng: random.Random) -> None:
        time.sleep(rng.random())
        if rng.random() < 0.2:
            store.kill_one(rng)
            self.figures["writing processes killed"] += 1
        inside = rng.random() < 0.5
        before = store.acknowledged()
        started = time.monotonic()
        result = rng.choice(store.writers).back_up() if inside else store.back_up_from_outside()
        self.figures["milliseconds of backup"] += int((time.monotonic() - started) * 1000)
        store.replace()
        place = store.folder / "restored" / "events.db"
        if rng.random() < 0.5 and place.parent.exists():
            # Else over the store that was restored from the backup before.
            shutil.rmtree(place.parent)
        if problems := check_backup(store.target, Path(result.path).name):
            raise BrokenPromiseError(f"{result.path}: {problems}")
        restored = restore(Path(result.path), place)
        found = read_streams(place)
        self._compare(result, restored.events, before, found)
        store.found.append(found)
        if rng.random() < 0.2:
            self.figures["old backups removed"] += delete_old(store.target, 0)
        self.figures["events compared"] += found.total()
        self.figures["events acknowledged before a backup began"] += before.total()
        self.figures["bytes copied"] += result.bytes_copied
        self.figures["bytes reused"] += result.bytes_reused
        self.figures["backups by a process that writes"] += inside

    @staticmethod
    def _compare(result: BackupResult, restored: int, before: Counter[str], found: Counter[str]) -> None:
        lost = before - found
        if lost:
            stream = min(lost)
            raise BrokenPromiseError(
                f"{result.path} lacks {lost.total()} events that were acknowledged when it was begun: "
                f"{found[stream]} of {before[stream]} on {stream}"
            )
        if not result.events == restored == found.total() or result.damaged:
            raise BrokenPromiseError(f"{result} says so, {restored} were restored and {found.total()} read")

    def finish(self) -> None:
        """Stop the writers of the last store and look at the backups once more; the store goes when all is well."""
        store, self._store = self._store, None
        if store is not None:
            try:
                store.finish()
            except BaseException:
                store.kill()
                raise
            self.figures["stores"] += 1
            shutil.rmtree(store.folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(write_until_told(Orders(**json.loads(sys.argv[1]))))
