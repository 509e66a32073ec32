"""The engine as its users see it: one process, real files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import json
import logging
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from logstore.errors import StoreClosedError, UnknownEventError
from logstore.storage import Log, LogOptions
from logstore.storage.catalogue import Catalogue
from logstore.storage.files import Disk
from tests.engine import deadline, eventually, in_segments, payloads, read_all, read_to_gap, small
from tests.ops.stores import opened

MODES = ("always", "interval", "os")
STREAMS = tuple(f"stream {number}" for number in range(5))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "events.db"


async def fill(log: Log, count: int, first: int = 0) -> dict[str, list[bytes]]:
    """Append events to all streams, from many tasks; return what is in which."""
    stored: dict[str, list[bytes]] = {stream: [] for stream in STREAMS}

    async def write(stream: str) -> None:
        for number in range(first, first + count):
            payload = f"{stream} {number} ".encode().ljust(400, b".")
            await log.append(stream, payload)
            stored[stream].append(payload)

    async with deadline(), asyncio.TaskGroup() as tasks:
        for stream in STREAMS:
            tasks.create_task(write(stream))
    return stored


async def answers(log: Log) -> tuple[Any, ...]:
    """Return everything that a log answers about its streams."""
    events = {stream: await read_all(log, stream) for stream in STREAMS}
    owners = {event.event_id: await log.stream_of(event.event_id) for each in events.values() for event in each[::7]}
    return events, owners, sorted(log.stream_summaries())


# Storing.


@pytest.mark.promise("order")
@pytest.mark.parametrize("durability", MODES)
async def test_what_was_appended_is_read_back_now_and_after_reopening(path: Path, durability: Any) -> None:
    async with Log(path, small(durability=durability)) as log:
        stored = await fill(log, 300)
        before = await answers(log)
        for stream in STREAMS:
            assert await payloads(log, stream) == stored[stream]
    async with Log(path) as log:
        assert await answers(log) == before
        await fill(log, 10, 300)
        for stream in STREAMS:
            assert (await payloads(log, stream))[:300] == stored[stream]


@pytest.mark.promise("catalogue-is-derived")
async def test_a_catalogue_put_back_from_earlier_learns_what_it_does_not_know(path: Path) -> None:
    async with Log(path, small()) as log:
        await fill(log, 50)
    shutil.copy(path, path.with_name("earlier"))
    async with Log(path, small()) as log:
        await fill(log, 50, 50)
        before = await answers(log)
    shutil.copy(path.with_name("earlier"), path)
    async with Log(path) as log:
        assert await answers(log) == before


class RefusingDisk(Disk):
    """A disk that takes no more bytes into journals while told so; everything else works, checkpoints too."""

    def __init__(self) -> None:
        self.refuses = False
        self._journals: set[int] = set()

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self._journals.discard(fd)
        if ".journal" in path.name:
            self._journals.add(fd)
        return fd

    def write(self, fd: int, data: bytes, offset: int) -> None:
        if self.refuses and fd in self._journals:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(fd, data, offset)


@pytest.mark.promise("durable-stays")
async def test_a_journal_that_is_given_up_stays_until_its_events_are_in_another(path: Path) -> None:
    disk = RefusingDisk()
    # Nothing is synced by time: all that the process has acknowledged is in the operating system's hands.
    options = small(durability="interval", sync_interval_s=1000.0, checkpoint_interval_s=1000.0)
    log = Log(path, options, disk)
    for number in range(20):
        await log.append("stream", b"%d" % number)
    journals = set(path.parent.glob("events-log/lanes/*/*.journal"))
    assert journals
    disk.refuses = True
    await log.append("stream", b"volatile")
    assert log.health().status == "degraded"
    assert log._parts is not None
    # Whatever the checkpoint would do with the file, it has done now.
    await log._parts.checkpointer.run(lambda: None)
    # A copy is what a kill at this moment would leave.
    shutil.copytree(path.parent, path.parent.with_name("killed"))
    assert set(path.parent.glob("events-log/lanes/*/*.journal")) >= journals
    disk.refuses = False
    await log.close()
    async with Log(path.parent.with_name("killed") / "events.db") as after:
        assert (await payloads(after, "stream"))[:20] == [b"%d" % number for number in range(20)]


@pytest.mark.promise("largest-event")
@pytest.mark.parametrize("durability", MODES)
async def test_large_events_come_back_whole(path: Path, durability: Any) -> None:
    sizes = (1 << 20, 10 << 20, 3, 1 << 20)
    async with Log(path, LogOptions(durability=durability)) as log, deadline():
        for size in sizes:
            await log.append("large", bytes([size % 251]) * size)
        assert [len(payload) for payload in await payloads(log, "large")] == list(sizes)
    async with Log(path) as log:
        found = await payloads(log, "large")
        assert found == [bytes([size % 251]) * size for size in sizes]


async def test_a_hundred_thousand_events_of_one_stream_are_read_in_pages(path: Path) -> None:
    count = 100_000
    async with Log(path, LogOptions(durability="os", journal_file_bytes=1 << 20, checkpoint_interval_s=0.05)) as log:
        for first in range(0, count, 1000):
            await log.append_many([("one", b"%d" % number, 0) for number in range(first, first + 1000)])
        expected = [b"%d" % number for number in range(count)]
        assert await payloads(log, "one", 777) == expected
        await in_segments(log)
        assert await payloads(log, "one", 5000) == expected
        events = await read_all(log, "one")
        for place in (0, 1, 49_999, 99_998):
            found = await log.read("one", events[place].event_id, 3)
            assert found == events[place + 1 : place + 4]
        assert await log.read("one", events[-1].event_id) == []


@pytest.mark.promise("all-or-none")
async def test_events_of_one_call_are_stored_together_or_not_at_all(path: Path) -> None:
    async with Log(path, small()) as log:
        with pytest.raises(ValueError, match="has 1 to 512 bytes"):
            await log.append_many([("good", b"1", 0), ("", b"2", 0)])
        assert await read_all(log, "good") == []
        ids = await log.append_many([("good", b"1", 0), ("other", b"2", 0), ("good", b"3", 0)])
        assert [event.event_id for event in await read_all(log, "good")] == [ids[0], ids[2]]
        assert ids == sorted(ids, key=int)


@pytest.mark.promise("unknown-id-is-none")
async def test_only_ids_of_the_store_are_known(path: Path) -> None:
    async with Log(path, small()) as log:
        event_id = await log.append("one", b"1")
        assert await log.stream_of(event_id) == "one"
        await in_segments(log)
        assert await log.stream_of(event_id) == "one"
        assert await log.stream_of(str(int(event_id) + 1)) is None
        for text in ("", "x", "-1", "0", "01", "1.5", "١", "9" * 30, f" {event_id}", f"{event_id}\n", "\ud800"):
            assert await log.stream_of(text) is None
            with pytest.raises(UnknownEventError):
                await log.read("one", text)


# The catalogue is derived.


def remove_catalogue(path: Path, *, with_wal: bool = True) -> None:
    for suffix in ("", "-wal", "-shm") if with_wal else ("",):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@pytest.mark.promise("catalogue-is-derived")
async def test_a_store_without_its_catalogue_gives_the_same_answers(path: Path) -> None:
    async with Log(path, small()) as log:
        await fill(log, 300)
        before = await answers(log)
    remove_catalogue(path)
    async with Log(path) as log:
        assert await answers(log) == before


@pytest.mark.promise("catalogue-lost-while-open")
@pytest.mark.parametrize("with_wal", [True, False])
async def test_a_catalogue_deleted_under_an_open_store_is_made_again(path: Path, with_wal: bool) -> None:
    async with Log(path, small()) as log:
        stored = await fill(log, 100)
        await in_segments(log)
        remove_catalogue(path, with_wal=with_wal)
        more = await fill(log, 100, 100)
        for stream in STREAMS:
            assert await payloads(log, stream) == stored[stream] + more[stream]
        await eventually(path.exists)
        await in_segments(log)
        before = await answers(log)
        assert Counter(summary.events for summary in log.stream_summaries()) == {200: len(STREAMS)}
    async with Log(path) as log:
        assert await answers(log) == before


@pytest.mark.promise("catalogue-lost-while-open")
async def test_readers_miss_nothing_while_the_catalogue_is_made_again(path: Path) -> None:
    async with Log(path, small()) as log, Log(path, small()) as other:
        stored = await fill(log, 200)
        await in_segments(log)
        stop = False

        async def keep_reading(reader: Log) -> None:
            while not stop:
                for stream in STREAMS:
                    assert (await payloads(reader, stream))[:200] == stored[stream]

        async with deadline(), asyncio.TaskGroup() as tasks:
            for reader in (log, other):
                tasks.create_task(keep_reading(reader))
            for turn in range(3):
                # Not the WAL: by the time it is removed it may be the next one's. And not the next one before everybody
                # has taken it up: SQLite opens a WAL later than its database, by name.
                remove_catalogue(path, with_wal=False)
                await fill(log, 20, 200 + 20 * turn)
                await eventually(lambda: not any(each._opened().store.catalogue.replaced for each in (log, other)))
            stop = True
        await in_segments(log)
        assert await answers(log) == await answers(other)


@pytest.mark.promise("catalogue-lost-while-open")
async def test_another_store_that_closes_leaves_the_new_catalogue_alone(path: Path) -> None:
    """SQLite removes the write-ahead log of the last connection by name, whichever file has that name by now."""
    async with Log(path, small()) as log:
        async with Log(path, small()) as other:
            await fill(log, 50)
            # A stream has one live writer.
            await other.append("other", b"1")
            await in_segments(log)
            await in_segments(other)
            remove_catalogue(path)
            await fill(log, 50, 100)
            await eventually(path.exists)
            await in_segments(log)
            wal = path.with_name(f"{path.name}-wal")
            await eventually(wal.exists)
            node = wal.stat().st_ino
        assert wal.stat().st_ino == node
        await fill(log, 50, 150)
        before = await answers(log)
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("pragma integrity_check").fetchall() == [("ok",)]
    async with Log(path) as log:
        assert await answers(log) == before


def garbage_in_the_middle(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    for place in range(4096, len(data), 4096):
        data[place : place + 2000] = b"\xa5" * 2000
    path.write_bytes(data)
    return path.read_bytes()


def truncated(path: Path) -> bytes:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 + 100])
    return path.read_bytes()


def emptied(path: Path) -> bytes:
    path.write_bytes(b"")
    return b""


def text(path: Path) -> bytes:
    path.write_text("this is not a database\n" * 1000)
    return path.read_bytes()


@pytest.mark.promise("catalogue-is-derived")
@pytest.mark.parametrize("damage", [garbage_in_the_middle, truncated, emptied, text])
async def test_a_damaged_catalogue_is_set_aside_and_made_again(path: Path, damage: Callable[[Path], bytes]) -> None:
    async with Log(path, small()) as log:
        await fill(log, 200)
        before = await answers(log)
    damaged = damage(path)
    async with Log(path, small()) as log:
        assert await answers(log) == before
        await fill(log, 10, 200)
    if damaged:
        assert damaged in [kept.read_bytes() for kept in path.parent.glob("events.db.damaged-*")]


@pytest.mark.promise("catalogue-lost-while-open")
async def test_a_catalogue_damaged_under_an_open_store_mends(path: Path) -> None:
    async with Log(path, small()) as log:
        stored = await fill(log, 200)
        await in_segments(log)
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("pragma wal_checkpoint(truncate)")
        garbage_in_the_middle(path)
        more = await fill(log, 200, 200)

        await eventually(lambda: list(path.parent.glob("events.db.damaged-*")))
        await eventually(lambda: log._tail.unsegmented_bytes == 0)
        for stream in STREAMS:
            assert await payloads(log, stream) == stored[stream] + more[stream]
        assert log.health().status == "ok"
        before = await answers(log)
    async with Log(path) as log:
        assert await answers(log) == before


def inode(path: Path) -> int:
    return path.stat().st_ino


def schema_not_given() -> sqlite3.DatabaseError:
    """Return what SQLite says when the disk does not give it the schema."""
    error = sqlite3.DatabaseError("database disk image is malformed")
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


async def test_an_index_that_could_not_be_read_for_a_moment_stays(path: Path) -> None:
    async with Log(path, small()) as log:
        await fill(log, 20)
    before = inode(path)
    with opened(path) as store:
        for _ in range(2):
            with pytest.raises(sqlite3.DatabaseError), store.checkpoint_lock(), store.catalogue.transaction():
                raise schema_not_given()
            assert inode(path) == before
            store.adopt_dead_lanes()
            assert not store.catalogue.suspect
        # Whoever looks finds nothing; but twice is too often.
        assert inode(path) != before


async def test_an_opening_that_could_not_read_the_index_for_a_moment_leaves_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Log(path, small()) as log:
        await fill(log, 20)
    before = inode(path)
    last_id = Catalogue.last_id
    refused: list[Catalogue] = []

    def refuse_once(self: Catalogue) -> int:
        if not refused:
            refused.append(self)
            raise schema_not_given()
        return last_id(self)

    monkeypatch.setattr(Catalogue, "last_id", refuse_once)
    async with Log(path, small()) as log:
        await fill(log, 1, 20)
    assert refused
    assert inode(path) == before


@pytest.mark.promise("catalogue-is-derived")
async def test_an_index_half_made_by_a_process_that_died_is_made_again(path: Path) -> None:
    async with Log(path, small()) as log:
        await fill(log, 300)
        before = await answers(log)
    remove_catalogue(path)
    script = """
