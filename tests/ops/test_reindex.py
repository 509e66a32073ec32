"""`reindex` makes the catalogue again, whatever is there, and who has the store open notices nothing."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import pytest
from click.testing import CliRunner

import logstore.ops.reindex
from logstore.cli import main
from logstore.errors import NotAStoreError, WriteFailedError
from logstore.ops.reindex import reindex_at
from logstore.storage import Log
from logstore.storage.catalogue import Catalogue
from tests.engine import deadline, eventually, in_segments, process, read_all, small
from tests.ops.stores import opened

STREAMS = ("one", "two", "three")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


async def fill(log: Log, count: int) -> None:
    for number in range(count):
        await log.append_many([(stream, b"%d " % number + b"." * 300, 0) for stream in STREAMS])


async def events_of(path: Path) -> list[str]:
    async with Log(path) as log:
        return [event.event_id for stream in STREAMS for event in await read_all(log, stream)]


def inode(path: Path) -> int:
    return path.stat().st_ino


def remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(4096, len(data), 4096):
        data[place : place + 2000] = b"\xa5" * 2000
    path.write_bytes(data)


def lose_rows(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("delete from events where event_id % 2")
        connection.execute("delete from extents")


def put_back(path: Path) -> None:
    shutil.copy(path.with_name("earlier"), path)


@pytest.mark.promise("reindex-whole")
@pytest.mark.parametrize("harm", [remove, damage, lose_rows, put_back, lambda path: None])
async def test_the_catalogue_is_whole_again(path: Path, harm: Callable[[Path], None]) -> None:
    async with Log(path, small()) as log:
        await fill(log, 100)
    shutil.copy(path, path.with_name("earlier"))
    async with Log(path, small()) as log:
        await fill(log, 100)
    before = await events_of(path)
    harm(path)
    done = await asyncio.to_thread(reindex_at, path)
    assert (done.events, done.streams) == (600, 3)
    assert await events_of(path) == before
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("select count(*) from events").fetchone() == (600,)
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    assert not path.with_name("events.db.new").exists()


async def test_a_large_store_is_scanned_by_a_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Log(path, small()) as log:
        await fill(log, 50)
    before = await events_of(path)
    monkeypatch.setattr(logstore.ops.reindex, "_WORTH_A_PROCESS_BYTES", 1)
    done = await asyncio.to_thread(reindex_at, path)
    assert done.events == 150
    assert await events_of(path) == before


FOLLOWER = """
import asyncio, sys
from logstore.storage import Log
from tests.engine import small

async def main():
    async with Log(sys.argv[1], small()) as log:
        wanted = int(sys.argv[2])
        numbers = []
        async for event in log.follow("one"):
            if not numbers:
                print("follows", flush=True)
            numbers.append(int(event.payload.split()[0]))
            if len(numbers) == wanted:
                break
        again = await log.read("one", None, wanted)
        assert [int(event.payload.split()[0]) for event in again] == numbers
        print("whole" if numbers == list(range(wanted)) else numbers, flush=True)
        print(log.health().status, flush=True)

