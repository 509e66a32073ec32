"""What operating a store must not do when something else happens meanwhile, or has gone wrong before.

Each test is a fault that a review found: events lost, shown again or not at all, false alarms, work that never ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from logstore.ops.access import StoreView
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.backup.restore import restore
from logstore.ops.compaction import compact as compaction
from logstore.ops.compaction.compact import Compacted, compact
from logstore.ops.maintenance import Tasks, run_round
from logstore.ops.reindex import reindex_at
from logstore.ops.schedule import Schedule
from logstore.ops.transfer.export import export_events
from logstore.ops.transfer.importing import import_events
from logstore.ops.verify.repair import repair
from logstore.ops.verify.store import verify
from logstore.storage import Log, LogOptions, Retention
from logstore.storage.catalogue import Catalogue
from logstore.storage.checkpoint import SegmentStore
from logstore.storage.files import Disk, Lock
from logstore.storage.options import MIB
from logstore.storage.segment import segment_path
from tests.engine import deadline, eventually, in_segments, process, small
from tests.ops.damaged import read
from tests.ops.stores import Writer, opened, read_ids, segment_files

DAY_S = 86_400.0
A_DAY = Retention(max_age_s=DAY_S)
NOTHING = Retention(max_age_s=0.0)
OWN_FILE = 300
"""Events of a thousand bytes with which a stream gets a file of its own."""
LEAVES_A_JOURNAL = """
import asyncio, sys
from logstore.storage import Log, LogOptions

async def main() -> None:
    log = Log(sys.argv[1], LogOptions(checkpoint_interval_s=1000.0))
    await log.append_many([("s", b"x" * 1000, 0)] * int(sys.argv[2]))
    print("written", flush=True)
    sys.stdin.readline()

asyncio.run(main())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


def assert_well(path: Path) -> None:
    assert [(each.kind, each.file, each.reason) for each in verify(path).findings] == []


def run(path: Path, retention: Retention) -> Compacted:
    """Compact a store as another process does."""
    with opened(path) as other:
        return compact(other, retention)


