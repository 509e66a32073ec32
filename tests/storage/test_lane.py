"""A lane never gives an id or an ordinal out twice, whatever a crash left of it."""

from __future__ import annotations

import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import pytest

from logstore.errors import DamageError, StoreLockedError
from logstore.storage import ids
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_JOURNAL, FileHeader, decode_header, frame_seed
from logstore.storage.ids import MAX_ID
from logstore.storage.journal import PAGE_BYTES, scan_journal
from logstore.storage.lane import (
    NOWHERE,
    RESERVE_AHEAD_MS,
    Lane,
    Marks,
    Place,
    Reservation,
    bad_slots,
    boot_id,
    journal_ordinals,
    journal_path,
    lane_folders,
    read_reservation,
)
from logstore.storage.record import Event, encode_frame
from tests.storage.disks import Fault, FaultyDisk, open_descriptors

STORE_ID = 42
SEED = frame_seed(STORE_ID)
NOW_US = 1_790_000_000_000_000
HOUR_US = 3_600_000_000

Acquirer = Callable[..., Lane]


@pytest.fixture
def acquired(tmp_path: Path) -> Iterator[Acquirer]:
    lanes: list[Lane] = []

    def acquire(disk: Disk | None = None) -> Lane:
        lane = Lane.acquire(disk or Disk(), tmp_path, STORE_ID)
        lanes.append(lane)
        return lane

    yield acquire
    for lane in lanes:
        if lane.marks._map.closed:
            continue
        lane.end()


def begin(lane: Lane, now_us: int = NOW_US, floor: int = 0) -> None:
    """Do what an opening does."""
    lane.begin(floor, now_us)
    lane.marks.begin(lane.incarnation)


def write(lane: Lane, now_us: int = NOW_US, stream: str = "stream") -> int:
    event_id = lane.ids.next(now_us)
    lane.write([encode_frame(Event(event_id, 0, now_us, stream, 0, b"payload"), SEED)], event_id)
    return event_id


def header_of(lane: Lane, ordinal: int) -> FileHeader:
    path = journal_path(lane.folder, ordinal)
    return decode_header(path.read_bytes()[:HEADER_BYTES], path, KIND_JOURNAL)


# Who has it.


@pytest.mark.promise("many-processes")
def test_each_open_store_has_a_lane_of_its_own_and_a_free_one_is_taken_again(
    acquired: Acquirer, tmp_path: Path
) -> None:
    lanes = [acquired() for _ in range(3)]
    assert [lane.number for lane in lanes] == [0, 1, 2]
    lanes[1].end()
    assert acquired().number == 1
    assert [number for number, _ in lane_folders(Disk(), tmp_path)] == [0, 1, 2]


def test_when_all_lanes_are_held_that_is_said(acquired: Acquirer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "LANE_COUNT", 2)
    acquired()
    acquired()
    with pytest.raises(StoreLockedError, match="all 2 lanes"):
        acquired()


def test_a_lane_that_cannot_be_read_is_not_held(acquired: Acquirer, tmp_path: Path) -> None:
    begin(acquired())
    shutil.rmtree(tmp_path / "lanes")
    disk = FaultyDisk()
    disk.fail(Fault("open", name="marks"))
    before = open_descriptors()
    with pytest.raises(OSError, match="Input/output error"):
        acquired(disk)
    assert open_descriptors() == before


# Ids and incarnations.


def test_an_incarnation_is_never_used_twice(acquired: Acquirer) -> None:
    seen = set()
    for _ in range(5):
        lane = acquired()
        # The clock stands still.
        begin(lane)
        assert ids.lane_of(lane.incarnation) == lane.number
        seen.add(lane.incarnation)
        lane.end()
    assert len(seen) == 5


@pytest.mark.promise("ids-never-twice")
def test_ids_are_not_reused_after_everything_unsynced_is_lost_and_the_clock_steps_back(
    acquired: Acquirer, tmp_path: Path
) -> None:
    given: list[int] = []
    for opening in range(4):
        lane = acquired()
        begin(lane, NOW_US - opening * HOUR_US)
        fresh = [write(lane, NOW_US - opening * HOUR_US + step * 1_000_000) for step in range(10)]
        assert min(fresh) > max(given, default=0)
        given += fresh
        lane.end()
        # The power cut takes every journal, and the marks.
        for path in lane.folder.glob("*.journal"):
            path.unlink()
        (lane.folder / "marks").unlink()
    assert len(set(given)) == 40


