"""Retention drops what it should and nothing else; compaction moves what is left; readers do not notice."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from logstore.errors import GapError, StoreLockedError
from logstore.ops.access import StoreView
from logstore.ops.compaction import compact as compaction
from logstore.ops.compaction.compact import Compacted, compact
from logstore.storage import FLAG_FINAL, FLAG_REQUEST, Log, LogOptions, Retention
from logstore.storage.files import Disk
from logstore.storage.options import MIB
from tests.ops.stores import SEGMENT_BYTES, Writer, has_gap, opened, read_ids, segment_files
from tests.storage.disks import Fault, FaultyDisk

DAY_S = 86_400.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture(autouse=True)
def little_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let compaction find something to do in a small store."""
    monkeypatch.setattr(compaction, "_MOST_SMALL", 4)
    monkeypatch.setattr(compaction, "_KEPT_SMALL", 2)
    monkeypatch.setattr(compaction, "_GROWN_RUNS", 4)
    monkeypatch.setattr(compaction, "_GROWN_BYTES", 4 << 10)


def run(path: Path, disk: Disk | None = None, **retention: float) -> Compacted:
    with opened(path, disk) as store:
        return compact(store, Retention(**retention), segment_bytes=SEGMENT_BYTES)  # type: ignore[arg-type]


