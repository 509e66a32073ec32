"""The store on disk: what survives, what is left behind, and what it tells of itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from logstore import create_event_store, get_config
from logstore.errors import NotAStoreError, StoreClosedError
from logstore.mcp import PersistentEventStore
from tests.engine import eventually
from tests.mcp.test_contract import MODELS, messages_after, note, replayed


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of this test alone, for its child processes too."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def entries(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_what_was_stored_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "InternalStorage" / "events.db"
    async with PersistentEventStore(path) as store:
        start = await store.store_event("s", None)
        for message in MODELS:
            await store.store_event("s", message)
    async with PersistentEventStore(path) as store:
        assert await messages_after(store, start) == MODELS
        again = await store.store_event("s", note(1))
        assert int(again) > int(start)
    assert path.is_file()
    assert (tmp_path / "InternalStorage" / "events-log").is_dir()


async def test_two_stores_over_the_same_files_see_each_other_s_events(tmp_path: Path) -> None:
    async with PersistentEventStore(tmp_path / "e.db") as one, PersistentEventStore(tmp_path / "e.db") as two:
        start = await one.store_event("s", None)
        await one.store_event("s", note(1))
        assert await messages_after(two, start) == [note(1)]


async def test_a_store_that_is_not_open_yet_does_not_pretend_to_be_empty(tmp_path: Path) -> None:
    store = PersistentEventStore(tmp_path / "e.db")
    assert store.get_stream_stats() == {}
    assert store.get_database_info()["total_events"] == 0
    async with PersistentEventStore(tmp_path / "e.db") as other:
        await other.store_event("s", note(1))
    for ask in (store.get_stream_stats, store.get_database_info):
        with pytest.raises(StoreClosedError, match="not open yet"):
            ask()
    assert store.health().status == "closed"


async def test_the_database_info_tells_size_content_and_cache(tmp_path: Path) -> None:
    async with PersistentEventStore(tmp_path / "e.db", durability="os") as store:
        start = await store.store_event("s", None)
        await store.store_events([("s", note(number)) for number in range(9)])
        await replayed(store, start)
        info = store.get_database_info()
        assert info["database_size_mb"] > 0
        assert (info["total_events"], info["total_streams"], info["durability"]) == (10, 1, "os")
        assert info["database_path"] == str(tmp_path / "e.db")
        assert info["since_open"]["cache_hits"] + info["since_open"]["cache_misses"] > 0
        json.dumps(info)


async def test_a_place_that_cannot_hold_a_store_is_refused_and_may_be_mended(tmp_path: Path) -> None:
    (tmp_path / "e.db").mkdir()
    store = PersistentEventStore(tmp_path / "e.db")
    with pytest.raises(NotAStoreError):
        await store.store_event("s", note(1))
    (tmp_path / "e.db").rmdir()
    await store.store_event("s", note(1))
    await store.close()


@pytest.mark.promise("testing-leaves-nothing")
async def test_the_testing_store_lives_in_a_private_folder_and_leaves_nothing(temporary: Path) -> None:
    store = create_event_store(**get_config("testing").__dict__)
    assert entries(temporary) == []
    start = await store.store_event("s", None)
    await store.store_event("s", note(1))
    (folder,) = entries(temporary)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert await messages_after(store, start) == [note(1)]
    await store.close()
    assert entries(temporary) == []


HOLD = """
import asyncio, sys
from logstore import create_event_store, get_config

async def main():
    store = create_event_store(**get_config("testing").__dict__)
    await store.store_event("s", {})
    print("open", flush=True)
    sys.stdin.readline()

asyncio.run(main())
"""


def hold() -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    return holder


@pytest.mark.promise("testing-leaves-nothing")
async def test_a_process_that_ends_without_closing_leaves_nothing(temporary: Path) -> None:
    holder = await asyncio.to_thread(hold)
    assert len(entries(temporary)) == 1
    holder.communicate("\n", timeout=30)
    assert holder.returncode == 0
    assert entries(temporary) == []


@pytest.mark.promise("testing-leaves-nothing")
async def test_the_folder_of_a_killed_process_is_swept_and_that_of_a_live_one_is_not(temporary: Path) -> None:
    killed, living = await asyncio.gather(asyncio.to_thread(hold), asyncio.to_thread(hold))
    try:
        assert len(entries(temporary)) == 2
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=30)
        async with PersistentEventStore(":memory:"):
            # The living one's and this store's own.
            assert len(entries(temporary)) == 2
        assert len(entries(temporary)) == 1
    finally:
        living.communicate("\n", timeout=30)
    assert entries(temporary) == []


@pytest.mark.promise("testing-leaves-nothing")
async def test_a_sweep_leaves_what_others_put_there(temporary: Path) -> None:
    (temporary / "logstore-memory-being-made").mkdir()
    (temporary / "logstore-memory-link").symlink_to(temporary)
    (temporary / "logstore-memory-file").write_text("")
    async with PersistentEventStore(":memory:") as store:
        await store.store_event("s", note(1))
    assert len(entries(temporary)) == 3


FORK = """
import os
from logstore.mcp.private_folder import PrivateFolder

folder = PrivateFolder()
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert folder.path.exists()
"""


@pytest.mark.promise("testing-leaves-nothing")
def test_a_forked_child_does_not_remove_the_folder(temporary: Path) -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=30)
    assert entries(temporary) == []


def open_to_others(folder: Path) -> list[Path]:
    found = []
    for each in folder.rglob("*"):
        # A running store makes and removes files.
        with contextlib.suppress(FileNotFoundError):
            if each.stat().st_mode & 0o077:
                found.append(each)
    return found


@pytest.mark.promise("files-are-private")
async def test_whatever_a_store_puts_on_the_disk_is_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    umask = os.umask(0)
    try:
        async with PersistentEventStore(folder / "e.db", backup_enabled=True, maintenance_interval_s=0.01) as store:
            await store.store_events([("s", note(number)) for number in range(5)])
            await (await store.sessions()).open("key", b"")
            await eventually(lambda: list(folder.glob("e-backups/*.backup.json")), "a backup")
            assert open_to_others(tmp_path) == []
    finally:
        os.umask(umask)
    assert open_to_others(tmp_path) == []


async def test_the_database_info_tells_how_long_operations_take(tmp_path: Path) -> None:
    async with PersistentEventStore(tmp_path / "e.db") as store:
        await store.store_event("s", note(1))
        since_open = store.get_database_info()["since_open"]
    append = since_open["latencies"]["append"]
    assert append["count"] == 1
    assert 0 < append["p50_us"] <= append["p99_us"] <= append["max_us"]
    assert since_open["open_lanes"] == 1


async def test_a_store_that_cannot_be_opened_has_failed_and_a_closed_one_is_closed(tmp_path: Path) -> None:
    (tmp_path / "e.db").mkdir()
    store = PersistentEventStore(tmp_path / "e.db")
    with pytest.raises(NotAStoreError):
        await store.store_event("s", note(1))
    health = store.health()
    assert health.status == "failed"
    assert "is a folder" in str(health.reason)
    await store.close()
    assert store.health().status == "closed"