@pytest.mark.promise("ids-never-twice")
def test_an_id_is_never_written_beyond_what_the_disk_has_reserved(acquired: Acquirer) -> None:
    lane = acquired()
    begin(lane)
    for step in range(20):
        event_id = write(lane, NOW_US + step * RESERVE_AHEAD_MS * 700)
        assert event_id < read_reservation(Disk(), lane.folder).event_id


def test_ids_are_above_a_floor_from_other_lanes(acquired: Acquirer) -> None:
    floor = ids.IdGenerator(7).next(NOW_US + HOUR_US)
    lane = acquired()
    begin(lane, floor=floor)
    assert lane.incarnation > floor
    assert write(lane) > lane.incarnation


def test_a_write_that_needs_no_reservation_and_no_file_may_be_done_at_once(acquired: Acquirer) -> None:
    lane = acquired()
    begin(lane)
    assert not lane.can_write_inline(lane.ids.next(NOW_US), 1 << 20), "there is no journal yet"
    write(lane)
    assert lane.can_write_inline(lane.ids.next(NOW_US), 1 << 20)
    assert not lane.can_write_inline(lane.reserved_id, 1 << 20)
    assert not lane.can_write_inline(lane.ids.next(NOW_US), PAGE_BYTES)


# The reservation.


def tear_state(folder: Path, offset: int) -> None:
    data = bytearray((folder / "state").read_bytes())
    data[offset : offset + 20] = b"torn".ljust(20, b"\xff")
    (folder / "state").write_bytes(data)


@pytest.mark.promise("ids-never-twice")
@pytest.mark.parametrize("openings", range(1, 5))
def test_a_torn_reservation_leaves_the_one_before(acquired: Acquirer, openings: int) -> None:
    for _ in range(openings - 1):
        lane = acquired()
        begin(lane, NOW_US)
        lane.end()
    lane = acquired()
    begin(lane, NOW_US)
    lane.end()
    before = read_reservation(Disk(), lane.folder)
    disk = FaultyDisk()
    lane = acquired(disk)
    # The crash comes while the next opening writes its reservation.
    disk.fail(Fault("write", name="state", written=11))
    with pytest.raises(OSError, match="Input/output error"):
        lane.begin(0, NOW_US - HOUR_US)
    lane.end()
    assert read_reservation(Disk(), lane.folder) >= before


@pytest.mark.promise("ids-never-twice")
@pytest.mark.parametrize("writes", range(1, 6))
def test_within_one_opening_a_torn_reservation_leaves_the_one_before(acquired: Acquirer, writes: int) -> None:
    disk = FaultyDisk()
    lane = acquired(disk)
    begin(lane)
    for step in range(writes):
        lane.reserve(lane.reserved_id + step)
    before = read_reservation(Disk(), lane.folder)
    disk.fail(Fault("write", name="state", written=11))
    with pytest.raises(OSError, match="Input/output error"):
        lane.reserve(lane.reserved_id)
    after = read_reservation(Disk(), lane.folder)
    assert after.event_id >= before.event_id - (RESERVE_AHEAD_MS << 21) - writes
    assert after.event_id > lane.ids.last


def test_the_first_reservation_is_in_its_folder_also_when_its_sync_failed_once(acquired: Acquirer) -> None:
    disk = FaultyDisk()
    lane = acquired(disk)
    disk.fail(Fault("sync", name="state"))
    with pytest.raises(OSError, match="Input/output error"):
        lane.begin(0, NOW_US)
    disk.calls.clear()
    lane.begin(0, NOW_US)
    assert ("sync_folder", lane.folder.name) in disk.calls


