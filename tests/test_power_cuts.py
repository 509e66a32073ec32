"""One operation, and a power cut before each of its changes to the disk, and after the last: what may be left is right.

The power campaign draws where it cuts; here nothing is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import pytest

from crash_disk import PowerCut, PowerDisk
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget
from logstore.ops.backup.restore import restore
from logstore.ops.backup.rotation import check_backup, delete_old
from logstore.ops.compaction.compact import compact
from logstore.ops.transfer.export import export_store
from logstore.ops.transfer.selection import Selection
from logstore.ops.verify.repair import repair
from logstore.ops.verify.store import verify
from logstore.storage import Log, LogOptions, Retention
from logstore.storage.checkpoint import Journal
from logstore.storage.files import Disk
from logstore.storage.header import frame_seed
from logstore.storage.lane import Reservation, lane_folders, read_reservation
from logstore.storage.opening import log_folder
from logstore.storage.record import encode_frame
from logstore.storage.replacement import is_replacing
from tests.engine import deadline, eventually, in_segments, payloads, small
from tests.ops import backed_up, damaged
from tests.ops.stores import Writer, opened, read_ids

LOOKS = 3
"""States that are drawn for each cut."""
MORE_LOOKS = 20
"""States that are drawn for the cut behind the last change: what was said to be done must be there in each."""
MEMORY = Path("/dev/shm")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """Where SQLite's syncs cost nothing, if there is such a place: the rest is not synced for real."""
    with tempfile.TemporaryDirectory(prefix="logstore-cuts-", dir=MEMORY if MEMORY.is_dir() else tmp_path) as folder:
        home = Path(folder, "disk")
        home.mkdir()
        yield home


@pytest.fixture
def path(home: Path) -> Path:
    return home / "events.db"


