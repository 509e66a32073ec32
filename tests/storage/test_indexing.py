"""The index that is made of segments says exactly what they hold, whatever happened to them."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from logstore.storage.catalogue import Catalogue
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_SEGMENT, FileHeader, frame_seed
from logstore.storage.indexing import Indexed, make_index, reindex
from logstore.storage.record import Event, decode_frame, encode_frame, salvage_frames
from logstore.storage.segment import segment_path
from tests.storage.disks import Fault, FaultyDisk

STORE_ID = 21
SEED = frame_seed(STORE_ID)
NOW_US = 1_790_000_000_000_000


class Store:
    """Segments without a catalogue."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "events-log"
        self.path = folder / "events.db"
        self.disk = FaultyDisk()
        self.disk.make_folder(self.root / "segments")

    def segment(self, number: int, events: Sequence[tuple[int, str]], flags: int = 0) -> Path:
        """Write a segment of events `(id, stream)`."""
        header = FileHeader(kind=KIND_SEGMENT, store_id=STORE_ID, salt=number, number=number)
        frames = [
            encode_frame(Event(each, 0, NOW_US + each, stream, flags, b"x" * (each % 300)), SEED)
            for each, stream in events
        ]
        path = segment_path(self.root, number)
        path.write_bytes(header.encode() + b"".join(frames))
        return path

    def make(self, **options: Any) -> Indexed:
        """Make the index."""
        return make_index(self.disk, self.root, self.path, STORE_ID, **options)

    def index(self) -> Indexed:
        """Index what the catalogue does not know."""
        catalogue = Catalogue(self.path)
        catalogue.open()
        try:
            return reindex(self.disk, self.root, catalogue, STORE_ID)
        finally:
            catalogue.close()

    def ask(self, sql: str) -> list[Any]:
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(sql).fetchall()

    def change(self, *statements: str) -> None:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            for sql in statements:
                connection.execute(sql)

    def ids(self) -> list[int]:
        return [row[0] for row in self.ask("select event_id from events order by 1")]

    def check(self) -> None:
        """Each row leads to its event, and runs hold the events that the rows say, no other and none twice."""
        rows: dict[int, tuple[int, int, int]] = {}
        for event_id, stream, segment, offset, length in self.ask(
            "select event_id, name, segment_id, offset, length from events join streams using (stream_id)"
        ):
            frame = segment_path(self.root, segment).read_bytes()[offset : offset + length]
            event = decode_frame(frame)
            assert (event.id, event.stream) == (event_id, stream)
            rows[event_id] = (segment, offset, length)
        in_runs: dict[int, tuple[int, int, int]] = {}
        for row in self.ask("select name, extents.* from extents join streams using (stream_id)"):
            stream, _, first_id, last_id, segment, offset, length, count, first_us, last_us, flags = row
            run = segment_path(self.root, segment).read_bytes()[offset : offset + length]
            events = [(decode_frame(frame), offset + at, len(frame)) for at, frame in salvage_frames(b"" + run, SEED)]
            first, last = events[0][0], events[-1][0]
            assert sum(size for _, _, size in events) == length
            assert {event.stream for event, _, _ in events} == {stream}
            assert (len(events), first.id, last.id) == (count, first_id, last_id)
            assert (first.time_us, last.time_us, last.flags) == (first_us, last_us, flags)
            assert [event.id for event, _, _ in events] == sorted(event.id for event, _, _ in events)
            for event, at, size in events:
                assert event.id not in in_runs
                in_runs[event.id] = (segment, at, size)
        assert in_runs == rows


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def pack(first: int, count: int, streams: int) -> list[tuple[int, str]]:
    """Return events as a pack holds them: each stream contiguous."""
    return [(first + at, f"stream {stream}") for stream in range(streams) for at in range(stream, count, streams)]