import os, sys
from logstore.storage import recovery
from logstore.storage.files import Disk
from logstore.storage.opening import OpenStore
from pathlib import Path

class Dying(Disk):
    reads = 0
    def forget_cache(self, fd):
        self.reads += 1
        if self.reads == 3:
            os._exit(9)
        super().forget_cache(fd)

OpenStore(Dying(), Path(sys.argv[1]), 1 << 20)
"""
    command = [sys.executable, "-c", script, str(path)]
    assert (await asyncio.to_thread(subprocess.run, command, check=False)).returncode == 9
    async with Log(path) as log:
        assert await answers(log) == before


@pytest.mark.promise("order")
async def test_events_that_a_checkpoint_did_not_index_are_not_counted_twice(path: Path) -> None:
    """As a crash between the segment's sync and the catalogue's commit leaves them."""
    async with Log(path, small()) as log:
        await fill(log, 100)
        before = await answers(log)
    segments = path.parent / "events-log" / "segments"
    for segment in list(segments.iterdir()):
        shutil.copy(segment, segments / f"{int(segment.stem) + 1}.segment")
    remove_catalogue(path)
    async with Log(path) as log:
        assert await answers(log) == before


@pytest.mark.promise("open-to-other-tools")
async def test_the_sqlite_utils_command_shows_a_live_store(path: Path) -> None:
    async with Log(path, small()) as log:
        await fill(log, 100)
        await in_segments(log)
        event_id = (await read_all(log, STREAMS[0]))[7].event_id

        async def shell(*arguments: str) -> str:
            command = [sys.executable, "-m", "sqlite_utils", *arguments]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout

        database = str(path)
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(fill(log, 100, 100))
            tables = {row["table"]: row["count"] for row in json.loads(await shell("tables", database, "--counts"))}
            schema = await shell("schema", database)
            (row,) = json.loads(await shell("rows", database, "events", "--where", f"event_id = {event_id}"))
            join = """
                select streams.name, count(*) as events, count(distinct segments.file) as files
                from events join streams using (stream_id) join segments using (segment_id)
                where event_id <= (select max(event_id) from events) group by streams.name
            """
            joined = json.loads(await shell("query", database, join))
            summary = json.loads(await shell("query", database, "select * from stream_summary"))
            await writing
        assert tables["events"] >= 500
        assert tables["streams"] == len(STREAMS)
        assert "CREATE TABLE [events]" in schema or 'CREATE TABLE "events"' in schema
        assert row["event_id"] == int(event_id)
        assert {each["name"] for each in joined} == set(STREAMS) == {each["name"] for each in summary}
        assert all(each["events"] >= 100 for each in joined)
        # Looking left nothing behind that stands in the way.
        await in_segments(log)
        assert log.health().status == "ok"


# Bounds.


@pytest.mark.promise("back-pressure")
async def test_appends_wait_while_the_journal_is_full(path: Path) -> None:
    """Whoever holds the checkpoint lock, an other process say, holds the checkpoints up."""
    options = small(journal_bytes=128 << 10)
    async with Log(path, options) as log:
        await log.append("one", b"first")
        lock = Disk().lock(path.parent / "events-log" / "checkpoint.lock", wait=True)
        assert lock is not None
        done: list[int] = []

        async def write() -> None:
            for number in range(600):
                await log.append("one", b"%d" % number + b"." * 1000)
                done.append(number)

        async with deadline(), asyncio.TaskGroup() as tasks:
            tasks.create_task(write())
            await eventually(lambda: log.stats().unsegmented_bytes > 128 << 10)
            held = len(done)
            for _ in range(50):
                await asyncio.sleep(0.002)
            assert len(done) <= held + 1
            assert len(done) < 200
            assert log.health().status == "ok"
            lock.release()
        assert len(await payloads(log, "one")) == 601


@pytest.mark.promise("memory-bounded")
@pytest.mark.parametrize("durability", MODES)
async def test_memory_stays_within_its_budget(path: Path, durability: Any) -> None:
    options = small(durability=durability, cached_events_per_stream=1000, memory_bytes=1 << 20)
    async with Log(path, options) as log:
        most = 0

        async def write(writer: int) -> None:
            nonlocal most
            for number in range(120):
                await log.append(f"{writer} {number % 40}", b"." * 1000)
                if number % 5 == 0:
                    most = max(most, log.stats().memory_bytes)

        async with deadline(), asyncio.TaskGroup() as tasks:
            for writer in range(20):
                tasks.create_task(write(writer))
        await in_segments(log)
        # While journals wait, one batch may go past the bound; a commit takes what queued meanwhile.
        assert most <= options.memory_bytes * 1.25
        assert log.stats().memory_bytes <= options.memory_bytes
        assert sum([len(await read_all(log, f"{writer} {n}")) for writer in range(20) for n in range(40)]) == 2400


@pytest.mark.promise("memory-bounded")
async def test_nothing_grows_with_the_number_of_checkpoints(path: Path) -> None:
    async with Log(path, small(durability="os")) as log:
        for number in range(40):
            await log.append("one", b"%d" % number)
            await in_segments(log)
        assert len(log._tail._cached) <= 2


# One store, several loops; closing; cancelling.


@pytest.mark.promise("close-keeps-all", "two-loops-refused")
def test_one_store_serves_one_loop_after_another(path: Path) -> None:
    """Each loop writes more than the journal may hold: checkpoints must go on in the second one."""
    log = Log(path, small(journal_bytes=128 << 10))

    async def write(first: int) -> None:
        async with deadline():
            for number in range(first, first + 400):
                await log.append("one", b"%d" % number + b"." * 1000)

    async def interrupted() -> None:
        await write(0)
        # The loop ends while commits, checkpoints and timers are under way.
        tasks = [asyncio.create_task(log.append("other", b".")) for _ in range(5)]
        await asyncio.sleep(0)
        assert tasks

    asyncio.run(interrupted())
    asyncio.run(write(400))

    async def finish() -> list[bytes]:
        async with deadline():
            found = await payloads(log, "one")
            await log.close()
        return found

    found = asyncio.run(finish())
    assert [int(payload.rstrip(b".")) for payload in found] == list(range(800))
    with pytest.raises(StoreClosedError):
        asyncio.run(log.append("one", b""))


@pytest.mark.promise("two-loops-refused")
def test_two_loops_at_once_are_refused(path: Path) -> None:
    log = Log(path, small())

    async def outer() -> None:
        async with log:
            await log.append("one", b"1")

            def other_loop() -> None:
                with pytest.raises(StoreClosedError, match="two event loops"):
                    asyncio.run(log.append("one", b"2"))

            await asyncio.to_thread(other_loop)
            await log.append("one", b"3")
            assert await payloads(log, "one") == [b"1", b"3"]

    asyncio.run(outer())


@pytest.mark.promise("cancelled-append")
@pytest.mark.parametrize("durability", MODES)
async def test_a_cancelled_append_is_stored_and_harms_nobody(path: Path, durability: Any) -> None:
    async with Log(path, small(durability=durability)) as log, deadline():
        await log.append("one", b"first")
        for turn in range(30):
            tasks = [asyncio.create_task(log.append(f"{n % 3}", f"{turn} {n}".encode())) for n in range(12)]
            for _ in range(turn % 4):
                await asyncio.sleep(0)
            for task in tasks[::3]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for n, result in enumerate(results):
                if not isinstance(result, BaseException):
                    found = [event.payload for event in await read_all(log, f"{n % 3}") if event.event_id == result]
                    assert found == [f"{turn} {n}".encode()]
                else:
                    assert isinstance(result, asyncio.CancelledError)
                    assert n % 3 == 0
        before = [await read_all(log, f"{n}") for n in range(3)]
    async with Log(path) as log:
        assert [await read_all(log, f"{n}") for n in range(3)] == before


def has_appended(log: Log, count: int) -> bool:
    return log.stats().appended > count


def lane_is_free(path: Path) -> bool:
    lock = Disk().lock(path.parent / "events-log" / "lanes" / "0000" / "lock")
    if lock is not None:
        lock.release()
    return lock is not None


@pytest.mark.promise("close-keeps-all")
@pytest.mark.parametrize("durability", MODES)
async def test_appends_meanwhile_are_stored_or_told_that_the_store_closes(path: Path, durability: Any) -> None:
    for turn in range(10):
        log = Log(path, small(durability=durability))
        stored: list[str] = []

        async def write(writer: int, log: Log = log, stored: list[str] = stored) -> None:
            with contextlib.suppress(StoreClosedError):
                for number in itertools.count():
                    stored.append(await log.append(f"{writer}", f"{number}".encode() + b"." * 3000))
                    if durability != "always":
                        await asyncio.sleep(0)

        async with deadline(), asyncio.TaskGroup() as tasks:
            await log.open()
            for writer in range(8):
                tasks.create_task(write(writer))
            await eventually(functools.partial(has_appended, log, 5 * turn))
            await log.close()
        async with Log(path) as log:
            found = {event.event_id for writer in range(8) for event in await read_all(log, f"{writer}")}
        assert set(stored) <= found


@pytest.mark.promise("close-keeps-all")
async def test_closing_twice_at_once_waits_for_the_end(path: Path) -> None:
    log = Log(path, small())
    await fill(log, 20)
    both = [asyncio.create_task(log.close()) for _ in range(2)]
    done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    assert done
    assert lane_is_free(path), "close returned before the lane was given back"
    await asyncio.gather(*both)


@pytest.mark.promise("close-keeps-all")
async def test_a_close_that_was_cancelled_still_ends(path: Path) -> None:
    for turns in range(12):
        log = Log(path, small())
        await fill(log, 5, turns)
        closing = asyncio.create_task(log.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await closing
        async with deadline():
            await log.close()
        assert lane_is_free(path), "the lane was not given back"
    async with Log(path) as log:
        assert [len(await read_all(log, stream)) for stream in STREAMS] == [60] * len(STREAMS)


@pytest.mark.promise("failed-opening-undone")
async def test_an_open_that_was_cancelled_leaves_nothing_locked(path: Path) -> None:
    log = Log(path, small())
    opening = asyncio.create_task(log.open())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    opening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await opening
    async with deadline():
        await log.append("one", b"1")
        await log.close()
    assert lane_is_free(path), "the cancelled opening still holds its lane"


# Reading along.


@pytest.mark.promise("followers-miss-nothing")
async def test_followers_of_a_foreign_stream_are_woken_whatever_else_is_read(path: Path) -> None:
    async with Log(path, small(checkpoint_interval_s=3600)) as writer, Log(path, small()) as reader:
        await writer.append("followed", b"0")
        followed: list[bytes] = []

        async def follow() -> None:
            async for event in reader.follow("followed"):
                followed.append(event.payload)

        stop = False

        async def read_other_streams() -> None:
            while not stop:
                await reader.read("other")

        async with deadline(), asyncio.TaskGroup() as tasks:
            following = tasks.create_task(follow())
            tasks.create_task(read_other_streams())
            for number in range(1, 30):
                await eventually(functools.partial(lambda number: len(followed) == number, number))
                await writer.append("followed", b"%d" % number)
            await eventually(lambda: len(followed) == 30)
            stop = True
            following.cancel()
        assert followed == [b"%d" % number for number in range(30)]


async def test_a_follower_ends_with_the_log_wherever_it_is(path: Path) -> None:
    log = Log(path, small())
    await fill(log, 200)

    async def follow(page: int) -> int:
        seen = 0
        async for _ in log.follow(STREAMS[0]):
            seen += 1
            if seen % page == 0:
                await asyncio.sleep(0)
        return seen

    async with deadline(), asyncio.TaskGroup() as tasks:
        following = [tasks.create_task(follow(page)) for page in (1, 3, 50, 1000)]
        for _ in range(20):
            await asyncio.sleep(0)
        await log.close()
    assert all(task.result() >= 0 for task in following)


@pytest.mark.promise("statistics-exact")
async def test_summaries_count_everything_while_a_checkpoint_commits(path: Path) -> None:
    """The catalogue may have a journal's events before the loop has heard of it."""
    async with Log(path, small(checkpoint_interval_s=3600)) as log, deadline():
        for number in range(300):
            await log.append("one", b"%d" % number + b"." * 700)
            # No await here: what the checkpoint's thread reports is not heard yet.
            (summary,) = log.stream_summaries()
            assert summary.events == number + 1


