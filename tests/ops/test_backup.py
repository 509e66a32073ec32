"""A backup holds what was acknowledged when it was begun, is whole or not there, and says what was damaged."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from logstore.cli import main
from logstore.errors import DamageError, FormatVersionError, StoreClosedError, StoreLockedError
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.manifest import Manifest, encode_manifest, manifest_key, read_manifest, time_of
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.backup.restore import restore
from logstore.ops.backup.rotation import check_backup, delete_old, list_backups
from logstore.ops.compaction.compact import compact_at
from logstore.storage import Log, LogOptions, Retention
from logstore.storage.files import Disk, Lock
from logstore.storage.header import frame_seed
from logstore.storage.opening import OpenStore
from logstore.storage.record import Event, encode_frame
from tests.engine import in_segments, process, small
from tests.ops.backed_up import (
    IN_JOURNALS,
    STREAMS,
    DyingDisk,
    append,
    back_up,
    contents,
    every_call,
    flip,
    opened,
    read,
    write,
)
from tests.storage.disks import FaultyDisk, open_descriptors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "events.db"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return tmp_path / "pool"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return tmp_path / "other" / "events.db"


def newest(pool: Path) -> Manifest:
    target = FolderTarget(pool)
    return read_manifest(target, target.manifests()[-1])


def append_raw(store: OpenStore, *, show: bool) -> int:
    """Write an event to the lane of an open store, and let others see it or not."""
    event_id = store.lane.ids.next(1)
    event = Event(event_id, 0, 1, STREAMS[0], 0, b"payload")
    store.lane.write([encode_frame(event, frame_seed(store.store_id))], event_id)
    store.lane.sync()
    if show:
        store.lane.show()
    return event_id


# What is in it.


@pytest.mark.promise("backup-holds-acknowledged")
async def test_a_running_log_is_backed_up_by_its_own_process_and_by_another(
    path: Path, pool: Path, tmp_path: Path
) -> None:
    async with Log(path, small()) as log:
        await append(log, 100)
        store, _ = await log._session_parts()
        own = await asyncio.to_thread(create_backup, store, FolderTarget(pool))
        foreign = await asyncio.to_thread(back_up, path, pool)
        before = await read(log)
        await append(log, 20, first=1_000)
    assert own.events == foreign.events == 400
    for number, backup in enumerate((own, foreign)):
        place = tmp_path / str(number) / "events.db"
        await asyncio.to_thread(restore, Path(backup.path), place)
        assert await asyncio.to_thread(contents, place) == before


@pytest.mark.promise("backup-holds-acknowledged")
async def test_journals_of_every_lane_are_in_it(path: Path, pool: Path, other: Path) -> None:
    async with Log(path, IN_JOURNALS) as first, Log(path, IN_JOURNALS) as second:
        await append(first, 10)
        await append(second, 10)
        result = await asyncio.to_thread(back_up, path, pool)
        before = await read(first)
    assert [file.events for file in newest(pool).files if file.kind == "journal"] == [40, 40]
    assert result.events == 80
    await asyncio.to_thread(restore, pool, other)
    assert await asyncio.to_thread(contents, other) == before


@pytest.mark.promise("backup-holds-acknowledged")
async def test_what_a_killed_process_acknowledged_is_in_it(path: Path, pool: Path, other: Path) -> None:
    script = """
import asyncio, sys
from logstore.storage import Log, LogOptions
async def main():
    log = Log(sys.argv[1], LogOptions(checkpoint_interval_s=3600))
    print(await log.append(sys.argv[2], b"payload"))
    await asyncio.sleep(3600)
