"""`repair` keeps what is whole, keeps damaged bytes aside, says what is lost, and can be cut short anywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from logstore.cli import main
from logstore.errors import GapError, LogstoreError, StoreLockedError
from logstore.ops.access import StoreView, open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.verify.repair import repair
from logstore.ops.verify.store import verify
from logstore.storage import Log
from tests.engine import deadline, in_segments, payloads, read_to_gap, small
from tests.ops.damaged import (
    GROWN,
    DeadLane,
    ask,
    change,
    copied,
    execute,
    log_of,
    make,
    read,
    segments,
)
from tests.storage.disks import Fault, FaultyDisk


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "events.db"
    make(path)
    return path


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return copied(original, tmp_path / "store")


def flip(path: Path, offset: int) -> None:
    change(path, offset, bytes([path.read_bytes()[offset] ^ 16]))


def middle_of_grown(store: Path) -> tuple[Path, int, int]:
    """Return a segment of the grown stream, an offset within one of its events, and that event's id."""
    rows = ask(
        store,
        "select file, offset, event_id from events join streams using (stream_id) join segments using (segment_id) "
        "where name = ? order by event_id",
        GROWN,
    )
    file, offset, event_id = rows[150]
    return log_of(store) / file, offset + 100, event_id


def test_a_store_that_is_whole_is_left_alone(store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.parent.rglob("*") if path.is_file()}
    done = repair(store)
    assert (done.actions, done.lost, done.report.ok) == ([], [], True)
    assert {path: path.stat().st_mtime_ns for path in store.parent.rglob("*") if path.is_file()} == before


@pytest.mark.promise("repair-loses-nothing")
def test_the_whole_events_of_a_damaged_segment_stay_and_the_lost_one_is_on_record(store: Path) -> None:
    whole = read(store)
    path, offset, lost = middle_of_grown(store)
    flip(path, offset)
    damaged = path.read_bytes()
    done = repair(store)
    assert done.report.findings == []
    (known,) = done.report.known
    assert (known.file, known.event_ids, known.streams, known.events) == (str(path), (lost,), (GROWN,), 1)
    assert done.lost == [known]
    assert str(path) in done.actions[0]
    assert (log_of(store) / "damaged" / path.name).read_bytes() == damaged
    assert not path.exists()
    after = read(store)
    assert {stream: events for stream, events in after.items() if stream != GROWN} == {
        stream: events for stream, events in whole.items() if stream != GROWN
    }
    ids = [event_id for event_id, _ in whole[GROWN]]
    with StoreView(store) as view:
        before_gap: list[int] = []
        with pytest.raises(GapError):
            before_gap.extend(event.id for event in view.events(GROWN))
        # A reader that was past it goes on.
        behind = [(event.id, event.payload) for event in view.events(GROWN, ids[ids.index(lost) + 1])]
    assert behind == [event for event in whole[GROWN] if event[0] > ids[ids.index(lost) + 1]]
    # On record for good, also when the index is made again.
    assert [each.event_ids for each in verify(store).known] == [(lost,)]
    store.unlink()
    opened = open_existing(store)
    opened.close(empty=True)
    report = verify(store)
    assert (report.findings, [each.event_ids for each in report.known]) == ([], [(lost,)])


@pytest.mark.promise("repair-loses-nothing")
def test_a_segment_that_is_gone_is_on_record_with_all_its_events(store: Path) -> None:
    path = segments(store)[0]
    (count,) = ask(store, "select count(*) from events where segment_id = ?", int(path.stem))[0]
    path.unlink()
    done = repair(store)
    assert done.report.findings == []
    assert [each.events for each in done.lost] == [count]


@pytest.mark.promise("repair-loses-nothing")
def test_it_may_be_cut_short_at_any_change_to_the_disk(original: Path, tmp_path: Path) -> None:
    damaged = copied(original, tmp_path / "damaged")
    path, offset, lost = middle_of_grown(damaged)
    flip(path, offset)
    whole = {stream: [each for each in events if each[0] != lost] for stream, events in read(original).items()}
    at = 1
    while True:
        store = copied(damaged, tmp_path / f"cut {at}")
        disk = _DyingDisk(at)
        try:
            repair(store, disk=disk)
            break
        except (LogstoreError, OSError):
            assert _served(store) == whole, f"cut at change {at}"
            done = repair(store)
            assert done.report.findings == [], f"cut at change {at}"
            assert (log_of(store) / "damaged" / path.name).exists()
        # Most of the changes are those of any opening; each of them has its own tests.
        at += 1 if disk.is_at_work else 5
    assert at > 30