def test_every_event_and_every_run_is_where_the_index_says(store: Store) -> None:
    # More than the scanner takes at once, so that runs go on from one chunk to the next.
    own = store.segment(1, [(each, "own") for each in range(1, 1701)], flags=4)
    store.segment(2, pack(2000, 1300, 40))
    store.segment(3, [(each, "own") for each in range(4000, 4010)])
    assert store.make() == Indexed(3010, 3)
    store.check()
    assert len(store.ids()) == 3010
    assert len(store.ask("select * from extents")) == 42
    digest = hashlib.sha256(own.read_bytes()).hexdigest()
    rows = store.ask(
        "select bytes, events, first_id, last_id, sealed, sha256, name from segments join streams using (stream_id)"
    )
    assert rows[0] == (own.stat().st_size, 1700, 1, 1700, 1, digest, "own")
    assert store.ask("select stream_id from segments where segment_id = 2") == [(None,)]


def test_events_out_of_order_are_runs_of_their_own(store: Store) -> None:
    store.segment(1, [(10, "s"), (11, "s"), (5, "s"), (6, "s"), (12, "s")])
    store.make()
    store.check()
    assert store.ask("select first_id, last_id from extents order by 1") == [(5, 12), (10, 11)]


def test_a_process_that_scans_finds_the_same(store: Store) -> None:
    for number in range(1, 6):
        store.segment(number, pack(1000 * number, 700, 7))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as scanners:
        store.disk = Disk()  # type: ignore[assignment]
        assert store.make(scanners=scanners) == Indexed(3500, 5)
    store.check()


@pytest.mark.promise("catalogue-is-derived")
def test_what_lies_around_damage_is_indexed(store: Store) -> None:
    path = store.segment(1, pack(1, 900, 3))
    data = bytearray(path.read_bytes())
    frames = list(salvage_frames(bytes(data), SEED))
    lost = [frames[0], frames[300], frames[301], frames[-1]]
    for offset, frame in lost:
        data[offset + len(frame) // 2] ^= 0x55
    # The length of one.
    data[frames[500][0] : frames[500][0] + 4] = b"\xff\xff\xff\x00"
    path.write_bytes(data)
    assert store.make() == Indexed(895, 1)
    store.check()
    gone = {decode_frame(frame).id for _, frame in [*lost, frames[500]]}
    assert store.ids() == [each for each in range(1, 901) if each not in gone]


def test_a_damaged_header_is_told_and_its_events_are_indexed(store: Store) -> None:
    path = store.segment(1, pack(1, 30, 2))
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    store.make()
    store.check()
    assert len(store.ids()) == 30
    assert store.ask("select file, offset from damage") == [("segments/1.segment", 0)]


def without_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:HEADER_BYTES] = bytes(HEADER_BYTES)
    path.write_bytes(data)


def test_a_segment_that_a_power_cut_took_the_header_of_is_no_damage(store: Store) -> None:
    # Of a checkpoint that never committed: the journal has what is in it, whatever of it is whole.
    store.segment(1, pack(1, 20, 2))
    store.make()
    without_header(store.segment(2, pack(100, 20, 2)))
    assert store.index() == Indexed(0, 0)
    assert store.ids() == list(range(1, 21))
    # The next checkpoint has them, and the index is made again.
    store.segment(3, pack(100, 20, 2))
    assert store.make().events == 40
    store.check()
    assert store.ask("select * from damage") == []
    assert store.ask("select segment_id from segments order by 1") == [(1,), (3,)]


def test_an_index_that_is_made_again_believes_the_one_before_about_what_was_committed(store: Store) -> None:
    store.segment(1, pack(1, 20, 2))
    known = store.segment(2, pack(100, 20, 2))
    store.make()
    for path in (known, store.segment(3, pack(200, 20, 2))):
        path.write_bytes(bytes(path.stat().st_size))
    store.make()
    assert store.ids() == list(range(1, 21))
    assert store.ask("select file from damage") == [("segments/2.segment",)]
    assert store.ask("select segment_id from segments order by 1") == [(1,), (2,)]


