"""What an open log says of itself, and publishes for others."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from logstore.errors import DamageError, WriteFailedError
from logstore.storage import Log
from logstore.storage.figures import read_figures
from logstore.storage.files import Disk
from logstore.storage.lane import is_held
from tests.engine import deadline, eventually, in_segments, process, small
from tests.storage.disks import Fault, FaultyDisk

LANE = Path("events-log") / "lanes" / "0000"


async def test_operations_are_timed(tmp_path: Path) -> None:
    async with Log(tmp_path / "events.db", small()) as log, deadline():
        for _ in range(3):
            await log.append("s", b"x")
        await log.append_many([("s", b"x", 0), ("t", b"x", 0)])
        await in_segments(log)
        await log.read("s")
        latencies = log.stats().latencies
    assert {name: latency.count > 0 for name, latency in latencies.items()} == {
        "append": True,
        "commit": True,
        "read": True,
        "checkpoint": True,
    }
    # An appender waits at least as long as the commit takes; four calls waited for four commits.
    assert latencies["append"].count == latencies["commit"].count == 4
    assert latencies["append"].p50_us >= latencies["commit"].p50_us


async def test_of_appends_that_write_in_the_call_one_in_64_is_timed(tmp_path: Path) -> None:
    async with Log(tmp_path / "events.db", small(durability="os", checkpoint_interval_s=60)) as log, deadline():
        for _ in range(640):
            await log.append("s", b"x")
        append = log.stats().latencies["append"]
    # Some may have waited for a commit instead: the first of a file, and one an interval.
    assert 640 - 64 <= append.count <= 640 + 64


async def test_the_lag_is_the_age_of_the_oldest_event_that_is_in_no_segment(tmp_path: Path) -> None:
    async with Log(tmp_path / "events.db", small(checkpoint_interval_s=60)) as log, deadline():
        assert log.stats().checkpoint_lag_s == 0
        await log.append("s", b"x")
        first = log.stats().checkpoint_lag_s
        await log.append("s", b"x")
        stats = log.stats()
        assert stats.checkpoint_lag_s > first > 0
        assert stats.journal_bytes > 0
    async with Log(tmp_path / "events.db") as log:
        assert (log.stats().checkpoint_lag_s, log.stats().journal_bytes) == (0, 0)


async def test_figures_of_no_time_there_is_are_none(tmp_path: Path) -> None:
    folder = tmp_path / LANE
    async with Log(tmp_path / "events.db"), deadline():
        await eventually(lambda: read_figures(Disk(), folder), "published")
        figures = json.loads((folder / "figures.json").read_bytes())
    for name in ("opened_us", "published_us", "since_us"):
        for time_us in (-1, 1 << 62):
            (folder / "figures.json").write_text(json.dumps({**figures, name: time_us}))
            assert read_figures(Disk(), folder) is None


async def test_open_lanes_are_those_that_a_process_holds(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path) as one:
        assert one.stats().open_lanes == 1
        async with Log(path) as two:
            assert (one.stats().open_lanes, two.stats().open_lanes) == (2, 2)
        assert one.stats().open_lanes == 1


async def test_figures_are_published_at_once_and_taken_back_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / LANE
    async with Log(tmp_path / "events.db") as log, deadline():
        await eventually(lambda: read_figures(Disk(), folder), "published")
        figures = read_figures(Disk(), folder)
        assert figures is not None
        assert (figures.pid, figures.status, figures.stats.appended) == (os.getpid(), "ok", 0)
        assert figures.opened_us <= figures.published_us
        assert log.health().status == "ok"
        assert not list(folder.glob("*.tmp"))
    assert not (folder / "figures.json").exists()
    assert read_figures(Disk(), folder) is None


DEEP = b'{"extra": ' + b"[" * 20_000


@pytest.mark.parametrize("left", [b"", b"{", b'{"pid": 1}', b"\0" * 500, b'"\xff"', b'{"version": "\xff"}', DEEP])
async def test_figures_that_a_crash_has_spoilt_are_none(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "figures.json").write_bytes(left)
    assert read_figures(Disk(), tmp_path) is None


@pytest.mark.parametrize("kind", ["create", "write", "rename", "unlink"])
async def test_a_disk_that_refuses_the_figures_disturbs_nothing_else(tmp_path: Path, kind: str) -> None:
    disk = FaultyDisk()
    disk.fail(Fault(kind, name="figures.json", error=errno.ENOSPC, from_then_on=True))
    async with Log(tmp_path / "events.db", small(), disk) as log, deadline():
        await eventually(lambda: any(name.startswith("figures.json") for _, name in disk.calls), "tried")
        await log.append("s", b"x")
        await in_segments(log)
        assert log.health() == ("ok", None, None, 0)
    assert not list((tmp_path / LANE).glob("*.tmp"))
    async with Log(tmp_path / "events.db") as log:
        assert [event.payload for event in await log.read("s")] == [b"x"]


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


async def test_a_killed_process_leaves_its_figures_and_a_free_lane_until_that_is_opened_again(tmp_path: Path) -> None:
    folder = tmp_path / LANE
    with process(HOLD, tmp_path / "events.db") as holder:
        await holder.line()
        await eventually(lambda: read_figures(Disk(), folder), "published")
        assert is_held(Disk(), folder)
        holder.kill()
        assert not is_held(Disk(), folder)
        left = read_figures(Disk(), folder)
        assert left is not None
        assert left.pid == holder.pid

    def published_again() -> bool:
        figures = read_figures(Disk(), folder)
        return figures is not None and figures.pid == os.getpid()

    async with Log(tmp_path / "events.db"), deadline():
        await eventually(published_again)


async def test_a_store_that_cannot_be_opened_has_failed_and_says_why(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.fail(Fault("create", error=errno.ENOSPC, from_then_on=True))
    log = Log(tmp_path / "events.db", disk=disk)
    assert log.health().status == "closed"
    with pytest.raises(WriteFailedError):
        await log.open()
    health = log.health()
    assert health.status == "failed"
    assert "No space left" in str(health.reason)
    with pytest.raises(WriteFailedError):
        await log.open()
    assert log.health().since_us == health.since_us
    disk.heal()
    await log.open()
    assert log.health() == ("ok", None, None, 0)
    await log.close()
    assert log.health().status == "closed"


async def test_a_damaged_index_is_told_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path, small()) as log, deadline():
        for number in range(200):
            await log.append(f"s{number}", b"x")
        await in_segments(log)
        # Put in its place under an open store: it passes for a database, and every page of it is damaged.
        damaged = tmp_path / "damaged.db"
        damaged.write_bytes(path.read_bytes()[:100].ljust(1 << 20, b"\xff"))
        damaged.replace(path)
        for ask in (log.stats, log.stream_summaries):
            with pytest.raises(DamageError, match=f"logstore reindex {path}"):
                ask()


async def test_figures_are_json_with_everything_in_it(tmp_path: Path) -> None:
    async with Log(tmp_path / "events.db"), deadline():
        await eventually((tmp_path / LANE / "figures.json").exists)
        figures = json.loads((tmp_path / LANE / "figures.json").read_bytes())
    assert set(figures) >= {"pid", "incarnation", "version", "opened_us", "published_us", "status", "stats"}
    assert set(figures["stats"]["latencies"]) == {"append", "commit", "read", "checkpoint"}
