"""A disk whose power can be cut, the campaign that cuts it, and that both see what they are to see."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from crash_disk import PowerDisk
from logstore.storage import Durability, Log, LogOptions
from tests.engine import payloads


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "disk"
    home.mkdir()
    return home


@pytest.mark.parametrize("durability", ["interval", "os"])
async def test_a_lane_is_on_disk_before_its_sessions_move(home: Path, durability: Durability) -> None:
    path = home / "events.db"
    disk = PowerDisk(home, path)
    late = LogOptions(durability=durability, sync_interval_s=60, checkpoint_interval_s=60)
    async with Log(path, late, disk) as owner, Log(path, LogOptions(), disk) as heir:
        await owner.sessions.open("key", b"", "session/")
        for number in range(3):
            await owner.append("session/a", b"%d" % number)
        await owner.sessions.release("key")
        assert await heir.sessions.take_over("key") is not None
        await heir.append("session/a", b"3")
        cut = disk.cut()
    for seed in range(8):
        left = cut.leave(random.Random(seed), home.with_name(f"left-{seed}"))
        async with Log(left) as log:
            assert await payloads(log, "session/a") == [b"0", b"1", b"2", b"3"]