def ask(path: Path, sql: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(sql).fetchall()


def full_disk() -> sqlite3.OperationalError:
    """Return what SQLite says when the disk has no room for a commit."""
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


async def die_over_a_journal(path: Path, events: int) -> None:
    """Have a process append events to stream `s`, and kill it before they are in segments."""
    with process(LEAVES_A_JOURNAL, path, str(events)) as writer:
        assert await writer.line() == "written"


class KnownFiles(Disk):
    """Knows which file a descriptor is of.

    Attributes:
        paths: The open files.
    """

    def __init__(self) -> None:
        self.paths: dict[int, Path] = {}

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self.paths[fd] = path
        return fd

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        fd = super().open(path, write=write, create=create)
        self.paths[fd] = path
        return fd


class Interposed(KnownFiles):
    """Does something once, at a moment in the work of whoever uses it.

    Attributes:
        what: What is done; None for nothing.
    """

    def __init__(self, what: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.what = what

    def happens(self) -> None:
        """Do it, the first time."""
        what, self.what = self.what, None
        if what is not None:
            what()


# A pass and its commits.


@pytest.mark.promise("compaction-changes-nothing")
@pytest.mark.parametrize("error", [sqlite3.OperationalError, KeyboardInterrupt])
def test_an_error_behind_the_commit_that_moved_events_costs_none(
    path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Catalogue) -> NoReturn:
        raise error

    monkeypatch.setattr(compaction, "_GROWN_RUNS", 4)
    monkeypatch.setattr(compaction, "_GROWN_BYTES", 1)
    with opened(path) as store:
        writer = Writer(store)
        for _ in range(4):
            writer.write(("a", "b"), 10)
        with monkeypatch.context() as patch, contextlib.suppress(sqlite3.OperationalError, KeyboardInterrupt):
            patch.setattr(Catalogue, "shrink_wal", fail)
            compact(store, Retention())
        compact(store, Retention())
    assert_well(path)
    assert {stream: read_ids(path, stream) for stream in "ab"} == writer.ids


@pytest.mark.promise("compaction-room")
def test_a_pass_holds_only_so_much_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Measured(Disk):
        most = 0

        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            self.most = max(self.most, room())

    def room() -> int:
        return sum(each.stat().st_size for each in path.with_name("events-log").glob("segments/*"))

    monkeypatch.setattr(compaction, "_MOST_TWICE_BYTES", 32 << 10)
    disk = Measured()
    with opened(path, disk) as store:
        writer = Writer(store)
        for number in range(16):
            old = writer.events(f"old {number}", 60, age_h=48, payload_bytes=400)
            writer.checkpoint(old, writer.events(f"live {number}", 40, payload_bytes=400))
        before = room()
        done = compact(store, A_DAY, segment_bytes=16 << 10)
    assert done.moved_events == 16 * 40
    assert disk.most < before + (64 << 10)


def test_small_files_that_nothing_is_gained_from_are_written_anew_once_at_most(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "_MOST_SMALL", 2)
    monkeypatch.setattr(compaction, "_KEPT_SMALL", 1)
    with opened(path, segment_bytes=8 * MIB) as store:
        writer = Writer(store)
        for number in range(4):
            writer.write((str(number),), OWN_FILE, payload_bytes=1000)
    run(path, Retention())
    assert run(path, Retention()).moved_events == 0


@pytest.mark.parametrize("sealed", [0, 1])
def test_a_segment_without_its_file_keeps_no_other_from_being_compacted(path: Path, sealed: int) -> None:
    with opened(path) as store:
        writer = Writer(store)
        for number in range(3):
            writer.checkpoint(writer.events(f"old {number}", 60, age_h=48), writer.events(f"live {number}", 20))
    lost, *others = [number for (number,) in ask(path, "SELECT segment_id FROM segments ORDER BY segment_id")]
    ask(path, f"UPDATE segments SET sealed = {sealed}, sha256 = iif({sealed}, sha256, NULL) WHERE segment_id = {lost}")
    root = path.with_name("events-log")
    segment_path(root, lost).unlink()
    done = run(path, A_DAY)
    assert done.moved_events == 2 * 20
    assert not any(segment_path(root, number).exists() for number in others)
    assert read_ids(path, "live 2") == writer.ids["live 2"]


# Segments that somebody still writes.


@pytest.mark.promise("compaction-changes-nothing")
async def test_what_is_appended_after_somebody_reindexed_and_compacted_stays(path: Path) -> None:
    async with deadline(), Log(path, small(segment_bytes=8 * MIB)) as log:
        await log.append_many([("s", b"x" * 1000, 0)] * OWN_FILE)
        await in_segments(log)
        await asyncio.to_thread(reindex_at, path)
        await asyncio.to_thread(run, path, NOTHING)
        new = await log.append_many([("s", b"new", 0)] * 10)
        await in_segments(log)
    assert_well(path)
    assert read_ids(path, "s") == [int(each) for each in new]


def test_who_reindexes_writes_no_further_what_the_new_index_has_as_sealed(path: Path) -> None:
    with opened(path, segment_bytes=8 * MIB) as store:
        writer = Writer(store)
        writer.write(("a",), OWN_FILE, payload_bytes=1000)
        store.reindex()
        run(path, NOTHING)
        writer.write(("a",), 10)
    assert_well(path)
    assert read_ids(path, "a") == writer.ids["a"][-10:]


@pytest.mark.promise("compaction-changes-nothing")
async def test_what_an_opening_store_adopts_is_not_compacted_away_from_under_it(path: Path) -> None:
    class Opening(Interposed):
        def write(self, fd: int, data: bytes, offset: int) -> None:
            # Of all that is written there, the name of who opens the lane begins the file.
            if self.paths[fd].name == "marks" and offset == 0:
                self.happens()
            super().write(fd, data, offset)

    async with deadline():
        await die_over_a_journal(path, OWN_FILE)
        disk = Opening(lambda: run(path, NOTHING))
        async with Log(path, small(segment_bytes=8 * MIB), disk) as log:
            new = await log.append_many([("s", b"new", 0)] * 10)
            await in_segments(log)
    assert_well(path)
    assert read_ids(path, "s")[-10:] == [int(each) for each in new]


@pytest.mark.promise("dead-adopted")
async def test_a_lane_is_adopted_into_the_index_that_was_made_meanwhile(path: Path) -> None:
    class Adopting(Interposed):
        def lock(self, path: Path, *, shared: bool = False, wait: bool = False, create: bool = True) -> Lock | None:
            lock = super().lock(path, shared=shared, wait=wait, create=create)
            if path.name == "lock" and lock is not None:
                self.happens()
            return lock

    with opened(path) as other:
        disk = Adopting()
        with opened(path, disk) as store:
            Writer(store).write(("other",), 10)
            async with deadline():
                await die_over_a_journal(path, 20)
            disk.what = other.reindex
            store.adopt_dead_lanes()
            assert len(read_ids(path, "s")) == 20


async def test_what_a_failed_checkpoint_wrote_and_another_process_indexed_is_not_indexed_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_journals = Catalogue.add_journals
    refused: list[Catalogue] = []
    mended = False

    def refuse(self: Catalogue, journals: Iterable[tuple[int, int]]) -> None:
        if not refused:
            refused.append(self)
        if self is refused[0] and not mended:
            raise full_disk()
        add_journals(self, journals)

    async with deadline(), Log(path, small(segment_bytes=8 * MIB, journal_bytes=2 * MIB)) as log:
        await log.append_many([("s", b"x" * 1000, 0)] * OWN_FILE)
        await in_segments(log)
        monkeypatch.setattr(Catalogue, "add_journals", refuse)
        await log.append_many([("s", b"y" * 1000, 0)] * 200)
        await eventually(lambda: log.health().status != "ok")
        with opened(path):
            pass
        mended = True
        await in_segments(log)
        done = await asyncio.to_thread(run, path, Retention(max_events=OWN_FILE + 200, resume_window_s=0.0))
    assert done.dropped == []
    assert_well(path)
    assert len(read_ids(path, "s")) == OWN_FILE + 200


# What retention drops, and what it hides.


@pytest.mark.promise("dropped-stays-dropped")
@pytest.mark.parametrize("reindexed", [False, True])
def test_a_stream_is_on_record_as_long_as_a_pack_holds_what_was_dropped_of_it(path: Path, reindexed: bool) -> None:
    with opened(path) as store:
        writer = Writer(store)
        gone = writer.events("gone", 40, age_h=48)
        writer.checkpoint(writer.events("stays", 100), gone)
        compact(store, A_DAY)
    if reindexed:
        reindex_at(path)
    ask(path, "UPDATE streams SET dropped_at = datetime(dropped_at, '-25 hours') WHERE dropped_id > 0")
    with opened(path) as store:
        compact(store, A_DAY)
        Writer(store).write(("somebody else",), 3)
    assert_well(path)
    with StoreView(path) as view:
        assert view.reader.stream_of(gone[5].id) in (None, "gone")
    reindex_at(path)
    assert read_ids(path, "gone") == []


@pytest.mark.promise("window-and-requests-spared")
def test_a_limit_in_events_drops_none_that_a_client_may_still_ask_for(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.write(("a",), 50)
        young = set(writer.ids["a"])
        for _ in range(3):
            # As an import of foreign events does: later ids with older times.
            writer.write(("a",), 10, age_h=5)
        compact(store, Retention(max_events=15))
    assert young <= set(read_ids(path, "a"))
    assert_well(path)


@pytest.mark.promise("count-exact-on-reads")
async def test_no_more_is_shown_than_the_limit_though_a_run_ends_with_young_events(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.checkpoint(writer.events("a", 100, age_h=2) + writer.events("a", 5))
    async with deadline(), Log(path, LogOptions(retention=Retention(max_events=20))) as log:
        assert [each.id for each in await log.read("a")] == writer.ids["a"][-20:]


@pytest.mark.promise("verify-no-false-alarm")
def test_a_store_that_begins_after_what_retention_dropped_is_well_after_its_import(path: Path, tmp_path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.write(("a", "b"), 10, age_h=48)
        writer.write(("a", "b"), 10)
        compact(store, A_DAY)
    export_events(path, tmp_path / "export.json")
    copy = tmp_path / "copy.db"
    assert import_events(copy, tmp_path / "export.json").added == 20
    assert_well(copy)


# Rounds of maintenance.


@pytest.mark.promise("maintenance-by-itself")
async def test_retention_goes_on_while_idle_segments_cannot_be_sealed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise full_disk()

    with opened(path) as store:
        Writer(store).write(("a",), 10, age_h=48)
    async with deadline(), Log(path) as log:
        monkeypatch.setattr(SegmentStore, "seal_idle", refuse)
        schedule = Schedule(log, Tasks(A_DAY), 0.01)
        schedule.start()
        await eventually(lambda: schedule.rounds)
        await schedule.stop()
        monkeypatch.undo()
    assert segment_files(path) == []


@pytest.mark.promise("one-does-the-work")
def test_a_backup_is_made_by_one_of_the_processes_that_find_it_due(path: Path) -> None:
    class BackingUp(Interposed):
        def create(self, path: Path) -> int:
            if "objects" in path.parts:
                self.happens()
            return super().create(path)

    tasks = Tasks(Retention(), default_backups(path))
    with opened(path) as other, opened(path, BackingUp(lambda: run_round(other, tasks))) as store:
        Writer(store).write(("a",), 100)
        run_round(store, tasks)
    assert len(list(default_backups(path).glob("*.backup.json"))) == 1


def test_a_round_without_a_backup_keeps_nobody_out_of_the_backups(path: Path) -> None:
    class Asked(Disk):
        def lock(self, path: Path, *, shared: bool = False, wait: bool = False, create: bool = True) -> Lock | None:
            assert shared or path.name != "pool.lock", "it would wait for whoever makes a backup"
            return super().lock(path, shared=shared, wait=wait, create=create)

    with opened(path, Asked()) as store:
        Writer(store).write(("a",), 10)
        create_backup(store, FolderTarget(default_backups(path)))
        results = run_round(store, Tasks(Retention(), default_backups(path)))
    assert "skipped" in results["backup"]


# Damage.


@pytest.mark.promise("rot-copied-again")
def test_an_object_that_has_rotted_is_copied_again_within_a_week(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.time()
    with opened(path) as store:
        writer = Writer(store)
        writer.write(("a",), 100)
        target = FolderTarget(default_backups(path))
        create_backup(store, target)
        rotten = max(target.folder.glob("objects/*/*"), key=lambda each: each.stat().st_size)
        data = bytearray(rotten.read_bytes())
        data[-10] ^= 1
        rotten.write_bytes(data)
        for day in range(7):
            monkeypatch.setattr(time, "time", lambda day=day: now_s + day * DAY_S)
            create_backup(store, target)
    restored = tmp_path / "restored" / "events.db"
    restore(max(target.folder.glob("*.backup.json")), restored)
    assert read_ids(restored, "a") == writer.ids["a"]


@pytest.mark.promise("repair-loses-nothing")
def test_repair_saves_what_lies_around_a_sector_that_cannot_be_read(path: Path) -> None:
    class BadSector(KnownFiles):
        def read(self, fd: int, length: int, offset: int) -> bytes:
            if self.paths[fd] == bad and offset < 8192 and offset + length > 4096:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(fd, length, offset)

    with opened(path) as store:
        writer = Writer(store)
        writer.write(("a", "b"), 100)
    bad = path.with_name("events-log") / "segments" / segment_files(path)[0]
    repaired = repair(path, disk=BadSector())
    assert repaired.report.ok
    shown = {stream: [event_id for event_id, _ in events] for stream, events in read(path, "a", "b").items()}
    assert shown["b"] == writer.ids["b"]
    assert 50 < len(shown["a"]) < 100
    assert set(shown["a"]) < set(writer.ids["a"])
