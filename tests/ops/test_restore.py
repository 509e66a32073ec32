"""A restored store is the backup's whole or the old one whole, whatever fails and wherever it is interrupted."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import sqlite3
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from logstore.errors import DamageError, GapError, LogstoreError, NotAStoreError, StoreLockedError, WriteFailedError
from logstore.ops.access import StoreView, open_existing
from logstore.ops.backup.manifest import read_manifest
from logstore.ops.backup.pool import FolderTarget
from logstore.ops.backup.restore import RestoreResult, restore, restore_from
from logstore.storage import Log
from logstore.storage.files import Disk
from logstore.storage.header import frame_seed
from logstore.storage.lane import Reservation, first_reservation, read_reservation
from logstore.storage.opening import OpenStore
from logstore.storage.record import Event, encode_frame
from logstore.storage.replacement import is_replacing
from tests.engine import process
from tests.ops.backed_up import (
    IN_JOURNALS,
    STREAMS,
    Contents,
    DyingDisk,
    append,
    back_up,
    contents,
    every_call,
    flip,
    opened,
    read,
    snapshot,
    write,
)
from tests.storage.disks import Fault, FaultyDisk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "events.db"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return tmp_path / "pool"


def in_journals(path: Path, pool: Path) -> Contents:
    """Back up a store whose newest events are in journals only; return what it holds."""

    async def run() -> Contents:
        async with Log(path, IN_JOURNALS) as log:
            await append(log, 3, first=1_000)
            await log.sessions.open("key", b"data", "stream")
            await asyncio.to_thread(back_up, path, pool)
            return await read(log)

    return asyncio.run(run())


def digests(path: Path) -> dict[int, str]:
    with closing(sqlite3.connect(path)) as catalogue:
        return dict(catalogue.execute("SELECT segment_id, sha256 FROM segments WHERE sealed"))


# What it makes.


def test_a_backup_becomes_a_store_in_an_empty_place(path: Path, pool: Path, tmp_path: Path) -> None:
    write(path, 300)
    before = in_journals(path, pool)
    other = tmp_path / "elsewhere" / "deep" / "other.db"
    result = restore(pool, other)
    assert result.path == str(other)
    assert result.events == sum(map(len, before.values())) == 4 * 303
    assert (result.left_out, result.damaged) == (0, ())
    assert contents(other) == before
    assert not {"restoring", "replaced", "replacing"} & {file.name for file in (other.parent / "other-log").iterdir()}


def test_sealed_segments_keep_their_digest(path: Path, pool: Path, tmp_path: Path) -> None:
    write(path, 300)
    back_up(path, pool)
    restore(pool, tmp_path / "other" / "events.db")
    assert digests(path)
    assert digests(path).items() <= digests(tmp_path / "other" / "events.db").items()


def test_a_backup_takes_the_place_of_a_closed_store(path: Path, pool: Path) -> None:
    write(path, 100)
    before = in_journals(path, pool)
    write(path, 50, first=2_000)
    (path.parent / "events-log" / "damaged").mkdir(exist_ok=True)
    (path.parent / "events-log" / "damaged" / "something").write_bytes(b"of the old store")
    restore(pool, path)
    assert contents(path) == before
    assert list((path.parent / "events-log" / "damaged").iterdir()) == []
    assert not {"restoring", "replaced", "replacing"} & {file.name for file in (path.parent / "events-log").iterdir()}


def test_a_store_whose_catalogue_cannot_be_opened_is_replaced_all_the_same(path: Path, pool: Path) -> None:
    write(path, 20)
    before = contents(path)
    back_up(path, pool)
    # SQLite finds no file where it needs one, and says no more than that it cannot open the database.
    path.with_name("events.db-wal").mkdir()
    restore(pool, path)
    assert contents(path) == before


@pytest.mark.promise("restore-old-or-new")
def test_the_write_ahead_log_of_the_old_catalogue_does_not_pass_for_the_new_ones(
    path: Path, pool: Path, tmp_path: Path
) -> None:
    """As a killed process leaves it: SQLite finds the log by name."""
    write(path, 20)
    before = in_journals(path, pool)
    killed = tmp_path / "killed" / "events.db"
    write(path, 50, first=2_000)
    with opened(path) as store:
        journalled(store, STREAMS[0], [[1, 2, 3]])
        with opened(path):
            pass
        with store.catalogue.transaction():
            store.catalogue.connection.execute("UPDATE streams SET name = 'of the old one ' || name")
        shutil.copytree(path.parent, killed.parent)
    assert killed.with_name("events.db-wal").stat().st_size > 0
    restore(pool, killed)
    assert contents(killed) == before
    assert sorted(file.name for file in killed.parent.iterdir()) == ["events-log", "events.db"]


def test_a_restored_store_is_written_on(path: Path, pool: Path) -> None:
    write(path, 20)
    before = in_journals(path, pool)
    restore(pool, path)
    write(path, 5, first=3_000)
    after = contents(path)
    for stream in STREAMS:
        assert after[stream][:-5] == before[stream]
        assert [event_id for event_id, _ in after[stream]] == sorted({event_id for event_id, _ in after[stream]})


@pytest.mark.promise("sessions-restored")
async def test_sessions_come_back(path: Path, pool: Path, tmp_path: Path) -> None:
    await asyncio.to_thread(write, path, 1)
    await asyncio.to_thread(in_journals, path, pool)
    other = tmp_path / "other" / "events.db"
    await asyncio.to_thread(restore, pool, other)
    async with Log(other) as log:
        session = await log.sessions.find("key")
        assert session is not None
        assert (session.data, session.stream_prefix) == (b"data", "stream")
        taken = await log.sessions.take_over("key")
        assert taken is not None
        assert taken.incarnation != session.incarnation


@pytest.mark.promise("ids-never-twice")
def test_no_id_of_the_replaced_store_is_given_out_again(path: Path, pool: Path) -> None:
    """Its clock may have been ahead of the one that the restored store sees."""
    write(path, 1)
    back_up(path, pool)
    lane = path.parent / "events-log" / "lanes" / "0007"
    lane.mkdir()
    ahead = Reservation(read_reservation(Disk(), lane.with_name("0000")).event_id + (1 << 50), 77)
    first_reservation(Disk(), lane, ahead)
    restore(pool, path)
    assert read_reservation(Disk(), lane) == ahead
    write(path, 1)
    assert min(events[-1][0] for events in contents(path).values()) > ahead.event_id


@pytest.mark.promise("ids-never-twice")
def test_no_id_of_the_backed_up_store_is_given_out_again(path: Path, pool: Path, tmp_path: Path) -> None:
    write(path, 1)
    lane = path.parent / "events-log" / "lanes" / "0007"
    lane.mkdir()
    ahead = Reservation(read_reservation(Disk(), lane.with_name("0000")).event_id + (1 << 50), 77)
    first_reservation(Disk(), lane, ahead)
    back_up(path, pool)
    other = tmp_path / "other" / "events.db"
    restore(pool, other)
    write(other, 1)
    assert min(events[-1][0] for events in contents(other).values()) > ahead.event_id


@pytest.mark.promise("dropped-stays-dropped")
def test_what_retention_dropped_stays_dropped(path: Path, pool: Path, tmp_path: Path) -> None:
    write(path, 30)
    before = contents(path)
    dropped_id = before[STREAMS[1]][9][0]
    with closing(sqlite3.connect(path)) as catalogue, catalogue:
        catalogue.execute("UPDATE streams SET dropped_id = ? WHERE name = ?", (dropped_id, STREAMS[1]))
    back_up(path, pool)
    other = tmp_path / "other" / "events.db"
    assert restore(pool, other).events == 30 * 4 - 10
    assert contents(other) == {**before, STREAMS[1]: before[STREAMS[1]][10:]}
    with StoreView(other) as view:
        assert {summary.stream: summary.events for summary in view.summaries()}[STREAMS[1]] == 20
        with pytest.raises(GapError):
            view.read(STREAMS[1], dropped_id - 1, 10)


# What it refuses.


@pytest.mark.promise("restore-refused-while-open")
def test_an_open_store_is_not_replaced_and_its_process_is_named(path: Path, pool: Path) -> None:
    write(path, 10)
    back_up(path, pool)
    script = """