def test_a_reservation_with_every_slot_torn_is_none(tmp_path: Path, acquired: Acquirer) -> None:
    lane = acquired()
    begin(lane)
    lane.reserve(lane.reserved_id)
    tear_state(lane.folder, 0)
    tear_state(lane.folder, PAGE_BYTES)
    assert read_reservation(Disk(), lane.folder) == Reservation(0, 0)
    assert read_reservation(Disk(), tmp_path) == Reservation(0, 0)


@pytest.mark.parametrize("fields", [(1 << 63, 1, 1), (9, 1 << 63, 1), (9, 1, 1 << 32)])
def test_a_reservation_of_what_can_be_no_id_is_none(acquired: Acquirer, fields: tuple[int, int, int]) -> None:
    lane = acquired()
    begin(lane)
    lane.reserve(lane.reserved_id)
    before = read_reservation(Disk(), lane.folder)
    data = bytearray((lane.folder / "state").read_bytes().ljust(PAGE_BYTES + 28, b"\0"))
    older = min((0, PAGE_BYTES), key=lambda offset: int.from_bytes(data[offset : offset + 8], "little"))
    slot = struct.pack("<QQQ", *fields)
    data[older : older + 28] = slot + struct.pack("<I", google_crc32c.value(slot))
    (lane.folder / "state").write_bytes(data)
    assert read_reservation(Disk(), lane.folder) == before
    assert bad_slots(bytes(data)) == [older]


def test_a_lane_without_ids_or_ordinals_above_what_was_given_out_is_refused(acquired: Acquirer) -> None:
    lane = acquired()
    with pytest.raises(DamageError, match="none above"):
        lane.begin(MAX_ID, NOW_US)
    journal_path(lane.folder, (1 << 32) - 1).write_bytes(b"")
    lane.end()
    with pytest.raises(DamageError, match="none of ours"):
        acquired().begin(0, NOW_US)


@pytest.mark.parametrize("name", ["5", "00000000005", "\u00b2", "\u0663" * 10])
def test_files_that_others_put_there_are_no_journals(acquired: Acquirer, name: str) -> None:
    lane = acquired()
    begin(lane)
    write(lane)
    (lane.folder / f"{name}.journal").write_bytes(b"")
    assert journal_ordinals(Disk(), lane.folder) == [1]
    for other in ("\u00b2", "12345", "9999", "7"):
        (lane.folder.parent / other).mkdir()
    assert [number for number, _ in lane_folders(Disk(), lane.folder.parent.parent)] == [0]


def test_a_settled_lane_begins_at_the_clock_and_the_next_ordinal(acquired: Acquirer) -> None:
    lane = acquired()
    begin(lane)
    newest = write(lane)
    lane.rotate()
    lane.settle()
    lane.end()
    reservation = read_reservation(Disk(), lane.folder)
    assert reservation == Reservation(newest + 1, lane._ordinal)
    again = acquired()
    begin(again, NOW_US + 10_000)
    assert again.incarnation >> 21 == NOW_US // 1000 + 10


# Journal files.


def test_files_follow_each_other_and_say_where_the_one_before_ends(acquired: Acquirer) -> None:
    lane = acquired()
    begin(lane)
    ends = {0: 0}
    for _ in range(4):
        write(lane)
        write(lane)
        assert lane.journal is not None
        number, journal = lane.journal.header.number, lane.journal
        lane.rotate()
        ends[number] = journal.end
        assert lane.marks.durable == Place(number, journal.end)
    ordinals = journal_ordinals(Disk(), lane.folder)
    assert len(ordinals) == 4
    for ordinal in ordinals:
        header = header_of(lane, ordinal)
        assert (header.store_id, header.incarnation, header.number) == (STORE_ID, lane.incarnation, ordinal)
        assert header.follows_end == ends[header.follows]
        path = journal_path(lane.folder, ordinal)
        scan = scan_journal(path.read_bytes(), path, ends[ordinal], ends[ordinal])
        assert (len(scan.frames), scan.damage, scan.torn_bytes) == (2, [], 0)


def test_a_rotation_without_a_journal_does_nothing(acquired: Acquirer) -> None:
    lane = acquired()
    begin(lane)
    lane.rotate()
    lane.show()
    lane.abandon()
    lane.discard()
    assert journal_ordinals(Disk(), lane.folder) == []
    assert lane.marks.durable == NOWHERE