# Holes.


@pytest.mark.promise("no-hole-passed-over")
async def test_a_reader_is_told_when_a_segment_is_gone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "logstore")
    async with Log(path, small()) as log:
        for number in range(900):
            await log.append("one", b"%d" % number + b"." * 700)
    segments = sorted((path.parent / "events-log" / "segments").iterdir())
    assert len(segments) > 4
    segments[len(segments) // 2].unlink()
    async with Log(path) as log:
        before, gap = await read_to_gap(log, "one")
    assert [int(payload.rstrip(b".")) for payload in before] == list(range(len(before)))
    assert 0 < len(before) < 900
    assert gap is not None


@pytest.mark.promise("no-hole-passed-over")
async def test_the_chain_of_events_shows_a_hole_in_the_index(path: Path) -> None:
    async with Log(path, small()) as log:
        for number in range(900):
            await log.append("one", b"%d" % number + b"." * 700)
    with contextlib.closing(sqlite3.connect(path)) as other:
        (middle,) = other.execute("select last_id from extents order by last_id limit 1 offset 3").fetchone()
        other.execute("delete from extents where last_id = ?", (middle,))
        other.commit()
    async with Log(path) as log:
        before, gap = await read_to_gap(log, "one")
    assert [int(payload.rstrip(b".")) for payload in before] == list(range(len(before)))
    assert gap is not None
    assert "gone" in str(gap)


@pytest.fixture(autouse=True)
def _no_unheard_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What the event loop reports as an exception nobody caught is a bug."""
    yield
    unheard = [record for record in caplog.get_records("call") if record.name == "asyncio"]
    assert not unheard, [record.getMessage() for record in unheard]