import sys
from pathlib import Path
from logstore.storage.files import Disk
from logstore.storage.opening import OpenStore
store = OpenStore(Disk(), Path(sys.argv[1]), 1 << 20)
print("open")
sys.stdin.readline()
"""

    async def run() -> None:
        with process(script, path) as other:
            await other.line()
            with pytest.raises(StoreLockedError, match=str(other.pid)) as refused:
                await asyncio.to_thread(restore, pool, path)
            assert refused.value.pids == (other.pid,)

    asyncio.run(run())


@pytest.mark.promise("backup-verifies")
@pytest.mark.parametrize("kind", ["segment", "journal", "registry"])
@pytest.mark.parametrize("how", ["gone", "short", "changed"])
def test_a_damaged_backup_is_refused_and_the_store_is_as_it_was(path: Path, pool: Path, kind: str, how: str) -> None:
    write(path, 100)
    in_journals(path, pool)
    write(path, 10, first=2_000)
    target = FolderTarget(pool)
    manifest = read_manifest(target, target.manifests()[-1])
    victim = pool / next(file.key for file in manifest.files if file.kind == kind)
    if how == "gone":
        victim.unlink()
    elif how == "short":
        victim.write_bytes(victim.read_bytes()[:-1])
    else:
        flip(victim, victim.stat().st_size // 2)
    before = snapshot(path.parent)
    with pytest.raises(DamageError):
        restore(pool, path)
    assert snapshot(path.parent) == before


@pytest.mark.promise("names-are-no-paths")
def test_a_manifest_that_names_other_places_is_refused(path: Path, pool: Path, tmp_path: Path) -> None:
    """Its checksum shows accidents; whoever made it up can compute one."""
    write(path, 1)
    backup = Path(back_up(path, pool).path)
    _, _, rest = backup.read_bytes().partition(b'"backup":')
    inner = rest.strip()[:-1].replace(b"registry.log", b"../../etc/evil")
    digest = hashlib.sha256(inner).hexdigest().encode()
    backup.write_bytes(b'{"sha256":"' + digest + b'","backup":' + inner + b"}")
    with pytest.raises(DamageError, match="no whole manifest"):
        restore(backup, tmp_path / "other" / "events.db")


@pytest.mark.promise("backup-verifies")
def test_the_backup_of_fewer_events_than_it_says_is_refused(
    path: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, 10)
    back_up(path, pool)
    monkeypatch.setattr("logstore.ops.backup.restore.count_live", lambda catalogue: 39)
    with pytest.raises(DamageError, match="39 events and says 40"):
        restore(pool, tmp_path / "other" / "events.db")


@pytest.mark.promise("foreign-file-untouched")
def test_a_place_that_is_no_store_is_refused(path: Path, pool: Path, tmp_path: Path) -> None:
    write(path, 1)
    back_up(path, pool)
    foreign = tmp_path / "foreign" / "events.db"
    foreign.parent.mkdir()
    with closing(sqlite3.connect(foreign)) as database:
        database.execute("CREATE TABLE theirs (a)")
    before = snapshot(foreign.parent)
    with pytest.raises(NotAStoreError):
        restore(pool, foreign)
    foreign.write_bytes(b"not a database at all, but somebody's" * 100)
    with pytest.raises(NotAStoreError):
        restore(pool, foreign)
    assert list(before) == [file.name for file in foreign.parent.iterdir()]


def test_no_backup_is_said_so(tmp_path: Path) -> None:
    tmp_path.joinpath("empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "nothing", tmp_path / "nothing.backup.json"):
        with pytest.raises(NotAStoreError, match="no backup"):
            restore(wrong, tmp_path / "other" / "events.db")


# Interrupted.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Contents, Contents]:
    """Return a folder with a store and a backup, and what store and backup hold."""
    folder = tmp_path_factory.mktemp("prepared")
    path = folder / "store" / "events.db"
    write(path, 10, segment_bytes=64 << 10)
    backed_up = in_journals(path, folder / "pool")
    write(path, 5, first=2_000)
    return folder, contents(path), backed_up


def try_restore(folder: Path, path: Path, disk: Disk) -> RestoreResult | LogstoreError:
    try:
        return restore(folder / "pool", path, disk=disk)
    except LogstoreError as error:
        return error


@pytest.mark.promise("restore-old-or-new")
@pytest.mark.parametrize(
    ("start", "step", "once"),
    [(1, 3, False), (2, 3, False), (3, 3, False), (1, 7, True)],
    ids=["died 1", "died 2", "died 3", "failed once"],
)
def test_whatever_call_of_the_disk_fails_the_store_is_the_old_one_or_the_new_one(
    prepared: tuple[Path, Contents, Contents], tmp_path: Path, start: int, step: int, once: bool
) -> None:
    folder, old, new = prepared
    outcomes: list[str] = []
    for at in every_call(start=start, step=step):
        place = tmp_path / str(at)
        shutil.copytree(folder / "store", place)
        path = place / "events.db"
        disk = DyingDisk(at, once=once)
        result = try_restore(folder, path, disk)
        replaced = is_replacing(place / "events-log")
        found = contents(path)
        assert found in (old, new), f"call {at}: {disk.calls[-1]}"
        outcome = "new" if found == new else "old"
        if isinstance(result, RestoreResult):
            assert outcome == "new"
        else:
            assert isinstance(result, WriteFailedError)
            assert ("as it was" in str(result)) == (outcome == "old"), f"call {at}: {disk.calls[-1]}: {result}"
            assert ("opened next" in str(result)) == replaced
        left = {file.name for file in (place / "events-log").iterdir()}
        assert not left & {"restoring", "replaced", "replacing"}, f"call {at}: {disk.calls[-1]}"
        assert sorted(file.name for file in place.iterdir()) == ["events-log", "events.db"]
        outcomes.append(outcome)
        shutil.rmtree(place)
        if not disk.died:
            break
    assert outcomes[-1] == "new"
    assert outcomes.count("old") > 10
    if not once:
        # Once it is decided there is no way back.
        assert outcomes == sorted(outcomes, reverse=True)
        assert outcomes.count("new") > 3


class Nameless(FaultyDisk):
    """Says of a descriptor as little as the system does."""

    def read(self, fd: int, length: int, offset: int) -> bytes:
        try:
            return super().read(fd, length, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror) from None


@pytest.mark.parametrize("kind", ["lock", "open", "read"])
def test_whatever_call_of_the_pools_disk_fails_the_store_is_as_it_was_and_that_is_said(
    prepared: tuple[Path, Contents, Contents], tmp_path: Path, kind: str
) -> None:
    folder, old, new = prepared
    shutil.copytree(folder / "store", tmp_path / "store")
    path = tmp_path / "store" / "events.db"
    disk = Nameless()
    target = FolderTarget(folder / "pool", disk)
    (key,) = target.manifests()
    errors: list[str] = []
    for at in every_call():
        disk.heal()
        disk.fail(Fault(kind, at))
        try:
            restore_from(target, key, path)
        except WriteFailedError as error:
            errors.append(str(error))
        else:
            break
        assert contents(path) == old
    assert contents(path) == new
    assert errors
    for said in errors:
        assert f"{path} is as it was" in said
        assert str(folder / "pool") in said


def test_a_folder_of_backups_that_the_disk_does_not_give_is_told(
    prepared: tuple[Path, Contents, Contents], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, old, new = prepared
    shutil.copytree(folder / "store", path.parent)

    def refuse(of: Path) -> list[str]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(of))

    with monkeypatch.context() as failing:
        failing.setattr("os.listdir", refuse)
        with pytest.raises(WriteFailedError, match=r"is as it was.*Input/output error.*pool"):
            restore(folder / "pool", path)
    assert contents(path) == old
    restore(folder / "pool", path)
    assert contents(path) == new


def interrupted(folder: Path, path: Path, after_marker: int, *, once: bool = False) -> DyingDisk:
    """Restore over the prepared store with a disk that fails so many calls after the marker; return the disk."""
    healthy = FaultyDisk()
    shutil.copytree(folder / "store", path.parent.with_name("healthy"))
    restore(folder / "pool", path.parent.with_name("healthy") / "events.db", disk=healthy)
    shutil.copytree(folder / "store", path.parent)
    disk = DyingDisk(healthy.calls.index(("rename", "replacing")) + 1 + after_marker, once=once)
    with pytest.raises(WriteFailedError, match="opened next"):
        restore(folder / "pool", path, disk=disk)
    assert is_replacing(path.parent / "events-log")
    return disk


@pytest.mark.promise("restore-old-or-new")
def test_what_was_decided_is_not_undone_when_the_disk_fails_at_that_moment(
    prepared: tuple[Path, Contents, Contents], path: Path
) -> None:
    """The marker is in its place, and the sync of its folder fails."""
    folder, _, new = prepared
    disk = interrupted(folder, path, 1, once=True)
    assert disk.calls[-1] == ("sync_folder", "events-log")
    assert contents(path) == new


class Switching(Disk):
    """Notes what moves away, what moves in, and which folders are synced."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, str]] = []

    def rename(self, source: Path, target: Path) -> None:
        if "replaced" in target.parts:
            self.steps.append(("away", target.name))
        elif "restoring" in source.parts and "restoring" not in target.parts:
            self.steps.append(("in", target.name))
        super().rename(source, target)

    def sync_folder(self, folder: Path) -> None:
        self.steps.append(("synced", folder.name))
        super().sync_folder(folder)


