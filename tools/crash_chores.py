"""What is done to a store beside those that write it: audits, verify, backups, compaction, reindex; one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from crash_forked import Forked
from crash_kill import BrokenPromiseError
from crash_ledger import Ledger, name_of
from logstore.errors import IndexReplacedError, StoreLockedError
from logstore.ops.access import StoreView, open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget
from logstore.ops.backup.restore import restore
from logstore.ops.backup.rotation import check_backup, delete_old
from logstore.ops.compaction import compact as compaction
from logstore.ops.reindex import reindex_at
from logstore.ops.verify.store import verify
from logstore.storage import Log, LogOptions
from logstore.storage.opening import OpenStore
from logstore.storage.options import Retention

REINDEXED: Final = re.compile(r"was removed, replaced or damaged while it was open")
"""What open stores say, as an error, when another process has made the index again."""
COMPARED: Final = "events compared"
PATIENCE_S: Final = 900.0
_PAUSE_S: Final = 0.5
_PAGE: Final = 1_000
_AUDITED_TASKS: Final = 4
_SHARES: Final = {"audit": 0.15, "compact": 0.15, "back up": 0.1, "verify": 0.08, "reindex": 0.05, "restore": 0.04}
"""Of the whole time, at most, however large the store is."""
_KILLED: Final = 0.15
_EAGER: Final = {"_MOST_SMALL": 60, "_KEPT_SMALL": 30, "_GROWN_RUNS": 4, "_GROWN_BYTES": 32 << 10}
"""A small part of how many small files, and how much of a stream in packs, compaction leaves alone."""


def audit(path: Path, ledger: Ledger, tasks: Iterable[int]) -> Counter[str]:
    """Compare what a look at the store shows with what is known; return how many events that were.

    Raises:
        BrokenPromiseError: With what is wrong.
    """
    with StoreView(path) as view:

        def read(stream: int) -> Iterator[tuple[int, bytes]]:
            return ((event.id, event.payload) for event in view.events(name_of(stream)))

        return Counter({COMPARED: sum(ledger.check_task(task, read) for task in tasks)})


def audit_opened(path: Path, ledger: Ledger, tasks: Iterable[int]) -> Counter[str]:
    """Compare what an open store reads with what is known; return how many events that were.

    Raises:
        BrokenPromiseError: With what is wrong.
    """
    log = Log(path, LogOptions(memory_bytes=1 << 20))
    with asyncio.Runner() as runner:
        runner.run(log.open())

        def read(stream: int) -> Iterator[tuple[int, bytes]]:
            after: str | None = None
            while events := runner.run(log.read(name_of(stream), after, _PAGE)):
                yield from ((event.id, event.payload) for event in events)
                after = events[-1].event_id

        events = sum(ledger.check_task(task, read) for task in tasks)
        runner.run(log.close())
    return Counter({COMPARED: events})


def verify_whole(path: Path) -> Counter[str]:
    """Verify the store.

    Raises:
        BrokenPromiseError: Something was found.
    """
    report = verify(path)
    if not report.ok:
        raise BrokenPromiseError(f"verify found {len(report.findings)} things, such as {report.findings[:5]}")
    return Counter({"events verified": report.events})


def make_index(path: Path) -> Counter[str]:
    """Make the index again."""
    return Counter({"events indexed again": reindex_at(path).events})


def compact_eagerly(store: OpenStore) -> Counter[str]:
    """Compact what is worth it, and what would be in a store of many times the size."""
    compaction.__dict__.update(_EAGER)
    # Another process is at it, or the index was made again meanwhile.
    with contextlib.suppress(StoreLockedError, IndexReplacedError):
        return Counter({"events moved by compaction": compaction.compact(store, Retention()).moved_events})
    return Counter()


class Chores:
    """Chooses what is done next, and looks at how it ended.

    Args:
        folder: Where the store is, and what belongs to it.
        path: The catalogue.
        pool: Where backups go.
        ledger: What is known; a chore has what it holds when the chore begins.
        figures: What is counted.
        seed: What everything is drawn from.
        close: Returns the descriptors that a chore must not keep.
    """

    def __init__(
        self,
        folder: Path,
        path: Path,
        pool: Path,
        ledger: Ledger,
        figures: Counter[str],
        seed: str,
        close: Callable[[], Iterable[int]],
    ) -> None:
        self._folder = folder
        self._path = path
        self._pool = pool
        self._ledger = ledger
        self._figures = figures
        self._rng = random.Random(f"{seed} chores")
        self._close = close
        self._spent: dict[str, float] = dict.fromkeys(_SHARES, 0.0)
        self._began = self._next = time.monotonic()
        self._running: Forked | None = None
        self._kind = ""
        self._started = self._dies = 0.0

    def go_on(self) -> None:
        """Begin what is due, kill what is to be killed, look at what has ended.

        Raises:
            BrokenPromiseError: A chore went wrong.
        """
        now = time.monotonic()
        if self._running is None:
            if now > self._next:
                self._begin(now)
        elif self._running.ended():
            self._end(now)
        elif now > self._dies:
            self._running.kill()
            self._figures["chores killed"] += 1
        elif now - self._started > PATIENCE_S:
            raise BrokenPromiseError(f"{self._kind} is not done after {PATIENCE_S:.0f} s")

    def settle(self, *, kill: bool = False) -> None:
        """Return when nothing is under way.

        Raises:
            BrokenPromiseError: A chore went wrong.
        """
        if self._running is not None:
            if kill:
                self._running.kill()
            self._running.wait(PATIENCE_S)
            self._end(time.monotonic())

    def kill(self) -> None:
        """End what is under way."""
        if self._running is not None:
            self._running.kill()

    def _begin(self, now: float) -> None:
        allowed = [kind for kind, share in _SHARES.items() if self._spent[kind] <= share * (now - self._began)]
        if not allowed or not self._path.exists():
            return
        self._kind = self._rng.choice(allowed)
        works = {
            "audit": self._audit,
            "compact": self._compact,
            "back up": self._back_up_and_rotate,
            "verify": lambda: verify_whole(self._path),
            "reindex": lambda: make_index(self._path),
            "restore": self._restore,
        }
        self._figures[f"chores: {self._kind}"] += 1
        self._started = now
        self._dies = now + (self._rng.expovariate(2.0) if self._rng.random() < _KILLED else 2 * PATIENCE_S)
        errors = self._folder / f"{self._kind}.stderr"
        self._running = Forked(self._kind, errors, works[self._kind], self._close())

    def _end(self, now: float) -> None:
        assert self._running is not None
        self._running.check(REINDEXED if self._figures["chores: reindex"] else None)
        self._figures.update(self._running.counted())
        self._running = None
        self._spent[self._kind] += now - self._started
        self._next = now + self._rng.expovariate(1 / _PAUSE_S)

    # In a process of its own, which has the ledger as it was when that began.

    def _audit(self) -> Counter[str]:
        tasks = self._rng.sample(self._ledger.tasks, _AUDITED_TASKS)
        return self._rng.choice((audit, audit_opened))(self._path, self._ledger, tasks)

    def _compact(self) -> Counter[str]:
        store = open_existing(self._path)
        try:
            return compact_eagerly(store)
        finally:
            store.close(empty=True)

    def _back_up(self) -> Path:
        store = open_existing(self._path)
        try:
            result = create_backup(store, FolderTarget(self._pool))
        finally:
            store.close(empty=True)
        if result.damaged:
            raise BrokenPromiseError(f"a backup found damage: {result}")
        return Path(result.path)

    def _back_up_and_rotate(self) -> Counter[str]:
        self._back_up()
        # Another process is making a backup.
        with contextlib.suppress(StoreLockedError):
            return Counter({"old backups removed": delete_old(FolderTarget(self._pool), 0)})
        return Counter()

    def _restore(self) -> Counter[str]:
        backup = self._back_up()
        if problems := check_backup(FolderTarget(self._pool), backup.name):
            raise BrokenPromiseError(f"{backup}: {problems}")
        place = self._folder / "restored"
        shutil.rmtree(place, ignore_errors=True)
        restore(backup, place / "events.db")
        compared = audit(place / "events.db", self._ledger, self._ledger.tasks)
        shutil.rmtree(place)
        return Counter({"events restored and compared": compared.total()})