def test_a_segment_without_a_whole_event_is_told_when_no_index_knows_it(store: Store) -> None:
    path = store.segment(1, pack(1, 20, 2))
    path.write_bytes(bytes(path.stat().st_size))
    store.make()
    assert store.ask("select file, offset from damage") == [("segments/1.segment", 0)]


def test_a_known_segment_that_grew_and_lost_its_header_is_told(store: Store) -> None:
    store.segment(1, pack(1, 20, 2))
    store.make()
    without_header(store.segment(1, pack(1, 40, 2)))
    assert store.index() == Indexed(40, 1)
    store.check()
    assert store.ask("select file, offset from damage") == [("segments/1.segment", 0)]


def test_nothing_is_in_a_file_that_was_only_being_made(store: Store) -> None:
    segment_path(store.root, 1).write_bytes(bytes(HEADER_BYTES - 1))
    segment_path(store.root, 2).touch()
    store.segment(3, [])
    assert store.make() == Indexed(0, 1)
    assert store.ask("select segment_id, events, stream_id from segments") == [(3, 0, None)]


def test_an_event_of_two_segments_is_one(store: Store) -> None:
    events = pack(1, 1200, 5)
    store.segment(1, events[:700])
    store.segment(2, events[300:])
    # And one that is twice in the same file.
    store.segment(3, [*events[:100], (5000, "new"), (5001, "new"), (5001, "new"), (5000, "new")])
    store.make()
    store.check()
    assert store.ids() == [*range(1, 1201), 5000, 5001]
    assert store.ask("select segment_id, events from segments") == [(1, 700), (2, 500), (3, 2)]


def test_a_segment_that_has_grown_is_indexed_whole(store: Store) -> None:
    store.segment(1, pack(1, 20, 2))
    store.make()
    store.segment(1, pack(1, 40, 2))
    store.segment(2, pack(100, 20, 2))
    assert store.index() == Indexed(60, 2)
    store.check()
    assert len(store.ids()) == 60
    assert store.index() == Indexed(0, 0)


DROPPED = ("update streams set dropped_id = 15, dropped_at = 'then' where name = 'stream 0'",)


@pytest.mark.promise("dropped-stays-dropped")
@pytest.mark.parametrize("afresh", [True, False])
def test_what_retention_dropped_is_not_indexed_again(store: Store, afresh: bool) -> None:
    store.segment(1, pack(1, 20, 2))
    store.make()
    store.change(*DROPPED)
    store.segment(2, pack(1, 20, 2))
    store.segment(3, pack(21, 20, 2))
    if afresh:
        store.make()
        kept = [*range(2, 16, 2), *range(16, 41)]
    else:
        store.change("delete from events where segment_id = 1", "delete from extents where segment_id = 1")
        store.index()
        kept = [*range(2, 16, 2), *range(16, 41)]
    assert store.ids() == kept
    store.check()
    assert store.ask("select name, dropped_id, dropped_at from streams where dropped_id > 0") == [
        ("stream 0", 15, "then")
    ]


def test_an_older_index_finds_what_compaction_moved_since(store: Store) -> None:
    moved = pack(1, 20, 2)
    old = store.segment(1, moved)
    store.segment(2, pack(100, 20, 2))
    store.make()
    store.segment(3, moved)
    old.unlink()
    assert store.index() == Indexed(20, 1)
    store.check()
    assert store.ids() == [*range(1, 21), *range(100, 120)]
    assert store.ask("select segment_id from segments where dropped = 0 order by 1") == [(2,), (3,)]
    assert store.index() == Indexed(0, 0)


def test_an_older_index_lets_go_of_a_segment_that_was_emptied_and_removed_since(store: Store) -> None:
    old = store.segment(1, pack(1, 20, 2))
    store.segment(2, pack(100, 20, 2))
    store.make()
    store.change("delete from events where segment_id = 1", "delete from extents where segment_id = 1")
    old.unlink()
    assert store.index() == Indexed(0, 0)
    assert store.ask("select segment_id, dropped from segments order by 1") == [(1, 1), (2, 0)]