@pytest.mark.promise("restore-old-or-new")
def test_the_old_store_is_away_on_disk_before_anything_of_the_new_one_moves_in(
    prepared: tuple[Path, Contents, Contents], path: Path
) -> None:
    """A power cut could leave the old catalogue's `-wal` beside the new catalogue, which is none of its."""
    folder, _, _ = prepared
    shutil.copytree(folder / "store", path.parent)
    disk = Switching()
    restore(folder / "pool", path, disk=disk)
    kinds = [kind for kind, _ in disk.steps]
    last_away = len(kinds) - 1 - kinds[::-1].index("away")
    between = disk.steps[last_away + 1 : kinds.index("in")]
    assert {name for kind, name in between if kind == "synced"} == {"replaced", "events-log", path.parent.name}
    assert "away" not in kinds[kinds.index("in") :]


@pytest.mark.promise("restore-old-or-new")
def test_an_interrupted_restore_is_finished_by_the_next_restore_too(
    prepared: tuple[Path, Contents, Contents], path: Path
) -> None:
    folder, _, new = prepared
    interrupted(folder, path, 4)
    restore(folder / "pool", path)
    assert contents(path) == new


@pytest.mark.promise("restore-old-or-new")
def test_processes_that_open_an_interrupted_restore_at_once_see_one_store(
    prepared: tuple[Path, Contents, Contents], path: Path
) -> None:
    folder, _, new = prepared
    interrupted(folder, path, 4)
    failed: list[BaseException] = []

    def look() -> None:
        try:
            with opened(path):
                pass
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert contents(path) == new


