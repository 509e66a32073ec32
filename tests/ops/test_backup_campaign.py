"""A slice of the backup campaign, and that it would see what it looks for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import crash
from crash_backup import BackupCampaign, payload_of, read_streams
from crash_kill import BrokenPromiseError
from logstore.ops.backup.create import BackupResult
from logstore.storage import Log


@pytest.mark.promise("backup-holds-acknowledged", "backup-nothing-else")
@pytest.mark.slow
def test_backups_under_load_hold_what_was_acknowledged(tmp_path: Path) -> None:
    command = [sys.executable, crash.__file__, "backup", "--runs", "2", "--seed", "3", "--folder", str(tmp_path / "f")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 runs" in done.stdout


RESULT = BackupResult("a.backup.json", 1, 0, 1, 3, ())


def test_the_oracle_is_content_with_what_was_acknowledged_and_more() -> None:
    BackupCampaign._compare(RESULT, 3, Counter(a=1), Counter(a=2, b=1))


@pytest.mark.parametrize(
    ("result", "restored", "before", "found", "why"),
    [
        (RESULT, 3, Counter(a=3), Counter(a=2, b=1), "lacks 1 events"),
        (RESULT, 3, Counter(c=1), Counter(a=2, b=1), "0 of 1 on c"),
        (RESULT, 3, Counter(a=1), Counter(a=2), "says so"),
        (RESULT, 2, Counter(a=1), Counter(a=3), "says so"),
        (RESULT._replace(damaged=("x",)), 3, Counter(a=1), Counter(a=3), "says so"),
    ],
)
def test_the_oracle_sees_what_is_wrong(
    result: BackupResult, restored: int, before: Counter[str], found: Counter[str], why: str
) -> None:
    with pytest.raises(BrokenPromiseError, match=why):
        BackupCampaign._compare(result, restored, before, found)


@pytest.mark.promise("backup-nothing-else")
@pytest.mark.parametrize("numbers", [(0, 2), (1,), (0, 0), (0, 1, 3, 2)])
def test_the_oracle_sees_what_is_not_a_prefix(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    async def run() -> None:
        async with Log(tmp_path / "events.db") as log:
            for number in numbers:
                await log.append("stream", payload_of("stream", number))

    asyncio.run(run())
    with pytest.raises(BrokenPromiseError, match="of stream is"):
        read_streams(tmp_path / "events.db")
