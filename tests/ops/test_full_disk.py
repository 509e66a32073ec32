"""A disk that is really full: what works then, and how the store comes back."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from logstore.ops.access import StoreView
from logstore.ops.compaction.compact import Compacted, compact, compact_at
from logstore.ops.verify.store import verify
from logstore.storage import Log, Retention, opening
from logstore.storage.opening import OpenStore, reserve_path
from tests.engine import deadline, eventually, small

DISK_BYTES = 48 << 20
KEEP = Retention(max_bytes=4 << 20, resume_window_s=0.0)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A store on a small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder / "events.db"
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_RESERVE_FROM_BYTES", 0)


def compacted(store: OpenStore) -> Compacted:
    return compact(store, KEEP)


async def fill(log: Log) -> list[str]:
    """Append until the disk is full, and a few events more."""
    ids: list[str] = []
    while log.health().status == "ok":
        ids += await log.append_many([("s", b"%d " % (len(ids) + each) + bytes(20_000), 0) for each in range(20)])
    return ids


def fill_up(path: Path) -> None:
    """Take all the room that is left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.promise("catches-up", "full-disk-retention")
async def test_reads_retention_and_verify_work_on_a_full_disk_and_the_store_catches_up(path: Path) -> None:
    async with deadline(60), Log(path, small(segment_bytes=1 << 20, volatile_bytes=8 << 20)) as log:
        await log.append("s", b"first")
        await log.maintain(compacted)
        assert reserve_path(path.with_name("events-log")).exists()
        ids = await fill(log)
        assert log.health().status == "degraded"
        assert re.search("No space left|disk is full", str(log.health().reason))
        # Reads.
        assert [event.event_id for event in await log.read("s", ids[2], 5)] == ids[3:8]
        with StoreView(path) as view:
            assert len(view.read("s", 0, 10)) == 10
        # Appends go on, volatile.
        ids.append(await log.append("s", b"more"))
        assert log.health().volatile_events > 0
        # Verify.
        assert verify(path).ok
        # Retention makes room, and the store catches up by itself.
        done = await log.maintain(compacted)
        assert done.removed_bytes > DISK_BYTES // 3
        await eventually(lambda: log.health().status == "ok", "healthy again")
        last = (await log.read("s", ids[-2]))[0]
        assert (last.event_id, last.payload) == (ids[-1], b"more")
    with StoreView(path) as view:
        events = list(view.events("s"))
    assert [event.event_id for event in events] == ids[-len(events) :]
    assert 0 < len(events) < len(ids)


@pytest.mark.promise("full-disk-retention")
async def test_a_closed_store_on_a_full_disk_can_be_compacted(path: Path) -> None:
    async with deadline(60), Log(path, small(segment_bytes=1 << 20)) as log:
        await log.append("s", b"first")
        await log.maintain(compacted)
        ids = await fill(log)
    fill_up(path.with_name("filler"))
    done = compact_at(path, KEEP)
    assert done.removed_bytes > 0
    with StoreView(path) as view:
        kept = [event.event_id for event in view.events("s")]
    assert 0 < len(kept) < len(ids)