asyncio.run(main())
"""
    with process(script, path, STREAMS[0]) as writer:
        event_id = int(await writer.line())
    await asyncio.to_thread(back_up, path, pool)
    await asyncio.to_thread(restore, pool, other)
    assert (await asyncio.to_thread(contents, other))[STREAMS[0]] == [(event_id, b"payload")]


@pytest.mark.promise("backup-nothing-else")
def test_what_nobody_may_see_yet_is_not_in_it(path: Path, pool: Path, other: Path) -> None:
    with opened(path) as writing:
        shown = append_raw(writing, show=True)
        append_raw(writing, show=False)
        assert back_up(path, pool).events == 1
    restore(pool, other)
    assert contents(other)[STREAMS[0]] == [(shown, b"payload")]


@pytest.mark.promise("backup-nothing-else")
def test_an_event_that_a_crash_left_in_a_journal_and_in_a_segment_counts_once(
    path: Path, pool: Path, other: Path
) -> None:
    """As a checkpoint leaves it that could not commit, when another process has indexed its segment since."""
    with opened(path) as writing:
        append_raw(writing, show=True)
        lane = writing.lane.folder
        with opened(path) as second:
            copy = second.root / "lanes" / "0009"
            copy.mkdir()
            for file in lane.iterdir():
                if file.suffix == ".journal":
                    (copy / file.name).write_bytes(file.read_bytes())
            second.adopt_dead_lanes()
        assert back_up(path, pool).events == 1
    assert {file.kind for file in newest(pool).files} == {"registry", "segment", "journal"}
    assert restore(pool, other).events == 1


@pytest.mark.promise("backup-incremental")
async def test_the_second_of_two_backups_copies_almost_nothing_and_reads_no_sealed_segment(
    path: Path, pool: Path
) -> None:
    async with Log(path, small()) as log:
        await append(log, 300)
        await in_segments(log)
    first = await asyncio.to_thread(back_up, path, pool)
    disk = FaultyDisk()
    store = await asyncio.to_thread(OpenStore, disk, path, 1 << 20)
    disk.calls.clear()
    second = await asyncio.to_thread(create_backup, store, FolderTarget(pool))
    await asyncio.to_thread(store.close, empty=True)
    assert first.bytes_copied > 400_000
    assert (second.bytes_copied, second.bytes_reused) == (0, first.bytes_copied)
    assert second.path > first.path
    assert not [name for kind, name in disk.calls if kind == "open" and name.endswith(".segment")]


@pytest.mark.promise("backup-holds-up-nobody")
def test_locks_are_not_held_while_bytes_are_copied(path: Path, pool: Path) -> None:
    write(path, 50)
    held: list[str] = []

    def look(what: str, done: int, total: int | None) -> None:
        for name in ("checkpoint.lock", "registry.lock"):
            lock = Disk().lock(path.parent / "events-log" / name)
            if lock is None:
                held.append(name)
            else:
                lock.release()
        assert Disk().lock(path.parent / "events-log" / "removal.lock") is None
        assert 0 < done <= (total or 0)

    with opened(path) as store:
        create_backup(store, FolderTarget(pool), progress=look)
    assert held == []
    Disk().lock(path.parent / "events-log" / "removal.lock").release()  # type: ignore[union-attr]


class CompactingDisk(Disk):
    """A disk on which another process compacts the store just before a backup holds its segments."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.removed = 0

    def lock(self, path: Path, *, shared: bool = False, wait: bool = False, create: bool = True) -> Lock | None:
        if path.name == "removal.lock" and shared and not self.removed:
            self.removed = compact_at(self._path, Retention(max_age_s=0.0)).removed_segments
        return super().lock(path, shared=shared, wait=wait, create=create)


@pytest.mark.promise("backup-verifies")
def test_what_a_backup_names_is_held_before_it_is_chosen(path: Path, pool: Path) -> None:
    write(path, 50)
    disk = CompactingDisk(path)
    store = OpenStore(disk, path, LogOptions().segment_bytes)
    try:
        result = create_backup(store, FolderTarget(pool))
    finally:
        store.close(empty=True)
    assert disk.removed
    assert (result.events, result.damaged) == (0, ())