# To a moment in time.


def journalled(store: OpenStore, stream: str, journals: list[list[int]]) -> list[int]:
    """Append events that say they were recorded at given times, in journals of their own; return their ids."""
    lane, seed = store.lane, frame_seed(store.store_id)
    every: list[int] = []
    for times_us in journals:
        lane.rotate()
        ids = [lane.ids.next(1) for _ in times_us]
        events = [Event(each, 0, time_us, stream, 0, b"payload") for each, time_us in zip(ids, times_us, strict=True)]
        lane.write([encode_frame(event, seed) for event in events], ids[-1])
        lane.sync()
        lane.show()
        every += ids
    return every


def events_at(path: Path, stream: str, times_us: list[int]) -> list[int]:
    """Append events that say they were recorded at given times, in a segment of their own; return their ids."""
    with opened(path) as store:
        ids = journalled(store, stream, [times_us])
    # What the lane holds the next opening brings to segments.
    with opened(path):
        return ids


NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
NOON_US = int(NOON.timestamp()) * 1_000_000


def restored_ids(pool: Path, other: Path, until: datetime) -> dict[str, list[int]]:
    restore(pool, other, until=until)

    async def run() -> dict[str, list[int]]:
        async with Log(other) as log:
            return {
                summary.stream: [event.id for event in await log.read(summary.stream)]
                for summary in log.stream_summaries()
            }

    return asyncio.run(run())