class Cuts:
    """Power cuts before each change to the disk, and at last the one after it."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.all: list[PowerCut] = []

    def states(self) -> Iterator[Path]:
        """Yield what may be left by each of them: a folder, which goes with the next one."""
        yield from self._leave((cut, seed) for cut in self.all for seed in range(LOOKS))

    def states_at_the_end(self) -> Iterator[Path]:
        """Yield what may be left when the power goes after the operation."""
        yield from self._leave((self.all[-1], seed) for seed in range(MORE_LOOKS))

    def _leave(self, cuts: Iterable[tuple[PowerCut, int]]) -> Iterator[Path]:
        place = self._home.with_name("left")
        for cut, seed in cuts:
            cut.leave(random.Random(seed), place)
            yield place
            shutil.rmtree(place)


@contextlib.contextmanager
def cutting(disk: PowerDisk) -> Generator[Cuts]:
    """Cut the power before each change that is made in the block, and after it; everything goes on all the same."""
    cuts = Cuts(disk.home)

    def cut(power: PowerCut) -> None:
        cuts.all.append(power)
        disk.cut_at(1, cut)

    disk.cut_at(1, cut)
    yield cuts
    disk.cancel_cuts()
    cuts.all.append(disk.cut())
    assert len(cuts.all) > 3


def disk_of(path: Path) -> PowerDisk:
    """Return a disk that has everything which is there now."""
    return PowerDisk(path.parent, path)


def no_errors(caplog: pytest.LogCaptureFixture) -> bool:
    return not [record for record in caplog.records if record.levelno >= logging.ERROR]


# The log.


async def written(path: Path) -> list[bytes]:
    """Open a log and return what its stream holds."""
    async with Log(path) as log:
        return await payloads(log, "s")


@pytest.mark.promise("power-cut-no-hole")
async def test_a_journal_that_ends_unsynced_is_on_disk_before_the_next_one_says_where(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    late = LogOptions(durability="os", checkpoint_interval_s=3600, journal_file_bytes=64 << 10)
    whole = [f"{number} ".encode() * 8_000 for number in range(12)]
    disk = disk_of(path)
    async with deadline(), Log(path, late, disk) as log:
        with cutting(disk) as cuts:
            for payload in whole:
                await log.append("s", payload)
    for left in cuts.states():
        found = await written(left / path.name)
        assert found == whole[: len(found)]
    # Nothing that a power cut takes of events which nobody synced is damage.
    assert no_errors(caplog)


@pytest.mark.promise("dropped-stays-dropped")
def test_a_journal_that_the_index_has_forgotten_does_not_come_back(path: Path) -> None:
    disk = disk_of(path)
    with opened(path, disk) as store:
        writer, lane = Writer(store), store.lane
        events = writer.events("s", 3)
        lane.write([encode_frame(event, frame_seed(store.store_id)) for event in events], events[-1].id)
        assert lane.journal is not None
        first = lane.journal.path
        lane.rotate()
        # The next one is begun already, so that its folder is not synced for its sake.
        lane.write([], events[-1].id)
        with store.checkpoint_lock():
            journal = Journal(lane.folder, lane.number, int(first.stem))
            store.segments.write(writer.unsegmented([events]), [journal], 0)
        writer.write(("s",), 1)
        cut = disk.cut()
    for seed in range(MORE_LOOKS):
        left = cut.leave(random.Random(seed), path.parent.with_name("left"))
        assert not (left.parent / first.relative_to(path.parent)).exists()
        shutil.rmtree(left.parent)


class FailingOnce(PowerDisk):
    """A disk that refuses to sync one journal."""

    refuses = False

    def sync(self, fd: int) -> None:
        if self.refuses and self._opened[fd][1].suffix == ".journal":
            self.refuses = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync(fd)


@pytest.mark.promise("durable-stays", "catches-up")
async def test_what_is_written_again_after_a_failure_is_on_disk_when_it_is_said_to_be(path: Path) -> None:
    disk = FailingOnce(path.parent, path)
    async with deadline(), Log(path, LogOptions(checkpoint_interval_s=3600), disk) as log:
        await log.append("s", b"1")
        disk.refuses = True
        with cutting(disk) as cuts:
            await log.append("s", b"2")
            await eventually(lambda: log.health().status == "ok")
    for left in cuts.states():
        found = await written(left / path.name)
        assert found in ([b"1"], [b"1", b"2"])
    for left in cuts.states_at_the_end():
        assert await written(left / path.name) == [b"1", b"2"]


@pytest.mark.promise("always-on-disk", "crash-opens")
async def test_what_a_killed_process_did_not_sync_the_next_one_does(path: Path) -> None:
    disk = disk_of(path)
    heirs: list[PowerDisk] = []

    def kill(_: PowerCut) -> None:
        heirs.append(disk.killed(path.parent.with_name(f"heir-{len(heirs)}")))
        disk.cut_at(1, kill)

    disk.cut_at(1, kill)
    async with deadline(), Log(path, small(), disk) as log:
        # One event: while a segment is synced, what goes into the index fits SQLite's memory, and no file changes.
        await log.append("s", b"1")
        await in_segments(log)
        disk.cancel_cuts()
    assert len(heirs) > 30
    for heir in heirs:
        async with Log(heir.home / path.name, LogOptions(), heir) as log:
            shown = await payloads(log, "s")
            await log.append("s", b"of the heir")
            cut = heir.cut()
        for seed in range(LOOKS):
            left = cut.leave(random.Random(seed), path.parent.with_name("left"))
            assert await written(left) == [*shown, b"of the heir"]
            shutil.rmtree(left.parent)
        shutil.rmtree(heir.home)


# Sessions.


@pytest.mark.promise("torn-is-no-damage")
async def test_a_torn_entry_of_the_registry_is_never_in_the_way(path: Path) -> None:
    async with Log(path) as log:
        await log.sessions.open("first", b"")
    registry = path.parent / "events-log" / "registry.log"
    whole = registry.read_bytes()
    registry.write_bytes(whole + whole[-20:] + b"more than the next entry has" * 40)
    disk = disk_of(path)
    with cutting(disk) as cuts:
        async with Log(path, LogOptions(), disk) as log:
            await log.sessions.open("second", b"")
    for left in cuts.states():
        async with Log(left / path.name) as log:
            assert await log.sessions.find("first") is not None
    for left in cuts.states_at_the_end():
        async with Log(left / path.name) as log:
            assert await log.sessions.find("second") is not None


# The index.


@pytest.mark.promise("reindex-whole")
@pytest.mark.parametrize("how", ["reindex", "gone", "damaged"])
def test_an_index_is_made_again_whole(path: Path, how: str) -> None:
    damaged.make(path, grown=2)
    whole = damaged.read(path)
    if how == "gone":
        path.unlink()
    elif how == "damaged":
        damaged.change(path, 0, b"no database at all")
    disk = disk_of(path)
    with cutting(disk) as cuts, opened(path, disk) as store:
        if how == "reindex":
            store.reindex()
    for left in cuts.states():
        with opened(left / path.name):
            assert damaged.read(left / path.name) == whole
    for left in cuts.states_at_the_end():
        assert verify(left / path.name).ok
        assert any(left.glob("events.db.damaged-*")) == (how == "damaged")


def test_a_damaged_index_is_away_for_good_before_the_new_one_comes(path: Path) -> None:
    damaged.make(path, grown=1)
    damaged.change(path, 0, b"no database at all")
    disk = disk_of(path)
    with opened(path, disk):
        pass
    names = [(call, place.name) for call, place in disk.made]
    away = next(at for at, (call, name) in enumerate(names) if call == "rename" and ".damaged-" in name)
    come = names.index(("rename", path.name))
    # A file system need not keep the order of two renames, and the old write-ahead log would pass for the new one's.
    assert ("sync_folder", path.parent.name) in names[away:come]


# Compaction.


def half_dropped(path: Path) -> Writer:
    """Make a store whose stream "old" is dropped, and still in a file with another one."""
    with opened(path) as store:
        writer = Writer(store)
        writer.checkpoint(writer.events("old", 1, age_h=72), writer.events("a", 20, age_h=48))
        writer.write(("a",), 5)
        compact(store, Retention(max_age_s=60 * 3600))
    assert read_ids(path, "old") == []
    return writer


@pytest.mark.promise("dropped-stays-dropped")
def test_what_retention_has_dropped_does_not_come_back_and_the_rest_stays(path: Path) -> None:
    writer = half_dropped(path)
    # Long ago: that anything of it was dropped is forgotten with the last file that holds some of it.
    damaged.execute(path, "update streams set dropped_at = datetime('now', '-2 days') where name = 'old'")
    disk = disk_of(path)
    with cutting(disk) as cuts, opened(path, disk) as store:
        assert compact(store, Retention(max_age_s=3600)).removed_segments == 1
    assert damaged.ask(path, "select name from streams") == [("a",)]
    kept = writer.ids["a"][-5:]
    for left in cuts.states():
        with opened(left / path.name):
            assert read_ids(left / path.name, "a")[-5:] == kept
            assert read_ids(left / path.name, "old") == []
    for left in cuts.states_at_the_end():
        with opened(left / path.name):
            assert read_ids(left / path.name, "a") == kept
        assert verify(left / path.name).ok


# Backups.


def back_up(path: Path, pool: Path, disk: Disk) -> None:
    with opened(path) as store:
        create_backup(store, FolderTarget(pool, disk))


def are_whole(pool: Path) -> bool:
    target = FolderTarget(pool)
    return not [problem for key in target.manifests() for problem in check_backup(target, key)]


@pytest.mark.promise("backup-whole-or-absent")
def test_a_backup_is_whole_or_not_there(path: Path) -> None:
    pool = path.parent / "pool"
    backed_up.write(path, 20)
    disk = disk_of(path)
    with cutting(disk) as cuts:
        back_up(path, pool, disk)
        backed_up.write(path, 20, first=100)
        back_up(path, pool, disk)
    for left in cuts.states():
        assert are_whole(left / "pool")
    for left in cuts.states_at_the_end():
        assert len(FolderTarget(left / "pool").manifests()) == 2


@pytest.mark.promise("backup-whole-or-absent")
def test_old_backups_go_before_what_they_name(path: Path) -> None:
    pool = path.parent / "pool"
    for first in (0, 100, 200):
        backed_up.write(path, 5, first=first)
        back_up(path, pool, Disk())
    disk = disk_of(path)
    with cutting(disk) as cuts:
        assert delete_old(FolderTarget(pool, disk), 0) == 2
    for left in cuts.states():
        assert are_whole(left / "pool")
        assert FolderTarget(left / "pool").manifests()


async def back_up_while_open(path: Path, pool: Path) -> backed_up.Contents:
    """Back a store up as another process does, which has a lane of its own; return what it holds."""
    async with Log(path, backed_up.IN_JOURNALS) as log:
        await backed_up.append(log, 3, first=100)
        await asyncio.to_thread(back_up, path, pool, Disk())
        return await backed_up.read(log)


@pytest.mark.promise("restore-old-or-new", "ids-never-twice")
def test_a_restore_leaves_one_of_the_two_stores(path: Path) -> None:
    pool = path.parent / "pool"
    backed_up.write(path, 20)
    restored = asyncio.run(back_up_while_open(path, pool))
    backed_up.write(path, 20, first=200)
    old = backed_up.contents(path)
    disk = disk_of(path)
    with cutting(disk) as cuts:
        restore(pool, path, disk=disk)
    reserved = reservations(path)
    assert len(reserved) == 2
    for left in cuts.states_at_the_end():
        # Or `verify` would say that a restore is under way.
        assert not is_replacing(log_folder(left / path.name))
        assert reservations(left / path.name) == reserved
        assert backed_up.contents(left / path.name) == restored
    for left in cuts.states():
        assert backed_up.contents(left / path.name) in (old, restored)


@pytest.mark.promise("dropped-stays-dropped")
def test_what_retention_had_dropped_stays_so_in_a_restored_store(path: Path) -> None:
    pool = path.parent / "pool"
    a = half_dropped(path).ids["a"]
    back_up(path, pool, Disk())
    disk = disk_of(path)
    with cutting(disk) as cuts:
        restore(pool, path, disk=disk)
    for left in cuts.states():
        with opened(left / path.name):
            assert (read_ids(left / path.name, "old"), read_ids(left / path.name, "a")) == ([], a)


def reservations(path: Path) -> dict[int, Reservation]:
    """Return what each lane may have given out: lost, it would give that out again when the clock steps back."""
    disk = Disk()
    return {lane: read_reservation(disk, folder) for lane, folder in lane_folders(disk, log_folder(path))}


# Repair.


def damage_a_segment(path: Path) -> set[int]:
    """Change a byte of an event; return its id."""
    file, offset, event_id = damaged.ask(
        path,
        "select file, offset, event_id from events join streams using (stream_id) join segments using (segment_id) "
        "where name = ? order by event_id",
        damaged.GROWN,
    )[50]
    damaged.change(damaged.log_of(path) / file, offset + 100, b"damage")
    return {event_id}


@pytest.mark.promise("repair-loses-nothing")
def test_a_repaired_segment_has_what_was_whole_and_stays_repaired(path: Path) -> None:
    damaged.make(path, grown=1)
    whole = damaged.read(path)
    lost = damage_a_segment(path)
    kept = {stream: [each for each in events if each[0] not in lost] for stream, events in whole.items()}
    disk = disk_of(path)
    with cutting(disk) as cuts:
        assert repair(path, disk=disk).report.ok
    for left in cuts.states():
        with opened(left / path.name):
            assert damaged.read(left / path.name) == kept
    for left in cuts.states_at_the_end():
        assert verify(left / path.name).ok
        assert list((damaged.log_of(left / path.name) / "damaged").glob("*.segment"))


def test_a_lane_stays_repaired(path: Path) -> None:
    damaged.make(path, grown=1)
    with opened(path):
        lane = damaged.DeadLane(path)
        folder = lane.lane.folder
        lane.lane.end()
    damaged.change(folder / "state", 9, b"\xff")
    assert not verify(path).ok
    disk = disk_of(path)
    with cutting(disk) as cuts:
        assert repair(path, disk=disk).report.ok
    for left in cuts.states_at_the_end():
        assert verify(left / path.name).ok


@pytest.mark.promise("repair-loses-nothing")
def test_a_damaged_object_of_a_backup_stays_set_aside(path: Path) -> None:
    pool = path.parent / "events-backups"
    damaged.make(path, grown=1)
    back_up(path, pool, Disk())
    stored = max(pool.glob("objects/*/*"), key=lambda each: each.stat().st_size)
    damaged.change(stored, 100, b"damage")
    disk = disk_of(path)
    with cutting(disk) as cuts:
        repair(path, disk=disk)
    place, aside = stored.relative_to(path.parent), Path("events-backups", "damaged", stored.name)
    for left in cuts.states():
        assert (left / place).exists() != (left / aside).exists()
    for left in cuts.states_at_the_end():
        assert (left / aside).exists()


# Exports.


@pytest.mark.promise("export-whole-or-absent")
def test_an_export_is_whole_or_not_there(path: Path) -> None:
    damaged.make(path, grown=1)
    target = path.parent / "events.ndjson"
    disk = disk_of(path)
    with cutting(disk) as cuts:
        export_store(path, target, Selection(), form="ndjson", disk=disk)
    whole = target.read_bytes()
    for left in cuts.states():
        assert not (left / target.name).exists() or (left / target.name).read_bytes() == whole
    for left in cuts.states_at_the_end():
        assert (left / target.name).read_bytes() == whole
