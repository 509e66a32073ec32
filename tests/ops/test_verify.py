"""`verify` finds what is wrong, says where, and never takes what is right for wrong; it writes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from logstore.cli import main
from logstore.errors import NotAStoreError
from logstore.ops.access import open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.compaction.compact import compact
from logstore.ops.verify.report import Finding
from logstore.ops.verify.store import verify
from logstore.storage import Event, Log
from logstore.storage.header import HEADER_BYTES, frame_seed
from logstore.storage.options import Retention
from logstore.storage.record import decode_frame, encode_frame, frame_at
from tests.engine import deadline, small
from tests.ops.damaged import GROWN, TINY, DeadLane, ask, change, copied, execute, log_of, make, segments, snapshot
from tests.storage.disks import Fault, FaultyDisk


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "events.db"
    make(path)
    return path


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return copied(original, tmp_path / "store")


def found(path: Path, *, quick: bool = False) -> list[Finding]:
    return verify(path, quick=quick).findings


def kinds(path: Path, *, quick: bool = False) -> set[str]:
    return {finding.kind for finding in found(path, quick=quick)}


@pytest.mark.promise("verify-writes-nothing", "look-changes-nothing")
def test_a_whole_store_is_well_every_byte_of_it_is_read_and_nothing_is_written(store: Path) -> None:
    lane = DeadLane(store)
    lane.write("in a journal", b"payload")
    lane.die()
    before = snapshot(store.parent)
    report = verify(store)
    assert report.findings == []
    assert report.events == 4 * (100 + 15) + 1 + 1
    assert report.bytes >= sum(each.stat().st_size for each in segments(store))
    assert verify(store, quick=True).ok
    assert snapshot(store.parent) == before


def test_a_place_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError):
        verify(tmp_path / "events.db")


@pytest.mark.promise("verify-finds-all")
def test_a_flipped_bit_is_told_with_file_offset_and_event(store: Path) -> None:
    place = ask(store, "select event_id, offset, length, file from events join segments using (segment_id)")[70]
    event_id, offset, length, file = place
    path = log_of(store) / file
    change(path, offset + length - 3, bytes([path.read_bytes()[offset + length - 3] ^ 4]))
    (finding,) = found(store)
    assert (finding.kind, finding.file, finding.offset, finding.length) == ("damage", str(path), offset, length)
    assert finding.event_ids == (event_id,)
    # A look at headers and lengths does not see it.
    assert found(store, quick=True) == []


@pytest.mark.promise("verify-finds-all")
@pytest.mark.parametrize(
    ("damage", "quick"), [("truncated", True), ("garbage", True), ("gone", True), ("header", True), ("zeros", False)]
)
def test_a_damaged_segment_is_told(store: Path, damage: str, quick: bool) -> None:
    path = segments(store)[0]
    number = int(path.stem)
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "zeros":
        change(path, 5 * 512, bytes(512))
    else:
        path.write_bytes({"truncated": data[:-7], "garbage": data + b"x", "header": b"x" + data[1:]}[damage])
    findings = found(store)
    assert {finding.kind for finding in findings} == {"damage"}
    assert {finding.file for finding in findings} == {str(path)}
    lost = {event_id for finding in findings for event_id in finding.event_ids}
    rows = [row[0] for row in ask(store, "select event_id from events where segment_id = ? order by 1", number)]
    if damage == "gone":
        assert findings[0].events == len(rows)
    assert (lost == set()) == (damage in ("garbage", "header"))
    assert (found(store, quick=True) != []) == quick


def test_segments_that_changed_places_are_told(store: Path) -> None:
    one, other = segments(store)[:2]
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    findings = found(store)
    assert {finding.file for finding in findings if finding.kind == "damage"} == {str(one), str(other)}
    assert kinds(store, quick=True) == {"damage"}


@pytest.mark.promise("verify-finds-all")
@pytest.mark.parametrize(
    "sql",
    [
        "delete from events where event_id = (select max(event_id) from events)",
        "update events set offset = offset + 1 where event_id = (select min(event_id) from events)",
        "update events set stream_id = 1 + (select max(stream_id) from streams)",
        "insert into events select 7, stream_id, segment_id, offset, length from events limit 1",
        "delete from extents where first_id = (select min(first_id) from extents)",
        "update extents set events = events + 1 where first_id = (select max(first_id) from extents)",
        "update extents set first_time_us = 1 where first_id = (select min(first_id) from extents)",
        "update extents set last_flags = 64 where first_id = (select min(first_id) from extents)",
        "update extents set offset = null where first_id = (select min(first_id) from extents)",
        "update extents set length = 'x' where first_id = (select min(first_id) from extents)",
        "update streams set name = 'other' where stream_id = 2",
        "update streams set dropped_id = 1 << 62 where stream_id = 2",
        "update streams set dropped_id = 1 << 62, dropped_at = '2026-11-23 00:00:00' where stream_id = 2",
        "update segments set dropped = 1 where segment_id = (select max(segment_id) from segments)",
        "update segments set sealed = 7 where segment_id = (select max(segment_id) from segments)",
        "update segments set events = 1 where segment_id = (select segment_id from events order by event_id limit 1)",
        "update segments set file = 'segments/1.segment' where segment_id = (select max(segment_id) from segments)",
        "update sessions set ended_at = '2026-11-23 00:00:00'",
        "update sessions set stream_prefix = ''",
    ],
)
def test_an_index_that_disagrees_with_the_log_is_told(store: Path, sql: str) -> None:
    execute(store, sql)
    assert "index" in kinds(store)
    assert kinds(store) <= {"index", "gap"}


def test_an_event_that_the_index_forgot_is_told_unless_a_journal_has_it(store: Path) -> None:
    (number,) = ask(store, "select segment_id from events join streams using (stream_id) where name = 'last'")[0]
    for table in ("events", "extents", "segments"):
        execute(store, f"delete from {table} where segment_id = ?", number)
    (finding,) = found(store)
    assert finding.kind == "index"
    assert finding.streams == ("last",)


def test_another_payload_whose_checksum_fits_is_told_by_the_digest_of_the_file(store: Path) -> None:
    file, offset, length = ask(store, "select file, offset, e.length from events e join segments using (segment_id)")[0]
    path = log_of(store) / file
    whole = path.read_bytes()
    seed = frame_seed(int.from_bytes(whole[16:24], "little"))
    event = decode_frame(whole[offset : offset + length])
    forged = encode_frame(msgspec.structs.replace(event, payload=event.payload[::-1]), seed)
    assert (len(forged), forged != whole[offset : offset + length]) == (length, True)
    change(path, offset, forged)
    (finding,) = found(store)
    assert (finding.kind, finding.file) == ("damage", str(path))
    assert "SHA-256" in finding.reason


def test_another_event_under_the_same_id_is_told(store: Path) -> None:
    event_id, file, offset, length = ask(
        store, "select event_id, file, offset, e.length from events e join segments using (segment_id) limit 1"
    )[0]
    path = log_of(store) / file
    whole = path.read_bytes()
    store_id = int.from_bytes(whole[16:24], "little")
    seed = frame_seed(store_id)
    frame = frame_at(whole, offset, seed)
    assert frame is not None
    assert len(frame) == length
    other = path.with_name("77.segment")
    other.write_bytes(whole[:HEADER_BYTES] + frame)
    # The same bytes twice are one event.
    assert kinds(store) <= {"damage"}
    other.write_bytes(whole[:HEADER_BYTES] + encode_frame(Event(event_id, 0, 1, GROWN, 0, b"other"), seed))
    assert "conflict" in kinds(store)


@pytest.mark.promise("verify-finds-all")
def test_a_predecessor_that_is_nowhere_is_told(store: Path) -> None:
    lane = DeadLane(store)
    before = lane.write("new", b"first")
    lane.write("new", b"second", before)
    missing = lane.lane.ids.next(0)
    follower = lane.write("new", b"fourth", missing)
    lane.die()
    (finding,) = found(store)
    assert (finding.kind, finding.event_ids, finding.streams) == ("gap", (missing,), ("new",))
    assert str(follower) in finding.reason


@pytest.mark.promise("torn-is-no-damage")
def test_a_damaged_journal_is_told_and_a_torn_write_is_not(store: Path) -> None:
    lane = DeadLane(store)
    for number in range(5):
        lane.write("new", b"payload %d" % number)
    journal = lane.die()
    data = journal.read_bytes()
    torn = data.rstrip(b"\0").ljust(-(-len(data.rstrip(b"\0")) // 4096) * 4096, b"\0") + b"half a batch"
    journal.write_bytes(torn)
    assert found(store) == []
    change(journal, data.index(b"payload 2"), b"P")
    (finding,) = found(store)
    assert (finding.kind, finding.file) == ("damage", str(journal))
    assert "1 events are lost" in finding.reason
    journal.write_bytes(data[: data.index(b"payload 4")])
    assert kinds(store) == {"damage"}


def test_what_a_lane_keeps_beside_its_journals_is_checked(store: Path) -> None:
    state = log_of(store) / "lanes" / "0000" / "state"
    change(state, 9, b"\xff\xff")
    (finding,) = found(store)
    assert (finding.kind, finding.file, finding.offset) == ("lane", str(state), 0)


def test_a_journal_that_the_index_is_done_with_and_does_not_have_is_told(store: Path) -> None:
    lane = DeadLane(store)
    lane.write("new", b"payload")
    journal = lane.die()
    execute(store, "insert into journals values (?, ?)", int(journal.parent.name), int(journal.stem))
    (finding,) = found(store)
    assert (finding.kind, finding.streams) == ("index", ("new",))


@pytest.mark.promise("verify-finds-all")
@pytest.mark.parametrize("damage", ["middle", "end", "header", "gone"])
def test_a_damaged_registry_is_told(store: Path, damage: str) -> None:
    path = log_of(store) / "registry.log"
    size = path.stat().st_size
    if damage == "gone":
        path.unlink()
    else:
        place = {"middle": HEADER_BYTES + 10, "end": size - 3, "header": 30}[damage]
        change(path, place, b"\xff\xfe")
    (finding,) = found(store)
    assert (finding.kind, finding.file) == ("registry", str(path))


@pytest.mark.promise("newer-format-refused")
def test_a_registry_of_a_newer_release_is_told_by_its_name(store: Path) -> None:
    path = log_of(store) / "registry.log"
    change(path, 8, b"\xff")
    (finding,) = found(store)
    assert (finding.kind, finding.file) == ("version", str(path))


def test_a_registry_that_was_cut_off_between_entries_is_told_by_its_copy(store: Path) -> None:
    path = log_of(store) / "registry.log"
    data = path.read_bytes()
    first = HEADER_BYTES + 8 + int.from_bytes(data[HEADER_BYTES : HEADER_BYTES + 4], "little")
    path.write_bytes(data[:first])
    (finding,) = found(store)
    assert "another session" in finding.reason


def test_without_a_catalogue_the_log_is_read_all_the_same(store: Path) -> None:
    store.unlink()
    assert kinds(store) == {"catalogue"}
    change(segments(store)[0], 5000, b"\xff\xff\xff\xff")
    assert kinds(store) == {"catalogue", "damage"}
    store.write_bytes(b"no database at all" * 100)
    assert kinds(store) == {"catalogue", "damage"}


def test_a_catalogue_that_cannot_be_opened_is_told_and_the_log_read_all_the_same(store: Path) -> None:
    store.with_name("events.db-wal").mkdir()
    (finding,) = found(store)
    assert finding.kind == "catalogue"
    assert "unable to open" in finding.reason
    change(segments(store)[0], 5000, b"\xff\xff\xff\xff")
    assert kinds(store) == {"catalogue", "damage"}


@pytest.mark.promise("verify-finds-all")
def test_a_damaged_page_of_the_catalogue_is_told(store: Path) -> None:
    with contextlib.closing(sqlite3.connect(store)) as connection:
        connection.execute("pragma journal_mode = delete")
    size = store.stat().st_size
    for page in range(4096, size, 4096):
        whole = store.read_bytes()
        change(store, page, os.urandom(4096))
        assert kinds(store), f"page at {page}"
        store.write_bytes(whole)
    assert found(store) == []


@pytest.mark.promise("verify-finds-all")
def test_damaged_backups_are_told(store: Path) -> None:
    opened = open_existing(store)
    folder = default_backups(store)
    create_backup(opened, FolderTarget(folder))
    opened.close(empty=True)
    assert found(store) == []
    stored = max(folder.glob("objects/*/*"), key=lambda each: each.stat().st_size)
    change(stored, 100, b"\xff\xff\xff\xff")
    (finding,) = found(store)
    assert (finding.kind, finding.file) == ("backup", str(stored))
    assert found(store, quick=True) == []
    stored.unlink()
    assert kinds(store, quick=True) == {"backup"}
    (manifest,) = folder.glob("*.json")
    change(manifest, 200, b"\xff")
    assert {finding.file for finding in found(store)} == {str(manifest)}


@pytest.mark.promise("verify-no-false-alarm")
def test_what_retention_and_compaction_leave_is_well(store: Path) -> None:
    opened = open_existing(store)
    try:
        compact(opened, Retention(max_events=50, resume_window_s=0), segment_bytes=64 << 10)
        assert verify(store).findings == []
    finally:
        opened.close(empty=True)
    report = verify(store)
    assert (report.findings, report.events) == ([], report.events)
    assert 0 < report.events < 300


@pytest.mark.promise("verify-no-false-alarm")
async def test_nothing_is_taken_for_wrong_while_others_write_checkpoint_compact_and_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    done = False

    async def write(log: Log, writer: int) -> None:
        for number in range(150):
            stream = f"stream {writer}" if number % 3 else f"tiny {writer} {number}"
            await log.append_many([(stream, b"payload" * 200, 0)] * 5)

    async def come_and_go() -> None:
        while not done:
            async with Log(path, small()) as log:
                await log.append("passing", b"by")
                await log.sessions.open(f"session {log.stats().appended} {os.urandom(4).hex()}", b"")

    async def drop() -> None:
        while not done:
            await asyncio.to_thread(squeeze)

    def squeeze() -> None:
        opened = open_existing(path)
        try:
            compact(opened, Retention(max_events=100, resume_window_s=0), segment_bytes=64 << 10)
        finally:
            opened.close(empty=True)

    async with deadline(), Log(path, small()) as log:
        others = [asyncio.create_task(come_and_go()), asyncio.create_task(drop())]
        writers = [asyncio.create_task(write(log, number)) for number in range(6)]
        looks = 0
        while not all(writer.done() for writer in writers) or looks < 5:
            report = await asyncio.to_thread(verify, path)
            assert report.findings == []
            assert (await asyncio.to_thread(verify, path, quick=True)).findings == []
            looks += 1
        await asyncio.gather(*writers)
        done = True
        await asyncio.gather(*others)
    assert verify(path).findings == []


@pytest.mark.promise("ids-are-text")
def test_the_command_says_what_and_what_to_do(store: Path) -> None:
    run = CliRunner()
    result = run.invoke(main, ["verify", str(store)])
    assert (result.exit_code, "all is well" in result.output) == (0, True)
    change(segments(store)[0], 5000, b"\xff\xff\xff\xff")
    execute(store, "update extents set first_time_us = 1 where stream_id = 2")
    result = run.invoke(main, ["verify", str(store)])
    assert result.exit_code == 1
    # The worst first.
    assert result.output.startswith("damage: ")
    assert f"logstore repair {store}" in result.output
    assert f"logstore reindex {store}" in result.output
    result = run.invoke(main, ["verify", str(store), "--json"])
    figures = json.loads(result.stdout)
    assert (result.exit_code, figures["ok"]) == (1, False)
    damage = figures["findings"][0]
    assert set(damage) == {"kind", "file", "reason", "offset", "length", "events", "event_ids", "streams"}
    assert all(isinstance(event_id, str) for event_id in damage["event_ids"])
    assert run.invoke(main, ["verify"]).exit_code == 2
    assert run.invoke(main, ["verify", str(store.with_name("none.db"))]).exit_code == 1


def test_streams_of_damaged_names_are_shown_all_the_same(store: Path) -> None:
    execute(store, "update streams set name = cast(x'ff41' as text) where name = ?", TINY[0])
    assert "index" in kinds(store)


@pytest.mark.parametrize("name", [".segment", "registry.log"])
def test_a_file_that_the_disk_does_not_give_is_told(store: Path, name: str) -> None:
    disk = FaultyDisk()
    disk.fail(Fault("read", name=name, from_then_on=True))
    (kind,) = {finding.kind for finding in verify(store, disk=disk).findings}
    assert kind == ("registry" if name == "registry.log" else "damage")


@pytest.mark.promise("damage-no-traceback")
@pytest.mark.parametrize(
    "sql",
    [
        "update segments set {} = {}",
        "update events set {} = {}",
        "update extents set {} = {} where first_id = (select min(first_id) from extents)",
        "update streams set {} = {} where stream_id = 2",
        "update sessions set {} = {} where session_hash = 'one session'",
        "insert into damage (file, {}) values ('x', {})",
    ],
)
@pytest.mark.parametrize("value", ["null", "x'00ff'"])
def test_whatever_a_damaged_column_holds_there_is_a_report(store: Path, sql: str, value: str) -> None:
    table = sql.split()[2 if sql.startswith("insert") else 1]
    for row in ask(store, f"pragma table_info({table})"):
        path = copied(store, store.parent.with_name(f"{row[1]} {value}".replace("'", "")))
        try:
            execute(path, sql.format(row[1], value))
        except sqlite3.Error:
            # The column does not take it.
            continue
        for options in ([], ["--quick", "--json"]):
            result = CliRunner().invoke(main, ["verify", str(path), *options])
            assert isinstance(result.exception, SystemExit | None), (row[1], value)