@pytest.mark.promise("restore-until")
def test_of_each_stream_a_prefix_is_restored_up_to_a_moment(path: Path, pool: Path, tmp_path: Path) -> None:
    early = events_at(path, "early", [NOON_US - 2, NOON_US - 1, NOON_US])
    both = events_at(path, "both", [NOON_US, NOON_US + 1, NOON_US - 5])
    # The clock stepped back: what is behind the first late event is later, whatever its time says.
    later = events_at(path, "both", [NOON_US - 3])
    events_at(path, "late", [NOON_US + 1])
    back_up(path, pool)
    assert restored_ids(pool, tmp_path / "a" / "events.db", NOON) == {"early": early, "both": both[:1]}
    after = restored_ids(pool, tmp_path / "b" / "events.db", NOON + timedelta(microseconds=1))
    assert (after["early"], after["both"]) == (early, both + later)
    # Without a zone it is UTC.
    assert restored_ids(pool, tmp_path / "c" / "events.db", NOON.replace(tzinfo=None))["both"] == both[:1]


def test_segments_before_the_moment_are_copied_as_they_are(path: Path, pool: Path, tmp_path: Path) -> None:
    events_at(path, "early", [NOON_US - 2, NOON_US - 1])
    early = digests(path)
    events_at(path, "both", [NOON_US, NOON_US + 1])
    back_up(path, pool)
    other = tmp_path / "other" / "events.db"
    restore(pool, other, until=NOON)
    assert early.items() <= digests(other).items()
    assert len(digests(other)) == len(digests(path))
    assert digests(other) != digests(path)