def test_nothing_stays_open(path: Path, pool: Path) -> None:
    with opened(path) as writing:
        append_raw(writing, show=True)
        with opened(path) as store:
            create_backup(store, FolderTarget(pool))
            before = open_descriptors()
            create_backup(store, FolderTarget(pool))
            assert open_descriptors() == before


def test_a_backup_is_given_up_when_its_store_is_closed(path: Path, pool: Path) -> None:
    write(path, 30)
    with opened(path) as store:
        store.stopping.set()
        with pytest.raises(StoreClosedError):
            create_backup(store, FolderTarget(pool))
        assert list_backups(FolderTarget(pool)) == []
        store.stopping.clear()
        assert create_backup(store, FolderTarget(pool)).bytes_reused > 0


def test_files_of_a_backup_are_private(path: Path, pool: Path) -> None:
    write(path, 1)
    back_up(path, pool)
    for file in pool.rglob("*"):
        assert file.stat().st_mode & 0o077 == 0, file


def test_backups_stand_beside_the_catalogue_unless_told_otherwise() -> None:
    assert default_backups(Path("a/events.db")) == Path("a/events-backups")


# Damage in the store.


def sealed(path: Path) -> list[Path]:
    with closing(sqlite3.connect(path)) as catalogue:
        rows = catalogue.execute("SELECT file FROM segments WHERE sealed ORDER BY segment_id").fetchall()
    return [path.parent / "events-log" / file for (file,) in rows]


@pytest.mark.promise("backup-names-damage")
def test_a_damaged_segment_is_copied_as_it_is_and_named(path: Path, pool: Path, other: Path) -> None:
    write(path, 300)
    before = contents(path)
    victim = sealed(path)[0]
    flip(victim, 200)
    result = back_up(path, pool)
    assert len(result.damaged) == 1
    assert victim.name in result.damaged[0]
    (file,) = newest(pool).damaged
    assert (pool / file.key).read_bytes() == victim.read_bytes()
    assert check_backup(FolderTarget(pool), Path(result.path).name) == []
    again = back_up(path, pool)
    assert (again.bytes_copied, again.damaged) == (0, result.damaged)
    assert restore(pool, other).damaged == result.damaged
    found = contents_up_to_gaps(other)
    assert sum(map(len, found.values())) > 0
    for stream, events in found.items():
        assert events == [event for event in before[stream] if event in events]


def contents_up_to_gaps(path: Path) -> dict[str, list[tuple[int, bytes]]]:
    async def run() -> dict[str, list[tuple[int, bytes]]]:
        async with Log(path) as log:
            return {
                stream: [(event.id, event.payload) for event in await log.read(stream, None, 100_000)]
                for stream in STREAMS
            }

    return asyncio.run(run())


@pytest.mark.promise("backup-names-damage")
def test_the_good_bytes_of_a_segment_that_rots_later_are_kept(path: Path, pool: Path, other: Path) -> None:
    write(path, 300)
    before = contents(path)
    back_up(path, pool)
    flip(sealed(path)[0], 200)
    assert back_up(path, pool).damaged == ()
    restore(pool, other)
    assert contents(other) == before


@pytest.mark.promise("backup-names-damage")
def test_a_lost_segment_does_not_stop_a_backup(path: Path, pool: Path, other: Path) -> None:
    write(path, 300)
    with opened(path) as store:
        victim = sealed(path)[0]
        victim.unlink()
        result = create_backup(store, FolderTarget(pool))
    assert len(result.damaged) == 1
    assert "cannot be read" in result.damaged[0]
    assert restore(pool, other).events < result.events