def _served(store: Path) -> dict[str, list[tuple[int, bytes]]]:
    opened = open_existing(store)
    opened.close(empty=True)
    return read(store)


class _DyingDisk(FaultyDisk):
    """A disk whose n-th change fails, and all that follow."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at
        self._changes = 0
        self.is_at_work = False

    def _ask(self, kind: str, path: Path) -> Fault | None:
        if kind not in ("create", "write", "sync", "sync_folder", "rename", "unlink"):
            return None
        self._changes += 1
        if self._changes == self._at:
            self.is_at_work = "damaged" in str(path) or path.suffix in (".tmp", ".segment") or path.name == "segments"
        return Fault(kind) if self._changes >= self._at else None


@pytest.mark.promise("repair-loses-nothing")
@pytest.mark.parametrize("place", ["first entry", "header", "gone"])
def test_a_registry_keeps_the_sessions_that_are_whole(store: Path, place: str) -> None:
    path = log_of(store) / "registry.log"
    if place == "gone":
        path.unlink()
    else:
        flip(path, 90 if place == "first entry" else 3)
    with pytest.raises(LogstoreError):
        verify_and_open(store)
    done = repair(store)
    assert done.report.findings == []
    opened = open_existing(store)
    keys = {session.key for session in opened.registry.sessions()}
    opened.close(empty=True)
    assert (
        keys
        == {
            "first entry": {"another session"},
            "header": {"one session", "another session"},
            "gone": set(),
        }[place]
    )
    assert read(store)["last"]


def verify_and_open(store: Path) -> None:
    """Open a store as its processes do; a registry that is gone is only found by `verify`."""
    if not verify(store).ok and not (log_of(store) / "registry.log").exists():
        raise LogstoreError("gone")
    open_existing(store).close(empty=True)


async def test_a_registry_is_mended_beside_those_who_have_it_open(store: Path) -> None:
    async with deadline(), Log(store, small()) as log:
        flip(log_of(store) / "registry.log", 90)
        await log.append("last", b"more")
        await in_segments(log)
        assert repair(store).report.findings == []
        assert await log.sessions.find("another session") is not None
        assert await log.sessions.find("one session") is None
        await log.sessions.open("a third", b"")
    assert verify(store).findings == []


@pytest.mark.parametrize(
    "sql",
    [
        "delete from events where event_id = (select max(event_id) from events)",
        "delete from extents where first_id = (select min(first_id) from extents)",
        "update streams set dropped_id = 1 << 62 where stream_id = 2",
        "update streams set dropped_id = 1 << 62, dropped_at = '2026-11-23 00:00:00' where stream_id = 2",
        "update segments set dropped = 1 where segment_id = (select max(segment_id) from segments)",
    ],
)
def test_an_index_that_disagrees_is_made_again_and_loses_nothing(store: Path, sql: str) -> None:
    whole = read(store)
    execute(store, sql)
    done = repair(store)
    assert (done.report.findings, done.lost) == ([], [])
    assert read(store) == whole


@pytest.mark.promise("work-while-open")
async def test_a_damaged_segment_is_replaced_while_the_store_is_in_use(store: Path) -> None:
    async with deadline(), Log(store, small()) as log:
        path, offset, _ = middle_of_grown(store)
        flip(path, offset)
        before, gap = await read_to_gap(log, GROWN)
        assert gap is not None
        done = repair(store)
        assert done.report.findings == []
        again, gap = await read_to_gap(log, GROWN)
        assert (again, gap is None) == (before, False)
        await log.append(GROWN, b"goes on")
        await in_segments(log)
        assert verify(store).findings == []


@pytest.mark.promise("lock-holder-named")
async def test_a_segment_that_a_process_still_writes_is_left_to_it(tmp_path: Path) -> None:
    store = tmp_path / "events.db"
    async with deadline(), Log(store, small(segment_bytes=64 << 20)) as log:
        await log.append_many([(GROWN, b"x" * 5000, 0) for _ in range(100)])
        await in_segments(log)
        (path,) = segments(store)
        flip(path, 3000)
        with pytest.raises(StoreLockedError) as refused:
            repair(store)
        assert refused.value.pids == (os.getpid(),)
    assert repair(store).report.findings == []


async def test_gaps_are_put_on_record(store: Path) -> None:
    lane = DeadLane(store)
    missing = lane.lane.ids.next(0)
    lane.write("new", b"second", missing)
    lane.die()
    done = repair(store)
    assert done.report.findings == []
    assert [each.event_ids for each in done.lost] == [(missing,)]
    async with deadline(), Log(store) as log:
        assert await payloads(log, "new") == [b"second"]


def test_a_damaged_journal_is_recovered_and_told(store: Path) -> None:
    lane = DeadLane(store)
    first = lane.write("new", b"first one")
    lane.write("new", b"second one", first)
    journal = lane.die()
    change(journal, journal.read_bytes().index(b"first one"), b"F")
    done = repair(store)
    assert done.report.findings == []
    assert any(each.file == str(journal) and each.events == 1 for each in done.lost)
    assert [payload for _, payload in read(store, "new")["new"]] == [b"second one"]


def test_what_a_lane_keeps_beside_its_journals_is_mended(store: Path) -> None:
    # Not the lane of the process that repairs: that is written anew anyway.
    held = open_existing(store)
    lane = DeadLane(store)
    folder = lane.lane.folder
    lane.lane.end()
    held.close(empty=True)
    flip(folder / "state", 9)
    change(folder / "marks", 2000, b"garbage")
    assert {each.kind for each in verify(store).findings} == {"lane"}
    assert repair(store).report.findings == []


@pytest.mark.promise("repair-loses-nothing")
def test_a_damaged_object_of_a_backup_is_set_aside_and_the_next_backup_makes_it_again(store: Path) -> None:
    folder = default_backups(store)

    def back_up() -> None:
        opened = open_existing(store)
        create_backup(opened, FolderTarget(folder))
        opened.close(empty=True)

    back_up()
    stored = max(folder.glob("objects/*/*"), key=lambda each: each.stat().st_size)
    flip(stored, 100)
    damaged = stored.read_bytes()
    done = repair(store)
    assert (folder / "damaged" / stored.name).read_bytes() == damaged
    assert [each.kind for each in done.report.findings] == ["backup"]
    back_up()
    assert verify(store).findings == []


def test_the_command_says_what_it_did_and_what_is_lost(store: Path) -> None:
    path, offset, lost = middle_of_grown(store)
    flip(path, offset)
    result = CliRunner().invoke(main, ["repair", str(store), "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["report"]["ok"]
    assert figures["lost"][0]["event_ids"] == [str(lost)]
    result = CliRunner().invoke(main, ["repair", str(store)])
    assert (result.exit_code, "all is well" in result.output) == (0, True)
    result = CliRunner().invoke(main, ["verify", str(store)])
    assert (result.exit_code, "on record as lost" in result.output) == (0, True)


async def test_a_store_that_lost_its_registry_before_its_first_segment_keeps_its_events(tmp_path: Path) -> None:
    store = tmp_path / "events.db"
    async with deadline(), Log(store) as log:
        await log.sessions.open("session", b"")
    lane = DeadLane(store)
    lane.write("new", b"payload")
    lane.die()
    assert segments(store) == []
    (log_of(store) / "registry.log").unlink()
    async with deadline(), Log(store) as log:
        assert await payloads(log, "new") == [b"payload"]


@pytest.mark.promise("damage-is-told")
def test_damage_to_what_a_killed_process_had_shown_and_not_synced_is_no_torn_write(store: Path) -> None:
    lane = DeadLane(store)
    lane.write("new", b"first one")
    # As in `interval` mode: handed to the system, shown, not synced.
    lane.write("new", b"second one", sync=False)
    journal = lane.die()
    change(journal, journal.read_bytes().index(b"second one"), b"S")
    assert {each.kind for each in verify(store).findings} == {"damage"}
    done = repair(store)
    assert [(each.file, each.events) for each in done.lost] == [(str(journal), 1)]