@pytest.mark.promise("restore-until")
def test_journals_are_cut_off_at_a_moment_too(path: Path, pool: Path, tmp_path: Path) -> None:
    with opened(path) as store:
        ids = journalled(store, "stream", [[NOON_US - 2, NOON_US - 1], [NOON_US, NOON_US + 1], [NOON_US + 2]])
        back_up(path, pool)
    target = FolderTarget(pool)
    manifest = read_manifest(target, target.manifests()[-1])
    assert [file.events for file in manifest.files if file.kind == "journal"] == [2, 2, 1]
    assert restored_ids(pool, tmp_path / "a" / "events.db", NOON) == {"stream": ids[:3]}
    assert restored_ids(pool, tmp_path / "b" / "events.db", NOON - timedelta(days=1)) == {}
    assert restored_ids(pool, tmp_path / "c" / "events.db", NOON + timedelta(days=1)) == {"stream": ids}
    for other in ("a", "b", "c"):
        assert list((tmp_path / other / "events-log" / "damaged").iterdir()) == []


def test_a_look_at_a_store_between_the_old_and_the_new_says_so(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    with opened(path) as store:
        root = store.root
    (root / "replacing").touch()
    path.unlink()
    with pytest.raises(StoreLockedError, match="interrupted"), StoreView(path):
        pass
    open_existing(path).close(empty=True)
    assert not (root / "replacing").exists()
