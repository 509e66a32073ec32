"""What a store holds and how it does, seen from outside."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import msgspec
import pytest

from logstore.errors import NotAStoreError
from logstore.ops.access import open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.statistics import StoreStatistics, store_statistics
from logstore.storage import Log
from tests.engine import deadline, eventually, in_segments, process, small


def told(path: Path) -> StoreStatistics:
    return store_statistics(path)


async def published(path: Path, appended: int) -> StoreStatistics:
    """Return statistics once a living process has published that it appended so much."""

    def found() -> bool:
        return any(each.stats is not None and each.stats.appended >= appended for each in told(path).processes)

    await eventually(lambda: told(path).processes and found())
    return told(path)


def content(folder: Path) -> dict[str, tuple[int, str]]:
    # SQLite's memory that processes share is no part of what is stored.
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith("-shm"))
    return {str(file): (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.promise("work-while-open", "statistics-exact")
async def test_events_in_journals_count_and_those_that_a_checkpoint_moves_count_once(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path, small(checkpoint_interval_s=0.05)) as log, deadline():
        for number in range(300):
            await log.append(f"s{number % 7}", b"x" * 100)
            if number % 5 == 0:
                found = await asyncio.to_thread(told, path)
                assert found.total_events == number + 1
                assert found.total_streams == min(number + 1, 7)
        await in_segments(log)
        assert told(path).total_events == 300
    found = told(path)
    assert (found.total_events, found.total_streams, found.status, found.problems) == (300, 7, "ok", [])


async def test_first_and_last_event_are_those_of_the_streams(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path, small(checkpoint_interval_s=60)) as log:
        first = await log.append("a", b"x")
        last = await log.append("b", b"x")
        events = [(await log.read("a"))[0], (await log.read("b"))[0]]
        in_journals = told(path)
    at_rest = told(path)
    for found in (in_journals, at_rest):
        assert (found.first_event_id, found.last_event_id) == (first, last)
        assert found.first_time is not None
        assert found.last_time is not None
        assert found.first_time < found.last_time
        assert found.streams is not None
        assert [(each.stream, each.first_time) for each in found.streams] == [
            ("a", found.first_time),
            ("b", found.last_time),
        ]
        assert str(events[0].time_us)[-6:] == found.first_time[20:26]


async def test_sizes_add_up(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path, small(checkpoint_interval_s=60)) as log:
        await log.append("a", b"x" * 10_000)
        assert told(path).sizes.journals > 10_000
    found = told(path)
    sizes = found.sizes
    assert sizes.journals == 0
    assert sizes.segments > 10_000
    parts = sizes.catalogue + sizes.journals + sizes.segments + sizes.damaged + sizes.other
    assert sizes.database == parts == size_of(tmp_path)
    assert found.segments is not None
    assert (found.segments.files, found.segments.packs) == (1, 1)
    assert 10_000 < found.segments.live_bytes < found.segments.bytes == sizes.segments


async def test_a_process_is_there_with_its_figures_while_it_lives(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path), deadline():
        (mine,) = (await published(path, 0)).processes
        assert (mine.pid, mine.lane, mine.alive, mine.status) == (os.getpid(), 0, True, "ok")
        assert mine.age_s is not None
        assert mine.stats is not None
    assert told(path).processes == []


async def test_a_command_at_work_is_a_process_without_figures(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path):
        pass
    store = open_existing(path)
    try:
        (command,) = told(path).processes
        assert (command.alive, command.status, command.stats) == (True, "unknown", None)
    finally:
        store.close(empty=True)


HOLD = """
import asyncio, sys
from logstore.storage import Log