@pytest.mark.promise("backup-names-damage")
def test_damage_in_a_segment_that_is_not_sealed_and_in_a_journal_is_named(path: Path, pool: Path) -> None:
    write(path, 30)
    with closing(sqlite3.connect(path)) as catalogue, catalogue:
        catalogue.execute("UPDATE segments SET sealed = 0, sha256 = NULL")
        (events,) = catalogue.execute("SELECT sum(events) FROM segments").fetchone()
    with opened(path) as writing:
        append_raw(writing, show=True)
        assert back_up(path, pool).damaged == ()
        assert sum(file.events or 0 for file in newest(pool).files) == events + 1
        segments = sorted((path.parent / "events-log" / "segments").iterdir())
        flip(segments[0], 100)
        (journal,) = writing.lane.folder.glob("*.journal")
        flip(journal, 4096 + 60)
        damaged = back_up(path, pool).damaged
    assert [line.partition(":")[0] for line in damaged] == [
        f"lanes/0000/{journal.name}",
        f"segments/{segments[0].name}",
    ]


def test_a_damaged_registry_costs_the_sessions_only(path: Path, pool: Path, other: Path) -> None:
    write(path, 10)

    async def sessions() -> None:
        async with Log(path) as log:
            for key in ("a", "b", "c"):
                await log.sessions.open(key, b"")

    asyncio.run(sessions())
    before = contents(path)
    with opened(path) as store:
        flip(path.parent / "events-log" / "registry.log", 90)
        result = create_backup(store, FolderTarget(pool))
    assert [line.partition(":")[0] for line in result.damaged] == ["registry.log"]
    restore(pool, other)
    assert contents(other) == before


# Damage in the pool.


@pytest.mark.promise("backup-whole-or-absent")
def test_a_manifest_that_was_cut_off_or_altered_is_refused(path: Path, pool: Path) -> None:
    write(path, 1)
    backup = Path(back_up(path, pool).path)
    target, key = FolderTarget(pool), backup.name
    good = backup.read_bytes()
    for length in range(0, len(good) - 1, 7):
        backup.write_bytes(good[:length])
        with pytest.raises(DamageError):
            read_manifest(target, key)
    for place in range(0, len(good) - 1, 5):
        backup.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(DamageError):
            read_manifest(target, key)
    assert "whole manifest" in str(list_backups(target)[0].problem) or list_backups(target)[0].problem
    backup.write_bytes(good)
    assert list_backups(target)[0].problem is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"engine":', b'"extra": ' + b"[" * 20_000 + b', "engine":'),
        (b'"engine": "', b'"engine": "\xff'),
        (b"registry.log", b"registry.log\\n"),
        (b'"begun": "', b'"begun": "Friday '),
        (b"+00:00", b""),
        (b'"store_id": ', b'"store_id": -'),
        (b'"reserved_id": ', b'"reserved_id": 9'),
    ],
)
def test_a_manifest_that_somebody_made_up_is_refused(path: Path, pool: Path, old: bytes, new: bytes) -> None:
    write(path, 1)
    backup = Path(back_up(path, pool).path)
    _, _, rest = backup.read_bytes().partition(b'"backup":')
    assert old in rest
    inner = rest.strip()[:-1].replace(old, new)
    digest = hashlib.sha256(inner).hexdigest().encode()
    backup.write_bytes(b'{"sha256":"' + digest + b'","backup":' + inner + b"}")
    with pytest.raises(DamageError, match="no whole manifest"):
        read_manifest(FolderTarget(pool), backup.name)
    assert "no whole manifest" in str(list_backups(FolderTarget(pool))[0].problem)


def test_a_manifest_that_names_a_file_twice_is_refused(path: Path, pool: Path) -> None:
    write(path, 1)
    backup = Path(back_up(path, pool).path)
    manifest = newest(pool)
    backup.write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=manifest.files * 2)))
    with pytest.raises(DamageError, match="twice"):
        read_manifest(FolderTarget(pool), backup.name)


@pytest.mark.promise("newer-format-refused")
def test_a_manifest_of_a_newer_release_is_refused_and_kept(path: Path, pool: Path) -> None:
    write(path, 1)
    back_up(path, pool)
    target = FolderTarget(pool)
    newer = msgspec.structs.replace(newest(pool), version=2)
    key = manifest_key(datetime.now(UTC) - timedelta(days=100))
    target.put(key, [encode_manifest(newer)])
    with pytest.raises(FormatVersionError):
        read_manifest(target, key)
    assert delete_old(target, 1) == 0
    assert len(target.manifests()) == 2