def test_ordinals_are_never_used_twice(acquired: Acquirer) -> None:
    seen: list[int] = []
    for opening in range(4):
        lane = acquired()
        begin(lane)
        for _ in range(20 * opening + 1):
            write(lane)
            assert lane.journal is not None
            seen.append(lane.journal.header.number)
            lane.rotate()
            # A checkpoint, or a power cut that forgets the new name.
            journal_path(lane.folder, seen[-1]).unlink()
        lane.end()
    assert seen == sorted(set(seen))


def test_an_ordinal_is_reserved_before_it_is_used(acquired: Acquirer) -> None:
    lane = acquired()
    begin(lane)
    for _ in range(150):
        write(lane)
        assert lane.journal is not None
        assert lane.journal.header.number < read_reservation(Disk(), lane.folder).ordinal
        lane.rotate()


def test_a_lane_that_lost_its_state_goes_on_behind_the_journals_that_are_there(acquired: Acquirer) -> None:
    lane = acquired()
    begin(lane)
    write(lane)
    (last,) = journal_ordinals(Disk(), lane.folder)
    lane.end()
    (lane.folder / "state").unlink()
    lane = acquired()
    begin(lane)
    write(lane)
    assert journal_ordinals(Disk(), lane.folder)[-1] > last


@pytest.mark.parametrize("kind", ["create", "write", "sync_folder"])
def test_a_file_that_could_not_be_begun_does_not_lend_its_ordinal_again(acquired: Acquirer, kind: str) -> None:
    disk = FaultyDisk()
    lane = acquired(disk)
    begin(lane)
    disk.fail(Fault(kind, name=".journal" if kind != "sync_folder" else lane.folder.name))
    with pytest.raises(OSError, match="Input/output error"):
        write(lane)
    lane.abandon()
    write(lane)
    assert lane.journal is not None
    assert lane.journal.header.number == 2
    assert (lane.journal.header.follows, lane.journal.header.follows_end) == (0, 0)


@pytest.mark.promise("failed-file-given-up")
def test_a_file_that_failed_ends_at_its_last_good_sync(acquired: Acquirer) -> None:
    disk = FaultyDisk()
    lane = acquired(disk)
    begin(lane)
    write(lane)
    lane.sync()
    assert lane.journal is not None
    failed, durable = lane.journal.header.number, lane.journal.durable
    write(lane)
    disk.fail(Fault("sync", name=".journal"))
    with pytest.raises(OSError, match="Input/output error"):
        lane.sync()
    assert lane.marks.durable == Place(failed, durable)
    lane.abandon()
    write(lane)
    header = lane.journal.header
    assert (header.follows, header.follows_end) == (failed, durable)


@pytest.mark.promise("failed-file-given-up")
def test_a_file_that_failed_before_its_first_sync_ends_behind_its_header(acquired: Acquirer) -> None:
    disk = FaultyDisk()
    lane = acquired(disk)
    begin(lane)
    write(lane)
    disk.fail(Fault("sync", name=".journal"))
    with pytest.raises(OSError, match="Input/output error"):
        lane.rotate()
    lane.abandon()
    write(lane)
    assert lane.journal is not None
    assert (lane.journal.header.follows, lane.journal.header.follows_end) == (1, PAGE_BYTES)


def test_what_is_discarded_is_gone_and_the_next_file_follows_the_one_that_counts(acquired: Acquirer) -> None:
    disk = FaultyDisk()
    lane = acquired(disk)
    begin(lane)
    write(lane)
    lane.sync()
    assert lane.journal is not None
    counts = Place(lane.journal.header.number, lane.journal.durable)
    lane.abandon()
    for _ in range(3):
        write(lane)
        lane.discard()
    assert journal_ordinals(Disk(), lane.folder) == [counts.ordinal]
    write(lane)
    header = lane.journal.header
    assert (header.follows, header.follows_end) == counts
    assert header.number == counts.ordinal + 4