async def main():
    async with Log(sys.argv[1]) as log:
        await log.append("s", b"x")
        print("open", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.promise("statistics-exact")
async def test_a_killed_process_is_told_as_dead_and_its_events_count(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    with process(HOLD, path) as holder:
        await holder.line()
        await published(path, 0)
        holder.kill()
        found = told(path)
    (dead,) = found.processes
    assert (dead.pid, dead.alive) == (holder.pid, False)
    assert found.total_events == 1
    # Whoever opens the store next recovers what it left: that is no trouble of the store.
    assert found.status == "ok"


async def test_the_figures_of_an_earlier_holder_are_not_those_of_the_one_who_has_the_lane(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    with process(HOLD, path) as holder:
        await holder.line()
        await published(path, 0)
        holder.kill()
    store = open_existing(path)
    try:
        (command,) = told(path).processes
        assert (command.alive, command.stats) == (True, None)
        assert command.pid != holder.pid
    finally:
        store.close(empty=True)


def say(path: Path, **changes: object) -> None:
    """Have the process on lane 0 say something else of itself."""
    file = path.with_name("events-log") / "lanes" / "0000" / "figures.json"
    figures = msgspec.json.decode(file.read_bytes())
    file.write_bytes(msgspec.json.encode({**figures, **changes}))


@pytest.mark.promise("statistics-exact")
@pytest.mark.parametrize("status", ["degraded", "failed"])
async def test_the_store_is_as_well_as_its_processes(tmp_path: Path, status: str) -> None:
    path = tmp_path / "events.db"
    async with Log(path), deadline():
        await published(path, 0)
        say(path, status=status, reason="No space left on device", since_us=1_000_000)
        found = told(path)
        assert found.status == status
        assert found.problems == [f"process {os.getpid()} is {status}: No space left on device"]
        assert found.processes[0].since == "1970-01-01T00:00:01.000000+00:00"


@pytest.mark.promise("statistics-exact")
async def test_a_process_that_says_nothing_any_more_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path), deadline():
        await published(path, 0)
        say(path, published_us=1_000_000)
        found = told(path)
        assert found.status == "degraded"
        assert "has published no figures" in found.problems[0]


@pytest.mark.parametrize("left", [None, b"no database", b"SQLite format 3\0" + b"\xff" * 5000])
async def test_with_a_catalogue_that_cannot_be_read_the_rest_is_told(tmp_path: Path, left: bytes | None) -> None:
    path = tmp_path / "events.db"
    async with Log(path) as log:
        await log.append("s", b"x" * 1000)
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    found = told(path)
    assert (found.status, found.total_events, found.streams) == ("degraded", None, None)
    assert "logstore reindex" in found.problems[0]
    assert found.sizes.segments > 1000


async def test_backups_count_and_unusable_ones_are_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path) as log:
        await log.append("s", b"x")
    store = open_existing(path)
    try:
        create_backup(store, FolderTarget(default_backups(path)))
    finally:
        store.close(empty=True)
    found = told(path)
    assert (found.backups.count, found.backups.unusable) == (1, 0)
    assert found.backups.newest == found.backups.oldest is not None
    assert found.sizes.backups > 0
    (manifest,) = default_backups(path).glob("*.json")
    manifest.write_bytes(manifest.read_bytes()[:-10])
    found = told(path)
    assert (found.backups.count, found.backups.unusable) == (0, 1)
    assert any("cannot be restored" in problem for problem in found.problems)


async def test_sessions_count_as_open_and_ended(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path, small()) as log, deadline():
        for key in ("a", "b", "c"):
            await log.sessions.open(key, b"")
        await log.sessions.end("b")
        await log.append("s", b"x")
        await in_segments(log)
    sessions = told(path).sessions
    assert sessions is not None
    assert (sessions.open, sessions.ended) == (2, 1)


@pytest.mark.promise("look-changes-nothing")
async def test_a_look_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    with process(HOLD, path) as holder:
        await holder.line()
        await published(path, 0)
        holder.kill()
    before = content(tmp_path)
    told(path)
    assert content(tmp_path) == before


def test_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match="no store"):
        told(tmp_path / "events.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("ids-are-text")
async def test_all_of_it_is_json_with_ids_as_text(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path) as log:
        event_id = await log.append("s", b"x")
        await published(path, 0)
        found = msgspec.json.decode(msgspec.json.encode(told(path)))
    assert found["last_event_id"] == found["streams"][0]["last_event_id"] == event_id
    assert found["processes"][0]["stats"]["latencies"]["append"].keys() == {"count", "p50_us", "p99_us", "max_us"}
