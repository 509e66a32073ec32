"""Everything at once: writers, followers, checkpoints, compaction and backups on one store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget
from logstore.ops.backup.restore import find_backup, restore_from
from logstore.ops.compaction import compact as compaction
from logstore.ops.compaction.compact import compact
from logstore.storage import Event, Log, Retention
from logstore.storage.opening import OpenStore
from tests.engine import deadline, eventually, payloads, process, small
from tests.ops.stores import SEGMENT_BYTES, read_ids

STREAMS = [f"s{number}" for number in range(6)]
EVENTS = 400


@pytest.fixture(autouse=True)
def little_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let compaction find something to do all the time."""
    monkeypatch.setattr(compaction, "_MOST_SMALL", 2)
    monkeypatch.setattr(compaction, "_KEPT_SMALL", 1)
    monkeypatch.setattr(compaction, "_GROWN_RUNS", 3)
    monkeypatch.setattr(compaction, "_GROWN_BYTES", 8 << 10)


async def write(log: Log) -> None:
    for number in range(EVENTS):
        await log.append_many([(stream, b"%d " % number + bytes(300), 0) for stream in STREAMS])
        if number % 4 == 0:
            await asyncio.sleep(0)


async def follow(log: Log, stream: str) -> list[Event]:
    events: list[Event] = []
    async for event in log.follow(stream):
        events.append(event)
        if len(events) == EVENTS:
            break
    return events


def numbers(events: list[Event]) -> list[int]:
    return [int(event.payload.split()[0]) for event in events]


async def again_and_again(work: Callable[[], Awaitable[object]], done: asyncio.Event) -> int:
    """Work until it is done, and once more; return how often."""
    times = 0
    while not done.is_set():
        await work()
        times += 1
        await asyncio.sleep(0)
    await work()
    return times + 1


@pytest.mark.promise("compaction-changes-nothing", "backup-holds-acknowledged", "work-while-open")
async def test_compaction_and_backups_while_others_write_and_follow(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    target = FolderTarget(tmp_path / "backups")
    done = asyncio.Event()

    def compact_it(store: OpenStore) -> object:
        return compact(store, Retention(), segment_bytes=SEGMENT_BYTES)

    async with deadline(), Log(path, small(durability="os")) as log, Log(path, small(durability="os")) as other:
        followers = [asyncio.create_task(follow(each, stream)) for each in (log, other) for stream in STREAMS[:3]]
        compacting = asyncio.create_task(again_and_again(lambda: other.maintain(compact_it), done))
        backing_up = asyncio.create_task(
            again_and_again(lambda: log.maintain(lambda store: create_backup(store, target)), done)
        )
        await write(log)
        followed = [await follower for follower in followers]
        done.set()
        assert await compacting > 1
        assert await backing_up > 1
        assert all(numbers(events) == list(range(EVENTS)) for events in followed)
        for stream in STREAMS:
            assert [int(each.split()[0]) for each in await payloads(other, stream)] == list(range(EVENTS))
        newest = target.manifests()[-1]
    restored = tmp_path / "restored" / "events.db"
    restore_from(*find_backup(Path(target.locate(newest))), restored)
    assert all(len(read_ids(restored, stream)) == EVENTS for stream in STREAMS)


_READER = """
import asyncio, sys
from logstore.storage import Log
async def main():
    async with Log(sys.argv[1]) as log:
        print("ready", flush=True)
        count = 0
        async for event in log.follow("s0"):
            assert int(event.payload.split()[0]) == count, (event.id, count)
            count += 1
            if count == int(sys.argv[2]):
                break
        print(count, flush=True)
asyncio.run(main())
"""


@pytest.mark.promise("compaction-changes-nothing")
async def test_another_process_follows_through_compaction(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    done = asyncio.Event()
    async with deadline(), Log(path, small(durability="os")) as log:
        with process(_READER, path, str(EVENTS)) as reader:
            assert await reader.line() == "ready"
            compacting = asyncio.create_task(
                again_and_again(
                    lambda: log.maintain(lambda store: compact(store, Retention(), segment_bytes=SEGMENT_BYTES)), done
                )
            )
            await write(log)
            assert await reader.line() == str(EVENTS)
            done.set()
            await compacting


@pytest.mark.promise("maintenance-by-itself")
async def test_closing_waits_for_work_under_way_and_ends_it_early(tmp_path: Path) -> None:
    log = Log(tmp_path / "events.db", small())
    await log.append("a", b"x")
    seen: list[bool] = []
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work(store: OpenStore) -> None:
        loop.call_soon_threadsafe(begun.set)
        seen.append(store.stopping.wait(30))

    working = asyncio.create_task(log.maintain(work))
    await begun.wait()
    await log.close()
    await working
    assert seen == [True]
    await eventually(working.done)
