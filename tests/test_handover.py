"""A session that moves from one process to another, both alive, takes its streams along whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from logstore.errors import WriteFailedError
from logstore.storage import Log
from logstore.storage.files import Disk
from tests.engine import DEADLINE_S, deadline, in_segments, small
from tests.storage.disks import Fault, FaultyDisk

SLOW = small(checkpoint_interval_s=3600)


class StoppedDisk(Disk):
    """The real disk; a thread that reads is stopped once, as a whole process can be, before its next read."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.stopped = threading.Event()
        self.go_on = threading.Event()

    def read(self, fd: int, length: int, offset: int) -> bytes:
        if self.stop.is_set():
            self.stop.clear()
            self.stopped.set()
            self.go_on.wait()
        return super().read(fd, length, offset)


async def test_a_reader_that_was_stopped_meanwhile_misses_nothing(tmp_path: Path) -> None:
    path, disk = tmp_path / "events.db", StoppedDisk()
    async with Log(path, SLOW) as owner, Log(path, small()) as heir, Log(path, SLOW, disk) as reader, deadline():
        await owner.sessions.open("session", b"", "stream")
        await owner.append("stream", b"1")
        assert [event.payload for event in await reader.read("stream")] == [b"1"]
        await owner.append("stream", b"2")
        disk.stop.set()
        reading = asyncio.create_task(reader.read("stream"))
        # It knows how far the others are, and has not asked the index.
        await asyncio.to_thread(disk.stopped.wait)
        try:
            await owner.append("stream", b"3")
            await owner.sessions.release("session")
            session = await heir.sessions.take_over("session")
            assert session is not None
            assert session.incarnation == await heir.sessions.incarnation()
            await heir.append("stream", b"4")
            await in_segments(heir)
        finally:
            disk.go_on.set()
        found = [event.payload for event in await reading]
        assert found == [b"1", b"2", b"3", b"4"][: len(found)]


class MeanwhileDisk(Disk):
    """The real disk; before the next look for journals something happens, once it is set."""

    before: Callable[[], object] | None = None

    def list(self, folder: Path) -> list[str]:
        if folder.parent.name == "lanes" and self.before is not None:
            before, self.before = self.before, None
            before()
        return super().list(folder)


@pytest.mark.promise("no-hole-passed-over")
async def test_what_leaves_the_journals_before_a_reader_looks_there_is_found_in_the_index(tmp_path: Path) -> None:
    path, disk, loop = tmp_path / "events.db", MeanwhileDisk(), asyncio.get_running_loop()
    async with Log(path, SLOW) as writer, Log(path, SLOW, disk) as reader, deadline():
        await writer.append("stream", b"1")
        # It empties them into segments.
        disk.before = lambda: asyncio.run_coroutine_threadsafe(writer.close(), loop).result(DEADLINE_S)
        assert [event.payload for event in await reader.read("stream")] == [b"1"]
        assert disk.before is None


async def test_only_what_the_session_wrote_is_waited_for(tmp_path: Path) -> None:
    async with Log(tmp_path / "events.db", SLOW) as log, deadline():
        for name in ("one", "two"):
            await log.sessions.open(name, b"", f"{name}/")
        await log.append("one/stream", b"1")
        await log.sessions.release("one")
        assert log.stats().unsegmented_bytes == 0
        await log.append("one/stream", b"2")
        await log.sessions.release("two")
        assert log.stats().unsegmented_bytes > 0


async def test_a_session_stays_where_it_is_while_the_disk_fails(tmp_path: Path) -> None:
    disk = FaultyDisk()
    async with Log(tmp_path / "events.db", SLOW, disk) as log, deadline():
        await log.sessions.open("session", b"", "stream")
        await log.append("stream", b"1")
        disk.fail(Fault("sync", name="segment", from_then_on=True))
        with pytest.raises(WriteFailedError, match="cannot be emptied"):
            await log.sessions.release("session")
        session = await log.sessions.find("session")
        assert session is not None
        assert not session.released
        disk.heal()
