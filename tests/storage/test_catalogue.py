"""The catalogue is exact, pleasant to look at with other tools, and never another program's database."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlite_utils import Database

from logstore.errors import FormatVersionError, NotAStoreError
from logstore.storage.catalogue import Catalogue, EventRow, Extent, SegmentRow, StreamRuns
from logstore.storage.database import connect, inspect_file, is_damage
from logstore.storage.files import Disk
from logstore.storage.schema import APPLICATION_ID, SCHEMA_VERSION

NOW_US = 1_790_000_000_000_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


def new_catalogue(path: Path) -> Catalogue:
    disk = Disk()
    disk.close(disk.create(path))
    catalogue = Catalogue(path)
    catalogue.open()
    return catalogue


@pytest.fixture
def catalogue(path: Path) -> Iterator[Catalogue]:
    catalogue = new_catalogue(path)
    yield catalogue
    catalogue.close()


def segment(number: int, stream_id: int | None = None, sha256: str | None = None) -> SegmentRow:
    sealed = sha256 is not None
    return SegmentRow(number, stream_id, f"segments/{number}.segment", 1000, 10, 1, 99, sealed, sha256)


def extent(stream_id: int, first_id: int, last_id: int, segment_id: int = 1) -> Extent:
    return Extent(
        stream_id=stream_id,
        first_id=first_id,
        last_id=last_id,
        segment_id=segment_id,
        offset=100,
        length=50,
        events=3,
        first_time_us=NOW_US,
        last_time_us=NOW_US + 5_000_000,
        last_flags=0,
    )


def fill(catalogue: Catalogue) -> dict[str, int]:
    """Two streams in a pack and one in a file of its own."""
    with catalogue.transaction():
        streams = catalogue.add_streams(["a", "b", "c"])
        catalogue.put_segments([segment(1), segment(2, streams["c"], sha256="0" * 64)])
        catalogue.add_events((10 + each, streams["a"], 1, 68 + 20 * each, 20) for each in range(3))
        catalogue.add_events((20 + each, streams["b"], 1, 128 + 20 * each, 20) for each in range(3))
        catalogue.add_events((30 + each, streams["c"], 2, 68 + 20 * each, 20) for each in range(3))
        catalogue.add_extents(
            [
                extent(streams["a"], 10, 12),
                extent(streams["b"], 20, 22),
                extent(streams["c"], 30, 32, segment_id=2),
            ]
        )
    return streams


def everything_below(folder: Path) -> dict[str, str]:
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in folder.iterdir()}


# To look at.


def test_the_tables_are_named_plainly_and_joined_by_foreign_keys(catalogue: Catalogue, path: Path) -> None:
    fill(catalogue)
    with closing(sqlite3.connect(path)) as connection:
        database = Database(connection)
        tables = {name for name in database.table_names() if not name.startswith(("sqlite_", "_sqlite_"))}
        assert tables == {
            "streams",
            "segments",
            "events",
            "extents",
            "journals",
            "sessions",
            "damage",
            "maintenance",
            "imports",
        }
        assert set(database.view_names()) == {"store_summary", "stream_summary", "segment_health", "session_summary"}
        assert database.table("events").columns_dict == dict.fromkeys(
            ("event_id", "stream_id", "segment_id", "offset", "length"), int
        )
        for table in ("events", "extents"):
            keys = {(key.column, key.other_table, key.other_column) for key in database.table(table).foreign_keys}
            assert keys == {("stream_id", "streams", "stream_id"), ("segment_id", "segments", "segment_id")}
        assert [key.other_table for key in database.table("segments").foreign_keys] == ["streams"]
        assert database.table("events").pks == ["event_id"]
        rows = database.query(
            "select name, file, count(*) as events from events join streams using (stream_id)"
            " join segments using (segment_id) group by name order by name"
        )
        assert [tuple(row.values()) for row in rows] == [
            ("a", "segments/1.segment", 3),
            ("b", "segments/1.segment", 3),
            ("c", "segments/2.segment", 3),
        ]
        assert list(database.query("pragma foreign_key_check")) == []


def test_the_views_say_what_a_name_does_not(catalogue: Catalogue, path: Path) -> None:
    fill(catalogue)
    with closing(sqlite3.connect(path)) as connection:
        database = Database(connection)
        summary = next(iter(database.query("select * from stream_summary where name = 'b'")))
        assert (summary["events"], summary["bytes"]) == (3, 50)
        assert (summary["first_id"], summary["last_id"]) == (20, 22)
        assert (summary["first_event"], summary["last_event"]) == ("2026-09-21 14:13:20", "2026-09-21 14:13:25")
        health = [(row["stream"], row["live_bytes"]) for row in database.query("select * from segment_health")]
        assert health == [("(pack)", 100), ("c", 50)]


@pytest.mark.promise("files-are-private")
def test_the_file_is_marked_as_ours_and_private(path: Path) -> None:
    umask = os.umask(0o022)
    try:
        catalogue = new_catalogue(path)
        fill(catalogue)
        modes = {each.name: each.stat().st_mode & 0o777 for each in path.parent.iterdir()}
        catalogue.close()
    finally:
        os.umask(umask)
    assert modes == dict.fromkeys(("events.db", "events.db-wal", "events.db-shm"), 0o600)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_commit_is_on_disk_and_no_connection_checkpoints_on_its_own(catalogue: Catalogue) -> None:
    assert catalogue._write.execute("PRAGMA synchronous").fetchone() == (2,)
    for write in (True, False):
        with closing(connect(catalogue.path, write=write)) as connection:
            assert connection.execute("PRAGMA wal_autocheckpoint").fetchone() == (0,)


# Reading and writing.


def test_events_streams_and_totals_are_found(catalogue: Catalogue) -> None:
    assert (catalogue.last_id(), catalogue.totals(), catalogue.summaries()) == (0, (0, 0, 0), [])
    streams = fill(catalogue)
    assert catalogue.last_id() == 32
    assert [catalogue.stream_of(each) for each in (10, 22, 31, 9, 13)] == ["a", "b", "c", None, None]
    assert catalogue.event(21) == EventRow(21, streams["b"], 1, 148, 20)
    assert catalogue.event(23) is None
    assert catalogue.totals() == (3, 9, 2000)
    assert catalogue.segment_sizes() == {1: 1000, 2: 1000}
    assert [(each.stream, each.events, each.first_id, each.last_id) for each in catalogue.summaries()] == [
        ("a", 3, "10", "12"),
        ("b", 3, "20", "22"),
        ("c", 3, "30", "32"),
    ]


def test_everything_is_there_after_reopening(catalogue: Catalogue, path: Path) -> None:
    fill(catalogue)
    known = catalogue.summaries(), catalogue.totals(), catalogue.segment_sizes()
    catalogue.close()
    assert inspect_file(path) == "ours"
    catalogue.open()
    assert (catalogue.summaries(), catalogue.totals(), catalogue.segment_sizes()) == known
    with catalogue.transaction():
        assert catalogue.add_streams(["c", "d", "a"]) == {"a": 1, "c": 3, "d": 4}


def test_rows_in_any_number_are_added_once(catalogue: Catalogue) -> None:
    names = [f"stream-{number}" for number in range(1_003)]
    streams: dict[str, int] = {}
    for _ in range(2):
        with catalogue.transaction():
            streams = catalogue.add_streams(names)
            catalogue.put_segments([segment(1)])
            catalogue.add_events((number + 1, streams[name], 1, 0, 1) for number, name in enumerate(names))
            catalogue.add_extents(extent(streams[name], number, number) for number, name in enumerate(names, 1))
    assert catalogue.totals()[:2] == (1_003, 3 * 1_003)
    assert len(set(streams.values())) == 1_003
    assert catalogue.indexed(range(1_000, 1_010)) == dict.fromkeys(range(1_000, 1_004), 1)


def test_a_transaction_that_fails_leaves_nothing(catalogue: Catalogue) -> None:
    fill(catalogue)

    def fail() -> None:
        with catalogue.transaction():
            catalogue.add_streams(["d"])
            catalogue.add_events([(99, 1, 1, 0, 1)])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (catalogue.last_id(), catalogue.totals()[0]) == (32, 3)
    with catalogue.transaction():
        catalogue.add_streams(["d"])
    assert catalogue.totals()[0] == 4


def test_readers_see_what_is_committed_and_nothing_else(catalogue: Catalogue) -> None:
    with catalogue.transaction():
        catalogue.add_streams(["a"])
        assert catalogue.totals()[0] == 0
    assert catalogue.totals()[0] == 1


def test_a_segment_grows_and_is_sealed(catalogue: Catalogue, path: Path) -> None:
    with catalogue.transaction():
        catalogue.put_segments([segment(1)._replace(bytes=10, events=1, first_id=50, last_id=60)])
    with catalogue.transaction():
        catalogue.put_segments([segment(1)._replace(bytes=30, events=4, first_id=40, last_id=55)])
    with catalogue.transaction():
        catalogue.seal_segments([(1, "ab")])
    with closing(sqlite3.connect(path)) as connection:
        row = connection.execute("select bytes, events, first_id, last_id, sealed, sha256 from segments").fetchone()
    assert row == (30, 4, 40, 60, 1, "ab")


def test_journals_are_noted_and_forgotten_by_lane(catalogue: Catalogue) -> None:
    with catalogue.transaction():
        catalogue.add_journals([(1, 5), (1, 6), (2, 5), (1, 5)])
    assert (catalogue.checkpointed_journals(1), catalogue.checkpointed_journals(2)) == ({5, 6}, {5})
    with catalogue.transaction():
        catalogue.forget_journals([(1, 5), (3, 1)])
    assert (catalogue.checkpointed_journals(1), catalogue.checkpointed_journals(2)) == ({6}, {5})


def test_sessions_and_damage_are_shown(catalogue: Catalogue, path: Path) -> None:
    with catalogue.transaction():
        catalogue.put_sessions([("hash", 1, NOW_US, None, "a/")])
        catalogue.put_sessions([("hash", 2, NOW_US, NOW_US + 1_000_000, "a/")])
        catalogue.add_damage("lanes/0000/1.journal", 4096, 100, None, "why", "damaged/x")
        catalogue.add_damage("lanes/0000/1.journal", 4096, 100, 7, "why", "damaged/x")
    with closing(sqlite3.connect(path)) as connection:
        sessions = connection.execute("select * from sessions").fetchall()
        damage = connection.execute("select file, offset, length, lost_events, reason, kept_in from damage").fetchall()
    assert sessions == [("hash", 2, "2026-09-21 14:13:20", "2026-09-21 14:13:21", "a/")]
    assert damage == [("lanes/0000/1.journal", 4096, 100, 7, "why", "damaged/x")]


# Extents.

RUNS = [(1, 10), (5, 20), (8, 9), (15, 15), (15, 30), (40, 50), (45, 46)]


@pytest.mark.parametrize("after", [0, 1, 8, 9, 10, 15, 20, 29, 30, 40, 46, 50, 51])
def test_the_runs_that_reach_beyond_an_id_come_in_order_also_when_they_overlap(
    catalogue: Catalogue, after: int
) -> None:
    with catalogue.transaction():
        streams = catalogue.add_streams(["other", "a"])
        catalogue.put_segments([segment(1)])
        catalogue.add_extents(extent(streams["a"], *run) for run in reversed(RUNS))
        catalogue.add_extents([extent(streams["other"], 1, 100)])
    expected = [run for run in RUNS if run[1] > after]
    found = [(each.first_id, each.last_id) for each in catalogue.runs("a", after, 100).extents]
    assert sorted(found) == sorted(expected)
    assert [first for first, _ in found] == sorted(first for first, _ in found)
    first_two = catalogue.runs("a", after, 2)
    assert len(first_two.extents) == min(2, len(expected))
    assert first_two.whole == (len(expected) < 2)
    assert catalogue.runs("nobody", after, 100) == StreamRuns([], 0, True)


def test_reading_a_stream_walks_an_index(catalogue: Catalogue, path: Path) -> None:
    fill(catalogue)
    with closing(sqlite3.connect(path)) as connection:
        plan = connection.execute(
            "EXPLAIN QUERY PLAN SELECT extents.* FROM extents JOIN streams USING (stream_id)"
            " WHERE streams.name = ? AND last_id > ? ORDER BY first_id LIMIT ?",
            ("a", 0, 10),
        ).fetchall()
    assert not any(row[3].startswith("SCAN") for row in plan), plan


# What else may stand at the path.


def test_nothing_and_an_empty_file_are_absent(path: Path) -> None:
    assert inspect_file(path) == "absent"
    path.touch()
    assert inspect_file(path) == "absent"
    path.unlink()
    sqlite3.connect(path).close()
    assert inspect_file(path) == "absent"


def test_a_folder_is_refused_with_what_to_give_instead(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match=r"is a folder.*events\.db"):
        inspect_file(tmp_path)


@pytest.mark.promise("foreign-file-untouched")
@pytest.mark.parametrize("mode", ["delete", "wal"])
@pytest.mark.parametrize("application", [0, 77])
def test_a_database_of_another_program_is_refused_and_untouched(path: Path, mode: str, application: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute(f"PRAGMA application_id = {application}")
        connection.execute("CREATE TABLE customers (name TEXT)")
        connection.execute("CREATE TABLE orders (name TEXT)")
        connection.commit()
    before = everything_below(path.parent)
    with pytest.raises(NotAStoreError, match=r"another program \(tables: customers, orders\); nothing was written"):
        inspect_file(path)
    assert everything_below(path.parent) == before


def test_a_database_in_use_by_another_program_is_refused_and_untouched(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("CREATE TABLE customers (name TEXT)")
        connection.commit()
        with pytest.raises(NotAStoreError, match="customers"):
            inspect_file(path)
        connection.execute("INSERT INTO customers VALUES ('still there')")
        connection.commit()
        assert connection.execute("SELECT * FROM customers").fetchall() == [("still there",)]


def test_a_catalogue_of_a_newer_release_is_refused_and_untouched(catalogue: Catalogue, path: Path) -> None:
    catalogue.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    before = everything_below(path.parent)
    with pytest.raises(FormatVersionError, match=rf"catalogue version {SCHEMA_VERSION + 1}.*upgrade mcp-logstore"):
        inspect_file(path)
    assert everything_below(path.parent) == before


@pytest.mark.parametrize("place", [0, 30, 100])
def test_a_damaged_file_is_told_apart(catalogue: Catalogue, path: Path, place: int) -> None:
    fill(catalogue)
    catalogue.close()
    data = bytearray(path.read_bytes())
    data[place : place + 60] = b"\xff" * 60
    path.write_bytes(data)
    assert inspect_file(path) == "damaged"


def test_what_is_no_database_is_damaged(path: Path) -> None:
    path.write_bytes(b"just some text, longer than the header of a database would be" * 20)
    assert inspect_file(path) == "damaged"


def test_a_lock_is_not_taken_for_damage(path: Path, catalogue: Catalogue) -> None:
    with closing(sqlite3.connect(path, timeout=0)) as other, catalogue.transaction():
        with pytest.raises(sqlite3.OperationalError) as caught:
            other.execute("BEGIN IMMEDIATE")
        assert not is_damage(caught.value)
    assert not catalogue.suspect


def test_text_is_taken_for_damage(path: Path) -> None:
    path.write_bytes(b"text" * 1000)
    with pytest.raises(sqlite3.DatabaseError) as caught:
        Catalogue(path).open()
    assert is_damage(caught.value)


# Crashes.


def commits_of(wal: bytes) -> list[int]:
    """Return where each commit in a SQLite write-ahead log ends."""
    page_bytes = int.from_bytes(wal[8:12], "big")
    ends = []
    for offset in range(32, len(wal) - 23 - page_bytes, 24 + page_bytes):
        if int.from_bytes(wal[offset + 4 : offset + 8], "big"):
            ends.append(offset + 24 + page_bytes)
    return ends


@pytest.mark.promise("crash-opens")
def test_a_crash_between_any_two_commits_of_a_new_catalogue_leaves_one_that_opens(tmp_path: Path, path: Path) -> None:
    catalogue = new_catalogue(path)
    database = path.read_bytes()
    wal = path.with_name("events.db-wal").read_bytes()
    catalogue.close()
    ends = commits_of(wal)
    assert ends
    for number, end in enumerate([32, *ends]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "events.db").write_bytes(database)
        (folder / "events.db-wal").write_bytes(wal[:end])
        assert inspect_file(folder / "events.db") in ("absent", "ours")
        again = Catalogue(folder / "events.db")
        again.open()
        fill(again)
        assert again.last_id() == 32
        again.close()


def test_a_catalogue_that_was_removed_or_replaced_is_noticed(catalogue: Catalogue, path: Path) -> None:
    seen = [catalogue.replaced]
    path.unlink()
    seen.append(catalogue.replaced)
    path.touch()
    seen.append(catalogue.replaced)
    assert seen == [False, True, True]


def test_a_long_write_ahead_log_is_moved_into_the_database(catalogue: Catalogue, path: Path) -> None:
    fill(catalogue)
    size = path.stat().st_size
    catalogue.shrink_wal()
    assert path.stat().st_size == size, "a short one is left"
    with catalogue.transaction():
        catalogue.add_events((number, 1, 1, 0, 1) for number in range(100, 400_000))
    catalogue.shrink_wal()
    assert path.stat().st_size > size


def test_a_look_sees_what_was_written_by_somebody_who_came_and_went(path: Path) -> None:
    def write(name: str) -> None:
        writer = new_catalogue(path) if not path.exists() else Catalogue(path)
        writer.open()
        with writer.transaction():
            writer.add_streams([name])
        writer.close()

    write("a")
    look = Catalogue(path)
    look.look()
    assert look.totals()[0] == 1
    write("b")
    assert not path.with_name("events.db-wal").exists()
    assert look.totals()[0] == 2
    look.close()


def test_a_schema_that_is_no_text_is_damage(path: Path) -> None:
    new_catalogue(path).close()
    data = bytearray(path.read_bytes())
    name = data.find(b"tablejournals", 100) + len(b"table")
    data[name : name + 8] = b"\x88\xff" * 4
    statement = data.find(b"CREATE TABLE", name)
    data[statement : statement + 6] = b"SHATTR"
    path.write_bytes(data)
    assert inspect_file(path) == "damaged"
    with pytest.raises(sqlite3.DatabaseError) as raised:
        Catalogue(path).look()
    assert is_damage(raised.value)
