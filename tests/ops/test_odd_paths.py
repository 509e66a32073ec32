"""Paths that are no text, circles of links, and the folder itself: a store there works, or is refused in a line."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from logstore import run_maintenance_tasks
from logstore.cli import main
from logstore.errors import DamageError, NotAStoreError
from logstore.ops.backup.restore import restore
from logstore.ops.statistics import store_statistics
from logstore.ops.verify.repair import repair
from logstore.ops.verify.store import verify
from logstore.storage import Log
from tests.engine import in_segments, payloads, small


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A catalogue in a folder whose name is no UTF-8."""
    return tmp_path / os.fsdecode(b"caf\xe9") / "events.db"


async def fill(path: Path) -> None:
    async with Log(path, small()) as log:
        for number in range(20):
            await log.append("one", b"%d" % number)
        await in_segments(log)


async def test_a_store_in_a_folder_whose_name_is_no_text_is_kept_in_order(path: Path, tmp_path: Path) -> None:
    await fill(path)
    done = await run_maintenance_tasks(path, {"backup_enabled": True})
    assert done["validation"]["valid"]
    assert "error" not in done["backup"]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM maintenance WHERE task = 'backup'").fetchone() == (1,)
    restore(Path(done["backup"]["path"]), tmp_path / "other" / "events.db")
    async with Log(tmp_path / "other" / "events.db") as log:
        assert len(await payloads(log, "one")) == 20


def damage(path: Path) -> None:
    """Damage a segment's header, and remove the index."""
    segment = next(path.parent.glob("events-log/segments/*.segment"))
    data = bytearray(segment.read_bytes())
    data[20] ^= 1
    segment.write_bytes(data)
    path.unlink()


async def test_damage_there_is_noted_and_mended(path: Path) -> None:
    await fill(path)
    damage(path)
    async with Log(path, small()) as log:
        assert len(await payloads(log, "one")) == 20
    assert not verify(path).ok
    assert repair(path).report.ok
    str(DamageError(path, 0, 1, "?")).encode()
    assert store_statistics(path).total_events == 20


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, arguments)
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize(
    "command", [["stats"], ["verify"], ["backup"], ["backup", "--list"], ["reindex"], ["import", "-"], ["maintain"]]
)
def test_the_folder_itself_is_no_store(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = run(command[0], ".", *command[1:])
    assert status in (0, 1), said
    assert list(tmp_path.iterdir()) == []


def test_the_folder_itself_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotAStoreError, match="is a folder"):
        asyncio.run(Log(Path()).open())
    assert list(tmp_path.iterdir()) == []


async def test_an_export_into_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    await fill(tmp_path / "events.db")
    (tmp_path / "circle").symlink_to("circle")
    status, said = run("export", str(tmp_path / "events.db"), str(tmp_path / "circle" / "file"))
    assert status == 1
    assert "symbolic links" in said


@pytest.mark.parametrize(
    "options",
    [
        ["compact", "--retention-days", "1e300"],
        ["compact", "--retention-days", "nan"],
        ["compact", "--max-bytes", "9" * 30],
        ["streams", "--limit", "9" * 30],
        ["backup", "--delete-older-than", "1e300"],
    ],
)
async def test_a_number_beyond_all_bounds_is_wrong_usage(tmp_path: Path, options: list[str]) -> None:
    await fill(tmp_path / "events.db")
    status, said = run(options[0], str(tmp_path / "events.db"), *options[1:])
    assert status == 2, said
