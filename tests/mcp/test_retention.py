"""What a running store does by itself: sessions' streams go when they ended, backups are made, requests are spared."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mcp import Client

from logstore.mcp import PersistentEventStore, resumable_http_app
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.storage import FLAG_FINAL, FLAG_REQUEST
from tests.engine import eventually
from tests.mcp.serving import DEADLINE_S, Progress, Steps, counting_server, served


def ask(path: Path, sql: str) -> list[tuple[int | str, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


@pytest.mark.promise("maintenance-by-itself")
async def test_a_running_store_makes_its_backups_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    backups = FolderTarget(default_backups(path))
    async with PersistentEventStore(path, backup_enabled=True, maintenance_interval_s=0.01) as store:
        await store.store_event("a", {"n": 1})
        await eventually(backups.manifests, "a backup")
        await eventually(lambda: ask(path, "SELECT task FROM maintenance"), "noted in the catalogue")
        # The next one is due in a day.
        rounds = store.maintenance_rounds
        await eventually(lambda: store.maintenance_rounds > rounds + 1, "two more rounds")
    assert len(backups.manifests()) == 1
    assert ask(path, "SELECT task FROM maintenance WHERE task = 'backup'") == [("backup",)]


def damaged_segment(path: Path) -> Path:
    """Change a byte in the only segment of a store."""
    (segment,) = path.parent.glob("events-log/segments/*.segment")
    data = bytearray(segment.read_bytes())
    data[1000] ^= 1
    segment.write_bytes(data)
    return segment


@pytest.mark.promise("damage-found-unasked")
async def test_a_running_store_finds_damage_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "events.db"
    async with PersistentEventStore(path) as store:
        await store.store_events([("a", {"n": number}) for number in range(100)])
    segment = damaged_segment(path)
    async with PersistentEventStore(path, maintenance_interval_s=0.01):
        await eventually(lambda: ask(path, "SELECT file FROM damage") == [(f"segments/{segment.name}",)])
    assert str(segment) in caplog.text


@pytest.mark.promise("window-and-requests-spared")
async def test_streams_of_requests_say_so_and_sessions_name_their_streams(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    steps, progress = Steps(), Progress()
    store = PersistentEventStore(path)
    async with (
        asyncio.timeout(DEADLINE_S),
        served(resumable_http_app(counting_server(steps), store)) as port,
        Client(f"http://127.0.0.1:{port}/mcp", mode="legacy") as client,
    ):
        await client.list_tools()
        steps.allow(3)
        await client.call_tool("count", {"to": 3, "label": "n"}, progress_callback=progress)
    rows = ask(path, "SELECT name, last_flags FROM streams JOIN extents USING (stream_id)")
    streams = {str(name): int(flags) for name, flags in rows}
    calls = [flags for name, flags in streams.items() if not name.endswith("_GET_stream")]
    assert len(calls) >= 2
    assert all(flags & (FLAG_REQUEST | FLAG_FINAL) == FLAG_REQUEST | FLAG_FINAL for flags in calls)
    assert not any(flags & FLAG_REQUEST for name, flags in streams.items() if name.endswith("_GET_stream"))
    prefixes = [str(prefix) for (prefix,) in ask(path, "SELECT stream_prefix FROM sessions")]
    assert all(sum(name.startswith(prefix) for prefix in prefixes) == 1 for name in streams)