@pytest.mark.promise("backup-verifies")
def test_every_changed_byte_of_a_backup_is_found(path: Path, pool: Path) -> None:
    write(path, 3)
    result = back_up(path, pool)
    target, key = FolderTarget(pool), Path(result.path).name
    assert check_backup(target, key) == []
    for file in newest(pool).files:
        victim = pool / file.key
        good = victim.read_bytes()
        for place in range(0, len(good), max(1, len(good) // 20)):
            flip(victim, place)
            (problem,) = check_backup(target, key)
            assert problem.startswith(file.path)
            flip(victim, place)
        victim.unlink()
        (problem,) = check_backup(target, key)
        assert "missing" in problem
        assert "missing" in (list_backups(target)[0].problem or "")
        victim.write_bytes(good)
    assert check_backup(target, key) == []


def test_an_object_of_another_length_is_written_again(path: Path, pool: Path) -> None:
    write(path, 3)
    back_up(path, pool)
    victim = max(FolderTarget(pool).objects(), key=lambda key: (pool / key).stat().st_size)
    good = (pool / victim).read_bytes()
    (pool / victim).write_bytes(good[:-1])
    assert back_up(path, pool).bytes_copied == len(good)
    assert (pool / victim).read_bytes() == good


# Interrupted.


@pytest.mark.promise("backup-whole-or-absent")
def test_whatever_call_of_the_pools_disk_fails_every_manifest_there_is_whole(path: Path, pool: Path) -> None:
    write(path, 20)
    at = 0
    with opened(path) as store:
        for at in every_call():
            disk = DyingDisk(at)
            target = FolderTarget(pool / str(at), disk)
            try:
                create_backup(store, target)
                died = False
            except OSError:
                died = True
            healed = FolderTarget(pool / str(at))
            for backup in list_backups(healed):
                assert check_backup(healed, backup.key) == []
            create_backup(store, healed)
            delete_old(healed, 0)
            assert len(healed.manifests()) == 1
            assert {file.key for file in read_manifest(healed, healed.manifests()[0]).files} == set(healed.objects())
            assert not list((pool / str(at)).rglob("*.tmp"))
            if not died:
                break
    assert at > 10


@pytest.mark.promise("backup-whole-or-absent")
def test_the_manifest_comes_after_all_that_it_names_is_on_disk(path: Path, pool: Path) -> None:
    write(path, 1)
    disk = FaultyDisk()
    with opened(path) as store:
        create_backup(store, FolderTarget(pool, disk))
    calls = [(kind, name.partition(".")[0] if kind != "sync_folder" else name) for kind, name in disk.calls]
    objects = [key.rpartition("/")[2] for key in FolderTarget(pool).objects()]
    manifest = next(place for place, (kind, name) in enumerate(disk.calls) if kind == "create" and ".backup." in name)
    for name in objects:
        steps = [calls.index((kind, name)) for kind in ("create", "sync", "rename")]
        assert steps == sorted(steps)
        folder = max(place for place, call in enumerate(calls[:manifest]) if call == ("sync_folder", name[:2]))
        assert steps[-1] < folder < manifest
    assert calls[-1] == ("sync_folder", "pool")


# Rotation.


def aged(pool: Path, days: float) -> None:
    """Make the newest backup older."""
    target = FolderTarget(pool)
    key = target.manifests()[-1]
    moment = time_of(key)
    assert moment is not None
    (pool / key).rename(pool / manifest_key(moment - timedelta(days=days)))


@pytest.mark.promise("backup-incremental", "newest-stays")
def test_old_backups_go_and_what_only_they_named(path: Path, pool: Path, other: Path) -> None:
    write(path, 100)
    for days in (30, 20, 3):
        write(path, 20, first=days * 1_000)
        with opened(path) as store:
            store.registry.open_session(str(days), store.lane.incarnation, 0, b"")
        back_up(path, pool)
        aged(pool, days)
    target = FolderTarget(pool)
    (pool / "objects" / "ab").mkdir(exist_ok=True)
    (pool / "objects" / "ab" / ("ab" * 32)).write_bytes(b"left by a backup that died")
    (pool / "objects" / "ab" / "half.tmp").write_bytes(b"likewise")
    assert delete_old(target, 40) == 0
    assert not (pool / "objects" / "ab" / "half.tmp").exists()
    before = len(list(target.objects()))
    assert delete_old(target, 7) == 2
    (left,) = target.manifests()
    assert {file.key for file in read_manifest(target, left).files} == set(target.objects())
    assert len(list(target.objects())) < before
    restore(pool, other)
    assert contents(other) == contents(path)
    # The last one stays, however old.
    assert delete_old(target, 0) == 0


@pytest.mark.promise("newest-stays")
def test_the_newest_whole_backup_stays_when_newer_ones_are_not_whole(path: Path, pool: Path) -> None:
    write(path, 100)
    back_up(path, pool)
    aged(pool, 30)
    write(path, 100, first=1_000)
    back_up(path, pool)
    target = FolderTarget(pool)
    old, new = target.manifests()
    only_new = {file.key for file in read_manifest(target, new).files} - {
        file.key for file in read_manifest(target, old).files
    }
    (pool / only_new.pop()).unlink()
    assert delete_old(target, 7) == 0
    assert check_backup(target, old) == []
    assert check_backup(target, new) != []


def test_the_newest_whole_backup_stays_when_newer_ones_are_of_a_damaged_store(path: Path, pool: Path) -> None:
    write(path, 30)
    back_up(path, pool)
    before = contents(path)
    aged(pool, 30)
    target = FolderTarget(pool)
    (whole,) = target.manifests()
    write(path, 30, first=1_000)
    sealed(path)[-1].unlink()
    for days in (20, 10, 0):
        assert back_up(path, pool).damaged
        aged(pool, days)
    # Of those that lack something the newest is enough.
    assert delete_old(target, 7) == 2
    assert target.manifests()[0] == whole
    restore(pool / whole, path)
    assert contents(path) == before
    back_up(path, pool)
    assert delete_old(target, 0) == 2


@pytest.mark.promise("newest-stays")
def test_as_long_as_a_manifest_cannot_be_read_no_object_goes(path: Path, pool: Path) -> None:
    write(path, 10)
    back_up(path, pool)
    flip(next(pool.glob("*.backup.json")), 400)
    back_up(path, pool)
    target = FolderTarget(pool)
    (pool / "objects" / "ab").mkdir(exist_ok=True)
    kept = pool / "objects" / "ab" / ("ab" * 32)
    kept.write_bytes(b"perhaps named")
    assert delete_old(target, 7) == 0
    assert kept.exists()
    (pool / target.manifests()[0]).rename(pool / manifest_key(datetime.now(UTC) - timedelta(days=8)))
    assert delete_old(target, 7) == 1
    assert not kept.exists()


@pytest.mark.promise("newest-stays")
def test_a_rotation_that_dies_anywhere_leaves_whole_backups(path: Path, pool: Path) -> None:
    write(path, 10)
    at = 0
    with opened(path) as store:
        for at in every_call():
            place = pool / str(at)
            target = FolderTarget(place)
            create_backup(store, target)
            aged(place, 9)
            (place / "objects" / "ab").mkdir(exist_ok=True)
            (place / "objects" / "ab" / ("ab" * 32)).write_bytes(b"left")
            create_backup(store, target)
            disk = DyingDisk(at)
            try:
                delete_old(FolderTarget(place, disk), 7)
            except OSError:
                assert disk.died
            for backup in list_backups(target):
                assert check_backup(target, backup.key) == []
            delete_old(target, 7)
            assert len(target.manifests()) == 1
            assert not (place / "objects" / "ab" / ("ab" * 32)).exists()
            if not disk.died:
                break
    assert at > 3


@pytest.mark.promise("lock-holder-named")
def test_rotation_and_backup_wait_for_each_other(path: Path, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, 10)
    back_up(path, pool)
    target = FolderTarget(pool)
    monkeypatch.setattr("logstore.ops.backup.pool._PATIENCE_S", 0.0)
    with target.adding():
        back_up(path, pool)
        with pytest.raises(StoreLockedError, match=str(os.getpid())):
            delete_old(target, 0)
    with target.removing(), pytest.raises(StoreLockedError):
        back_up(path, pool)


@pytest.mark.promise("backup-holds-up-nobody")
def test_a_backup_waits_for_who_removes_segments(path: Path, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, 10)
    monkeypatch.setattr("logstore.ops.backup.pool._PATIENCE_S", 0.0)
    lock = Disk().lock(path.parent / "events-log" / "removal.lock")
    assert lock is not None
    with lock, pytest.raises(StoreLockedError):
        back_up(path, pool)
    back_up(path, pool)


def test_a_copy_that_cannot_be_written_is_restored(path: Path, pool: Path, other: Path) -> None:
    write(path, 10)
    back_up(path, pool)
    (pool / "pool.lock").unlink()
    restore(pool, other)
    assert not (pool / "pool.lock").exists()
    assert contents(other) == contents(path)


# The command.


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_commands_back_up_list_and_restore(path: Path, pool: Path, other: Path) -> None:
    write(path, 10)
    done = run("backup", path, "--to", pool, "--json")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["bytes_copied"] > 0
    assert (figures["events"], figures["bytes_reused"], figures["deleted"], figures["damaged"]) == (40, 0, 0, [])
    aged(pool, 9)
    again = run("backup", path, "--to", pool, "--delete-older-than", "7")
    assert again.exit_code == 0, again.output
    assert "old ones removed  1" in again.stdout
    listed = json.loads(run("backup", path, "--to", pool, "--list", "--json").stdout)
    assert [(backup["events"], backup["problem"]) for backup in listed] == [(40, None)]
    assert "whole" in run("backup", path, "--to", pool, "--list").stdout
    restored = run("restore", listed[0]["path"], other, "--json")
    assert restored.exit_code == 0, restored.output
    assert json.loads(restored.stdout)["events"] == 40
    assert contents(other) == contents(path)
    assert run("restore", pool, other, "--until", "2020-01-01T00:00:00Z").exit_code == 0
    assert contents(other) == {stream: [] for stream in STREAMS}


@pytest.mark.promise("errors-are-one-line")
def test_the_commands_refuse_in_one_line(path: Path, pool: Path, other: Path) -> None:
    assert run("backup", path).exit_code == 1
    write(path, 10)
    assert run("backup", path).exit_code == 0
    assert default_backups(path).is_dir()
    with opened(path):
        refused = run("restore", default_backups(path), path)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert str(os.getpid()) in refused.stderr
    next(path.parent.glob("events-backups/objects/*/*")).unlink()
    refused = run("restore", default_backups(path), path)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert run("backup", path, "--list").exit_code == 1
    assert run("restore", pool, other, "--until", "yesterday").exit_code == 2
    assert run("backup", path, "--list", "--delete-older-than", "1").exit_code == 2


def test_the_command_says_what_was_damaged(path: Path, pool: Path, other: Path) -> None:
    write(path, 300)
    flip(sealed(path)[0], 200)
    done = run("backup", path, "--to", pool)
    assert done.exit_code == 1
    assert "damaged" in done.stderr
    done = run("restore", pool, other)
    assert done.exit_code == 1
    assert "damaged" in done.stderr


def test_the_script_is_the_command(path: Path) -> None:
    write(path, 1)
    script = Path(__file__).parents[2] / "tools" / "backup.py"
    done = subprocess.run([sys.executable, str(script), str(path), "--json"], capture_output=True, check=True)
    assert Path(json.loads(done.stdout)["path"]).exists()