def ask(path: Path, sql: str) -> list[tuple[int | str, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def assert_index_agrees(path: Path) -> None:
    """Every row of an event points to a segment that is there, and every run's events have a row each."""
    wrong = ask(path, "SELECT count(*) FROM events WHERE segment_id NOT IN (SELECT segment_id FROM segments)")
    assert wrong == [(0,)]
    counts = ask(
        path,
        """
        SELECT e.events, (SELECT count(*) FROM events WHERE stream_id = e.stream_id AND segment_id = e.segment_id
                          AND event_id BETWEEN e.first_id AND e.last_id)
        FROM extents AS e
        """,
    )
    assert all(said == found for said, found in counts)


# Retention.


@pytest.mark.promise("drops-from-the-beginning", "age")
def test_what_is_older_than_the_age_goes_and_its_files_with_it(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.write(("a", "b"), 10, age_h=48)
        writer.write(("a",), 5, age_h=1)
        before = segment_files(path)
        done = compact(store, Retention(max_age_s=DAY_S))
    assert [tuple(each)[:2] for each in done.dropped] == [("age", 20)]
    assert done.removed_segments == 1
    assert len(segment_files(path)) == len(before) - 1
    assert read_ids(path, "a") == writer.ids["a"][10:]
    assert read_ids(path, "b") == []
    assert ask(path, "SELECT count(*) FROM events") == [(5,)]


@pytest.mark.promise("drops-from-the-beginning")
def test_of_a_stream_nothing_goes_that_follows_something_that_stays(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.write(("a",), 5, age_h=48)
        writer.write(("a",), 5, age_h=1)
        # The clock stepped back.
        writer.write(("a",), 5, age_h=48)
        compact(store, Retention(max_age_s=DAY_S))
    assert read_ids(path, "a") == writer.ids["a"][5:]


@pytest.mark.promise("dropped-is-told")
def test_a_reader_whose_next_event_was_dropped_is_told_so(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.write(("a",), 10, age_h=48)
        writer.write(("a",), 5, age_h=1)
        compact(store, Retention(max_age_s=DAY_S))
    ids = writer.ids["a"]
    assert has_gap(path, "a", ids[3])
    assert has_gap(path, "a", ids[8])
    assert read_ids(path, "a", ids[9]) == ids[10:]
    with StoreView(path) as view:
        assert view.reader.stream_of(ids[3]) is None


@pytest.mark.promise("dropped-is-told")
def test_a_follower_of_a_stream_that_went_whole_is_told_only_when_it_missed_something(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.write(("a",), 10, age_h=48)
        compact(store, Retention(max_age_s=DAY_S))
    ids = writer.ids["a"]
    assert has_gap(path, "a", ids[8])
    assert read_ids(path, "a", ids[9]) == []


@pytest.mark.promise("count-exact-on-reads")
def test_by_count_the_newest_stay_and_reads_show_exactly_so_many(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        for _ in range(4):
            writer.write(("a", "b"), 10, age_h=2)
        writer.write(("c",), 3, age_h=2)
    retention = Retention(max_events=15)

    async def shown() -> None:
        async with Log(path, LogOptions(retention=retention)) as log:
            events = await log.read("a")
            assert [event.id for event in events] == writer.ids["a"][-15:]
            assert await log.read("a", str(writer.ids["a"][24])) == events
            assert len(await log.read("c")) == 3

    asyncio.run(shown())
    done = run(path, max_events=15)
    assert [(each.rule, each.events) for each in done.dropped] == [("count", 40)]
    asyncio.run(shown())
    assert has_gap(path, "a", writer.ids["a"][18])


@pytest.mark.promise("window-and-requests-spared")
def test_by_count_the_events_of_the_last_minutes_and_unanswered_requests_stay(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        for _ in range(3):
            writer.write(("young",), 10, age_h=0.1)
            writer.checkpoint(writer.events("asked", 10, age_h=2, flags=FLAG_REQUEST))
            writer.checkpoint(writer.events("answered", 10, age_h=2, flags=FLAG_REQUEST))
        writer.checkpoint(writer.events("answered", 1, age_h=2, flags=FLAG_REQUEST | FLAG_FINAL))

    async def shown() -> None:
        async with Log(path, LogOptions(retention=Retention(max_events=5))) as log:
            assert len(await log.read("young")) == 30
            assert len(await log.read("asked")) == 30
            assert len(await log.read("answered")) == 5

    asyncio.run(shown())
    done = run(path, max_events=5)
    assert [(each.rule, each.events, each.streams) for each in done.dropped] == [("count", 20, 1)]
    asyncio.run(shown())


@pytest.mark.promise("window-and-requests-spared")
def test_by_age_also_unanswered_requests_go(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.checkpoint(writer.events("asked", 10, age_h=48, flags=FLAG_REQUEST))
        compact(store, Retention(max_age_s=DAY_S))
    assert read_ids(path, "asked") == []


@pytest.mark.promise("bytes")
def test_by_bytes_the_oldest_go_until_the_rest_fits(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        for _ in range(10):
            writer.write(("a", "b"), 20, age_h=2)
        writer.checkpoint(writer.events("asked", 20, age_h=2, flags=FLAG_REQUEST))
        (total,) = ask(path, "SELECT sum(bytes) FROM segments")[0]
        assert isinstance(total, int)
        done = compact(store, Retention(max_bytes=total // 2))
        (left,) = ask(path, "SELECT sum(bytes) FROM segments")[0]
    assert isinstance(left, int)
    assert total // 3 < left <= total // 2
    assert [each.rule for each in done.dropped] == ["bytes"]
    kept = len(read_ids(path, "a"))
    assert 0 < kept < 200
    assert read_ids(path, "a") == writer.ids["a"][-kept:]
    assert len(read_ids(path, "asked")) == 20


@pytest.mark.promise("window-and-requests-spared")
def test_by_bytes_young_events_stay_however_many(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        for _ in range(5):
            writer.write(("a",), 20)
        assert compact(store, Retention(max_bytes=1)).dropped == []
    assert read_ids(path, "a") == writer.ids["a"]


@pytest.mark.promise("ended-sessions")
def test_an_ended_sessions_streams_go_and_no_others(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        now_us = time.time_ns() // 1000
        for key, prefix in (("one", "1/"), ("two", "2/")):
            store.registry.open_session(key, store.lane.incarnation, now_us - 7_200_000_000, b"", prefix)
        store.registry.end_session("one", store.lane.incarnation, now_us - 3_600_000_000)
        writer.write(("1/x", "1/y", "2/x", "1", "10/x"), 5, age_h=1)
        store.copy_sessions()
        done = compact(store, Retention())
    assert [(each.rule, each.events) for each in done.dropped] == [("session", 10)]
    assert {stream: len(read_ids(path, stream)) for stream in writer.ids} == {
        **{"1/x": 0, "1/y": 0},
        **{"2/x": 5, "1": 5, "10/x": 5},
    }


@pytest.mark.promise("ended-sessions")
def test_an_ended_sessions_streams_stay_for_ten_minutes(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        now_us = time.time_ns() // 1000
        for key, ended_s in (("long ago", 660), ("just now", 540)):
            store.registry.open_session(key, store.lane.incarnation, now_us - 7_200_000_000, b"", f"{key}/")
            store.registry.end_session(key, store.lane.incarnation, now_us - ended_s * 1_000_000)
        writer.write(("long ago/1", "just now/1"), 5, age_h=1)
        store.copy_sessions()
        compact(store, Retention())
    assert {stream: len(read_ids(path, stream)) for stream in writer.ids} == {"long ago/1": 0, "just now/1": 5}


@pytest.mark.promise("dry-run")
def test_a_dry_run_says_what_would_go_and_changes_nothing(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.write(("a", "b"), 10, age_h=48)
        retention = Retention(max_age_s=DAY_S)
        before = segment_files(path)
        said = compact(store, retention, dry_run=True)
        assert segment_files(path) == before
        assert read_ids(path, "a") == writer.ids["a"]
        assert said.dropped == compact(store, retention).dropped


# Compaction.


def test_small_segments_come_together_and_a_grown_stream_gets_its_own(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        for _ in range(20):
            writer.write(("large",), 20)
            writer.write((f"small{each}" for each in range(5)), 2)
        done = compact(store, Retention(), segment_bytes=SEGMENT_BYTES)
    assert done.dropped == []
    assert done.moved_events == 20 * 20 + 20 * 10
    assert len(segment_files(path)) < 8
    assert ask(path, "SELECT count(*) FROM extents JOIN streams USING (stream_id) WHERE name = 'large'") == [(1,)]
    assert all(read_ids(path, stream) == ids for stream, ids in writer.ids.items())
    assert_index_agrees(path)
    assert run(path).moved_events == 0


@pytest.mark.promise("age")
def test_a_half_dead_segment_is_written_anew(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.checkpoint(writer.events("old", 100, age_h=48), writer.events("young", 10, age_h=1))
        done = compact(store, Retention(max_age_s=DAY_S))
    assert (done.moved_events, done.removed_segments) == (10, 1)
    assert read_ids(path, "young") == writer.ids["young"]
    assert ask(path, "SELECT count(*) FROM events") == [(10,)]
    assert_index_agrees(path)


def test_what_a_killed_process_left_open_is_compacted_too(path: Path) -> None:
    with opened(path) as survivor:
        with opened(path, segment_bytes=MIB) as store:
            writer = Writer(store)
            writer.write(("large",), 4, payload_bytes=100_000)
            with next((store.root / "segments").iterdir()).open("ab") as file:
                # Of a checkpoint that did not commit.
                file.write(b"more")
            # As after a kill: nothing is sealed.
            store.segments.__dict__["_open"].clear()
        assert ask(path, "SELECT sealed FROM segments") == [(0,)]
        done = compact(survivor, Retention())
    assert (done.moved_events, done.removed_segments) == (4, 1)
    assert read_ids(path, "large") == writer.ids["large"]
    assert ask(path, "SELECT sealed FROM segments") == [(1,)]


def test_the_open_segments_of_a_live_process_stay(path: Path) -> None:
    with opened(path, segment_bytes=MIB) as store:
        writer = Writer(store)
        writer.write(("large",), 4, payload_bytes=100_000)
        run(path)
        assert ask(path, "SELECT sealed FROM segments") == [(0,)]
        writer.write(("large",), 4, payload_bytes=100_000)
    assert read_ids(path, "large") == writer.ids["large"]


def test_idle_segments_are_sealed(path: Path) -> None:
    with opened(path, segment_bytes=MIB) as store:
        writer = Writer(store)
        writer.write(("large",), 4, payload_bytes=100_000)
        store.seal_idle_segments(0)
        assert ask(path, "SELECT sealed FROM segments") == [(0,)]
        store.seal_idle_segments(time.time_ns() // 1000 + 1)
        assert ask(path, "SELECT sealed, length(sha256) FROM segments") == [(1, 64)]
        writer.write(("large",), 4, payload_bytes=100_000)
    assert read_ids(path, "large") == writer.ids["large"]


def test_damaged_events_stay_where_they_are(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.checkpoint(writer.events("old", 100, age_h=48), writer.events("young", 10, age_h=1))
    (name,) = segment_files(path)
    file = path.with_name("events-log") / "segments" / name
    data = bytearray(file.read_bytes())
    data[-50] ^= 1
    file.write_bytes(data)
    done = run(path, max_age_s=DAY_S)
    assert (done.moved_events, done.damaged_segments) == (0, [int(name.removesuffix(".segment"))])
    with StoreView(path) as view:
        assert [event.id for event in view.read("young", 0, 100)] == writer.ids["young"][:9]


@pytest.mark.promise("one-does-the-work")
def test_only_one_compacts_at_a_time(path: Path) -> None:
    with opened(path) as store, opened(path) as other:
        held = store.compaction_lock()
        assert held is not None
        with held, pytest.raises(StoreLockedError, match="compacts"):
            compact(other, Retention())


@pytest.mark.promise("backup-holds-up-nobody")
def test_a_backup_under_way_keeps_the_files_but_not_the_events(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.write(("a",), 10, age_h=48)
        pinned = Disk().lock(store.root / "removal.lock", shared=True)
        assert pinned is not None
        with pinned:
            done = compact(store, Retention(max_age_s=DAY_S))
            assert (done.removed_segments, done.waiting_segments) == (0, 1)
            assert len(segment_files(path)) == 1
            assert read_ids(path, "a") == []
        assert compact(store, Retention()).removed_segments == 1
    assert segment_files(path) == []
    assert ask(path, "SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM segments)") == [(0, 0)]


# Faults.


def test_a_segment_that_is_marked_as_dropped_and_is_not_stays(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.write(("a",), 10)
        with store.changing_catalogue(store.catalogue.inode) as catalogue:
            catalogue.connection.execute("UPDATE segments SET dropped = 1")
        assert compact(store, Retention()).removed_segments == 0
    assert len(segment_files(path)) == 1
    assert read_ids(path, "a") == writer.ids["a"]


class Moving(Disk):
    """Runs something once, just before a segment is opened for reading."""

    def __init__(self) -> None:
        self.before_open: list[object] = []

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        if path.suffix == ".segment" and self.before_open:
            job = self.before_open.pop()
            assert callable(job)
            job()
        return super().open(path, write=write, create=create)


@pytest.mark.promise("compaction-changes-nothing")
def test_a_read_that_is_overtaken_by_compaction_finds_the_events_at_their_new_place(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        for _ in range(20):
            writer.write(("a", "b"), 10)
        disk = Moving()
        disk.before_open = [lambda: compact(store, Retention(), segment_bytes=SEGMENT_BYTES)]
        with StoreView(path, disk) as view:
            assert [event.id for event in view.events("a")] == writer.ids["a"]
        assert not disk.before_open


@pytest.mark.promise("dropped-is-told")
def test_a_read_that_is_overtaken_by_retention_is_told_of_the_gap(path: Path) -> None:
    with opened(path) as store:
        writer = Writer(store)
        writer.write(("a",), 10, age_h=48)
        writer.write(("a",), 10, age_h=1)
        disk = Moving()
        disk.before_open = [lambda: compact(store, Retention(max_age_s=DAY_S))]
        with StoreView(path, disk) as view, pytest.raises(GapError, match="retention"):
            view.read("a", writer.ids["a"][2], 100)


def fill_for_faults(path: Path) -> Writer:
    with opened(path) as store:
        writer = Writer(store)
        for _ in range(6):
            writer.checkpoint(writer.events("old", 20, age_h=48), writer.events("kept", 10, age_h=1))
            writer.write(("large",), 10, age_h=1)
    return writer


@pytest.mark.promise("compaction-changes-nothing")
@pytest.mark.parametrize("kind", ["create", "write", "sync", "rename", "sync_folder", "unlink"])
def test_after_a_fault_at_any_moment_everything_is_there_once_and_the_next_pass_ends_the_work(
    path: Path, kind: str, tmp_path: Path
) -> None:
    at = 0
    while True:
        at += 1
        store_path = tmp_path / f"{kind}{at}" / "events.db"
        writer = fill_for_faults(store_path)
        disk = FaultyDisk()
        with opened(store_path, disk) as store:
            disk.fail(Fault(kind, at=at, from_then_on=True))
            try:
                compact(store, Retention(max_age_s=DAY_S), segment_bytes=SEGMENT_BYTES)
                done = True
            except OSError:
                done = False
            disk.heal()
        for stream in ("kept", "large"):
            assert read_ids(store_path, stream) == writer.ids[stream]
        assert read_ids(store_path, "old") == []
        run(store_path, max_age_s=DAY_S)
        for stream in ("kept", "large"):
            assert read_ids(store_path, stream) == writer.ids[stream]
        assert ask(store_path, "SELECT count(*) FROM segments") == [(len(segment_files(store_path)),)]
        assert_index_agrees(store_path)
        if done:
            break
    assert at > 1


@pytest.mark.promise("catalogue-is-derived")
def test_an_index_that_is_lost_after_compaction_is_made_again_whole(path: Path) -> None:
    writer = fill_for_faults(path)
    run(path, max_age_s=DAY_S)
    path.unlink()
    with opened(path):
        pass
    for stream in ("kept", "large"):
        assert read_ids(path, stream) == writer.ids[stream]