asyncio.run(main())
"""


@pytest.mark.promise("work-while-open", "reindex-whole")
async def test_who_follows_in_another_process_sees_no_gap_and_no_error(path: Path) -> None:
    turns, each = 5, 40
    async with deadline(), Log(path, small()) as log:
        number = 0

        async def append(count: int) -> None:
            nonlocal number
            for _ in range(count):
                await log.append("one", b"%d " % number + b"." * 300)
                number += 1

        await append(each)
        with process(FOLLOWER, path, str((2 * turns + 1) * each)) as follower:
            assert await follower.line() == "follows"
            for _ in range(turns):
                node = inode(path)
                appending = asyncio.create_task(append(each))
                done = await asyncio.to_thread(reindex_at, path)
                assert inode(path) != node
                assert done.events <= number
                await appending
                await append(each)
                await eventually(lambda: not log._opened().store.catalogue.replaced, "the new one is in use")
            assert await follower.rest() == ["whole", "ok"]
        await in_segments(log)
        assert log.health().status == "ok"
        assert [int(event.payload.split()[0]) for event in await read_all(log, "one")] == list(range(number))
        # The last one knows what was checkpointed since.
        await eventually(lambda: log.stats().events == number)


async def test_sessions_are_in_the_new_catalogue(path: Path) -> None:
    async with Log(path, small()) as log:
        await log.sessions.open("session", b"")
        await fill(log, 5)
    await asyncio.to_thread(reindex_at, path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("select count(*) from sessions").fetchone() == (1,)


def test_there_must_be_a_store(path: Path) -> None:
    with pytest.raises(NotAStoreError):
        reindex_at(path)
    assert list(path.parent.iterdir()) == []


async def test_a_catalogue_that_cannot_be_opened_is_told_clearly(path: Path) -> None:
    async with Log(path, small()) as log:
        await fill(log, 2)
    # SQLite finds no file where it needs one, and says no more than that it cannot.
    path.with_name("events.db-wal").mkdir()
    with pytest.raises(WriteFailedError, match="cannot be opened"):
        reindex_at(path)


async def test_an_error_of_the_new_index_is_no_damage_of_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Log(path, small()) as log:
        await fill(log, 2)

    def refuse(_: Catalogue) -> NoReturn:
        # What SQLite says when the disk does not give it the schema.
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

    before = inode(path)
    with opened(path) as store, monkeypatch.context() as patch:
        patch.setattr(Catalogue, "highest_dropped", refuse)
        with pytest.raises(sqlite3.DatabaseError, match="malformed"):
            store.reindex()
    assert inode(path) == before
    assert sorted(each.name for each in path.parent.iterdir()) == ["events-log", "events.db"]


def run(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["reindex", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


async def test_the_command_says_what_it_did(path: Path) -> None:
    async with Log(path, small()) as log:
        await fill(log, 20)
    code, out, err = await asyncio.to_thread(run, path, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (said["events"], said["streams"]) == (60, 3)
    assert said["segments"] >= 1
    assert said["events_s"] == round(60 / said["seconds"])
    code, out, _ = await asyncio.to_thread(run, path)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["events", "streams", "segments", "seconds", "events"]


def test_the_command_refuses_what_is_no_store(path: Path) -> None:
    code, _, err = run(path)
    assert code == 1
    assert "there is no store" in err
    assert run()[0] == 2


DYING = """
import os, sys
from pathlib import Path
from logstore.ops.reindex import reindex_at
from logstore.storage.files import Disk

class Dying(Disk):
    calls = 0

def dying(name):
    call = getattr(Disk, name)
    def at_last(self, *arguments, **options):
        Dying.calls += 1
        if Dying.calls == int(sys.argv[2]):
            os._exit(9)
        return call(self, *arguments, **options)
    return at_last

for name in ("create", "write", "rename", "unlink", "sync", "sync_folder"):
    setattr(Dying, name, dying(name))

# One import for all deaths.
for turn, path in enumerate(sys.argv[3:]):
    child = os.fork()
    if not child:
        sys.argv[2] = str(turn + 1)
        reindex_at(Path(path), disk=Dying())
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.promise("reindex-whole")
@pytest.mark.slow
async def test_a_death_at_any_call_loses_nothing(path: Path, tmp_path: Path) -> None:
    async with Log(path, small()) as log:
        await fill(log, 60)
    before = await events_of(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("insert into imports values ('there', '7', 3)")
    turns = 60
    copies = [tmp_path / str(turn) / path.name for turn in range(turns)]
    for copy in copies:
        shutil.copytree(path.with_name("events-log"), copy.with_name("events-log"))
        shutil.copy(path, copy)
    with process(DYING, path, "0", *copies) as dying:
        ends = [int(line) for line in await dying.rest()]
    assert set(ends) == {0, 9}
    # It came to its end: all calls were tried.
    assert ends[-1] == 0
    assert ends == sorted(ends, reverse=True)
    for copy, end in zip(copies, ends, strict=True):
        if end == 0:
            break
        assert await events_of(copy) == before
        with closing(sqlite3.connect(copy)) as connection:
            assert connection.execute("select count(*) from events").fetchone() == (180,)
            assert connection.execute("select count(*) from imports").fetchone() == (1,)
            assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