def test_what_a_missing_segment_held_and_no_other_holds_stays_known_as_lost(store: Store) -> None:
    first, second = [(each, "a") for each in range(1, 11)], [(each, "b") for each in range(11, 21)]
    old = store.segment(1, first + second)
    store.make()
    store.segment(2, first)
    old.unlink()
    assert store.index() == Indexed(10, 1)
    assert store.ask("select segment_id, count(*) from events group by 1") == [(1, 10), (2, 10)]
    assert store.ask("select segment_id, first_id, last_id from extents order by 1") == [(1, 11, 20), (2, 1, 10)]
    assert store.ask("select segment_id from segments where dropped = 0 order by 1") == [(1,), (2,)]


def test_a_segment_on_its_way_out_is_left_alone(store: Store) -> None:
    path = store.segment(1, pack(1, 20, 2))
    store.segment(2, pack(100, 20, 2))
    store.make()
    store.change("update segments set dropped = 1 where segment_id = 1", "delete from extents where segment_id = 1")
    with path.open("ab") as file:
        file.write(b"more")
    assert store.index() == Indexed(0, 0)
    assert store.make() == Indexed(20, 1)
    assert store.ids() == list(range(100, 120))
    assert store.ask("select segment_id, dropped from segments") == [(1, 1), (2, 0)]


def test_what_only_a_catalogue_knows_goes_into_the_next_one(store: Store) -> None:
    store.segment(1, pack(1, 20, 2))
    store.make()
    store.change(
        "insert into imports values ('there', '7', 3)",
        "insert into maintenance values ('backup', 1, 'a', 'b', 'c')",
        "insert into damage values ('f', 1, 2, 3, 'r', 'k', 't')",
    )
    tables = ("imports", "maintenance", "damage")
    before = [store.ask(f"select * from {table}") for table in tables]
    store.make()
    assert [store.ask(f"select * from {table}") for table in tables] == before
    assert all(before)


def test_the_new_index_is_on_disk_before_it_takes_its_place(store: Store) -> None:
    store.segment(1, pack(1, 20, 2))
    store.make()
    store.disk.calls.clear()
    store.make()
    calls = [call for call in store.disk.calls if call[0] in ("sync", "rename", "sync_folder")]
    at = calls.index(("rename", "events.db"))
    assert calls[at - 1] == ("sync", "events.db.new")
    assert calls[at + 1] == ("sync_folder", store.path.parent.name)
    assert store.ask("pragma journal_mode") == [("wal",)]
    assert store.ask("pragma integrity_check") == [("ok",)]


@pytest.mark.promise("reindex-whole")
@pytest.mark.parametrize(
    "fault",
    [
        Fault("read", at=2, name=".segment"),
        Fault("sync", name="events.db.new"),
        Fault("rename", name="events.db"),
        Fault("create", name="events.db.new"),
    ],
    ids=lambda fault: fault.kind,
)
def test_a_disk_that_fails_leaves_the_index_that_was_there_and_nothing_else(store: Store, fault: Fault) -> None:
    store.segment(1, pack(1, 20, 2))
    store.segment(2, pack(100, 20, 2))
    store.make()
    before = store.path.read_bytes()
    store.segment(3, pack(200, 20, 2))
    store.disk.fail(fault)
    with pytest.raises(OSError, match="Input/output error"):
        store.make()
    assert store.path.read_bytes() == before
    assert [each.name for each in store.path.parent.glob("events.db.*")] == []
    store.disk.heal()
    assert store.make() == Indexed(60, 3)


def test_the_caller_is_told_how_far_it_is(store: Store) -> None:
    sizes = [store.segment(number, pack(100 * number, 20, 2)).stat().st_size for number in (1, 2)]
    told: list[tuple[int, int]] = []
    store.make(progress=lambda done, total: told.append((done, total)))
    assert told == [(sizes[0], sum(sizes)), (sum(sizes), sum(sizes))]
