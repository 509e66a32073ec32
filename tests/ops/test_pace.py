"""Compaction and backups rest beside the appends of their process, and nowhere else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget
from logstore.ops.compaction import sweep as sweeping
from logstore.ops.compaction.compact import compact
from logstore.ops.compaction.sweep import Swept, sweep
from logstore.ops.pace import Pace
from logstore.ops.progress import silent
from logstore.storage import Log, Retention
from logstore.storage import log as log_module
from logstore.storage.files import Disk, Lock
from logstore.storage.opening import OpenStore
from tests.ops.backed_up import IN_JOURNALS
from tests.ops.stores import Writer, opened, segment_files

DAY_S = 86_400.0
RETENTION = Retention(max_age_s=DAY_S)


class Clock:
    """A clock that is set by hand; a rest passes on it, and is noted."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.rests: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now_s += seconds


def test_a_rest_is_twice_as_long_as_the_work_since_the_last_one() -> None:
    clock = Clock()
    pace = Pace(clock.rest, clock)
    for worked_s in (0.001, 0.004):
        clock.now_s += worked_s
        pace.step()
    assert clock.rests == pytest.approx([0.002, 0.008])


def test_work_of_microseconds_adds_up_before_it_rests() -> None:
    clock = Clock()
    pace = Pace(clock.rest, clock)
    for _ in range(9):
        clock.now_s += 0.000_1
        pace.step()
    assert len(clock.rests) == 1


def test_after_a_statement_of_minutes_the_rest_is_a_second() -> None:
    clock = Clock()
    pace = Pace(clock.rest, clock)
    clock.now_s += 300
    pace.step()
    assert clock.rests == [1.0]


class Rests(threading.Event):
    """In the place of `OpenStore.stopping`: notes that somebody rests, and which locks were held at the time."""

    def __init__(self, store: OpenStore, locks: tuple[str, ...]) -> None:
        super().__init__()
        self._store = store
        self._locks = locks
        self.count = 0
        self.held: set[str] = set()

    def wait(self, timeout: float | None = None) -> bool:
        self.count += 1
        for name in self._locks:
            lock = self._store.disk.lock(self._store.root / name)
            if lock is None:
                self.held.add(name)
            else:
                lock.release()
        return False


def worked(store: OpenStore, backups: Path) -> tuple[Rests, Rests]:
    """Compact a store and back it up; return how each rested."""
    store.stopping = compacting = Rests(store, ("checkpoint.lock", "registry.lock", "removal.lock"))
    assert compact(store, RETENTION).removed_segments == 1
    # It shares the lock of those who remove files until everything is copied.
    store.stopping = backing_up = Rests(store, ("checkpoint.lock", "registry.lock"))
    assert create_backup(store, FolderTarget(backups)).events == 20
    return compacting, backing_up


def prepare(path: Path) -> None:
    """Make a store with a segment to drop and one to keep."""
    with opened(path) as store:
        writer = Writer(store)
        writer.write(("old",), 20, age_h=48)
        writer.write(("young",), 20)


@pytest.mark.promise("backup-holds-up-nobody")
async def test_beside_an_open_log_work_rests_without_a_lock_that_others_wait_for(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    prepare(path)
    async with Log(path, IN_JOURNALS) as log:
        for rests in await log.maintain(lambda store: worked(store, tmp_path / "backups")):
            assert rests.count > 0
            assert rests.held == set()


def test_a_command_on_a_store_of_its_own_never_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.db"
    prepare(path)
    # A log that another test left open does not count.
    monkeypatch.setattr(log_module, "_open_logs", set[Log]())
    with opened(path) as store:
        for rests in worked(store, tmp_path / "backups"):
            assert rests.count == 0


def test_a_backup_that_begins_while_files_are_removed_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "_SLICE_FILES", 1)
    path = tmp_path / "events.db"
    clock = Clock()
    backups: list[Lock | None] = []

    def rest(seconds: float) -> None:
        if not backups:
            backups.append(Disk().lock(store.root / "removal.lock", shared=True))

    def now_s() -> float:
        clock.now_s += 1
        return clock.now_s

    with opened(path) as store:
        writer = Writer(store)
        for stream in ("a", "b", "c"):
            writer.write((stream,), 5)
        with store.changing_catalogue(store.catalogue.inode) as catalogue:
            catalogue.connection.execute("DELETE FROM extents")
        size = sum((store.root / "segments" / name).stat().st_size for name in segment_files(path))
        first = sweep(store, store.catalogue.inode, (), Pace(rest, now_s), silent)
        assert (first.segments, first.waiting) == (1, 2)
        assert len(segment_files(path)) == 2
        (backup,) = backups
        assert backup is not None
        backup.release()
        second = sweep(store, store.catalogue.inode, (), Pace(None), silent)
        assert second == Swept(2, size - first.bytes, 0)
        assert segment_files(path) == []