def test_to_discard_on_a_disk_that_removes_nothing_is_no_error(acquired: Acquirer) -> None:
    disk = FaultyDisk()
    lane = acquired(disk)
    begin(lane)
    write(lane)
    disk.fail(Fault("unlink"))
    lane.discard()
    write(lane)
    assert journal_ordinals(Disk(), lane.folder) == [1, 2]


# Marks.


def test_the_marks_have_the_layout_that_the_format_names(tmp_path: Path) -> None:
    marks = Marks(Disk(), tmp_path)
    marks.begin(77)
    marks.show(3, 8192)
    marks.witness(2, 4096)
    data = (tmp_path / "marks").read_bytes()
    assert len(data) == PAGE_BYTES
    byte_order = "<" if sys.byteorder == "little" else ">"
    assert struct.unpack_from(f"{byte_order}QQ16sQ", data) == (3 << 32 | 8192, 2 << 32 | 4096, boot_id(), 77)
    assert not any(data[40:])
    assert (marks.visible, marks.durable, marks.incarnation) == (Place(3, 8192), Place(2, 4096), 77)
    assert marks.word == 3 << 32 | 8192
    marks.close()


def test_marks_are_seen_by_others_at_once(tmp_path: Path) -> None:
    writer, reader = Marks(Disk(), tmp_path), Marks(Disk(), tmp_path)
    assert (reader.visible, reader.durable, reader.valid) == (NOWHERE, NOWHERE, False)
    writer.begin(5)
    for ordinal, offset in ((1, 5), (1, 0xFFFF_FFFF), (0xFFFF_FFFF, 1)):
        writer.show(ordinal, offset)
        writer.witness(ordinal, offset)
        assert reader.visible == reader.durable == Place(ordinal, offset)
    writer.close()
    reader.close()


def test_a_new_incarnation_shows_nothing_yet(tmp_path: Path) -> None:
    marks = Marks(Disk(), tmp_path)
    marks.begin(5)
    marks.show(9, 9)
    marks.witness(9, 9)
    marks.begin(6)
    assert (marks.visible, marks.durable, marks.incarnation, marks.valid) == (NOWHERE, NOWHERE, 6, True)
    marks.close()


@pytest.mark.promise("visible-when-acknowledged")
def test_after_a_restart_of_the_machine_nothing_is_visible_and_the_witness_counts(tmp_path: Path) -> None:
    marks = Marks(Disk(), tmp_path)
    marks.begin(5)
    marks.show(3, 9000)
    marks.witness(3, 8000)
    marks.close()
    data = bytearray((tmp_path / "marks").read_bytes())
    data[16] ^= 1
    (tmp_path / "marks").write_bytes(data)
    marks = Marks(Disk(), tmp_path)
    assert (marks.visible, marks.durable, marks.valid) == (NOWHERE, Place(3, 8000), False)
    marks.close()


@pytest.mark.promise("visible-when-acknowledged")
def test_a_lane_shows_what_is_written_and_witnesses_what_is_synced(acquired: Acquirer) -> None:
    lane = acquired()
    begin(lane)
    write(lane)
    assert lane.journal is not None
    place = Place(lane.journal.header.number, lane.journal.end)
    assert (lane.marks.visible, lane.marks.durable) == (NOWHERE, NOWHERE)
    lane.show()
    assert (lane.marks.visible, lane.marks.durable) == (place, NOWHERE)
    lane.sync()
    assert (lane.marks.visible, lane.marks.durable) == (place, place)


def test_the_boot_id_is_the_same_for_all_processes_since_the_start() -> None:
    assert len(boot_id()) == 16
    assert boot_id() == boot_id.__wrapped__()
    assert any(boot_id())


def test_a_full_disk_is_an_error_and_no_signal_when_a_lane_is_disowned(acquired: Acquirer) -> None:
    # A store into a mapped page without a block kills the process; a page that nobody has written yet is one.
    disk = FaultyDisk()
    lane = acquired(disk)
    disk.fail(Fault("write", name="marks"))
    with pytest.raises(OSError, match="Input/output error"):
        lane.marks.disown()
    lane.marks.disown()
    assert lane.marks.incarnation == 0
