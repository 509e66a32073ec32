"""A disk that fails at the file door: at every change, once, until it is mended, or to the end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import pytest

from crash_sync import SyncInTurn
from logstore.errors import GapError, WriteFailedError
from logstore.storage import Durability, Log, LogOptions, WriteFailurePolicy, commit
from logstore.storage.files import Disk
from logstore.storage.kernel_sync import KernelSync
from logstore.storage.worker import Timers
from tests.engine import deadline, eventually, in_segments, payloads, process, read_all, read_to_gap, small
from tests.storage.disks import Fault, FaultyDisk

MODES: Final[tuple[Durability, ...]] = ("always", "interval", "os")
POLICIES: Final[tuple[WriteFailurePolicy, ...]] = ("degrade", "raise")
AT_ONCE: Final = 8
KILLED: Final = """
import asyncio, os, signal, sys
from logstore.storage import Log

async def main():
    log = Log(sys.argv[1])
    await log.append('one', b'1')
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
Until = Literal["once", "mended", "closed"]
UNTIL: Final[tuple[Until, ...]] = ("once", "mended", "closed")
STRIDE: Final = int(os.environ.get("LOGSTORE_FAULT_STRIDE", "9"))
"""Every so many-th change is made to fail; 1 tries all of them, which takes minutes."""


class FailingDisk(Disk):
    """The real disk, whose n-th change fails, and with `lasting` all that follow until it is mended.

    Attributes:
        changes: How many changes were asked for.
        failed: How many failed.
        broken: Whether changes fail now.
        wrongs: Syncs of a file whose sync had failed before.
    """

    def __init__(self, at: int = 0, error: int = errno.EIO, *, lasting: bool = False, only: str = "") -> None:
        self._at = at
        self._error = error
        self._lasting = lasting
        self._only = only
        self._mutex = threading.Lock()
        self._paths: dict[int, Path] = {}
        self._given_up: set[Path] = set()
        self.changes = 0
        self.failed = 0
        self.broken = False
        self.wrongs: list[Path] = []

    def breaks(self) -> None:
        """Fail from now on."""
        self.broken = True

    def mend(self) -> None:
        """Work from now on."""
        self.broken = self._lasting = False

    def _fails(self, path: Path) -> OSError | None:
        if self._only and self._only not in (path.name, path.parent.name):
            return None
        with self._mutex:
            self.changes += 1
            hit = self.changes == self._at
            self.broken |= hit and self._lasting
            if not hit and not self.broken:
                return None
            self.failed += 1
        return OSError(self._error, os.strerror(self._error), str(path))

    def _change(self, path: Path) -> None:
        if (error := self._fails(path)) is not None:
            raise error

    def create(self, path: Path) -> int:
        self._change(path)
        fd = super().create(path)
        self._paths[fd] = path
        self._given_up.discard(path)
        return fd

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        fd = super().open(path, write=write, create=create)
        self._paths[fd] = path
        return fd

    def write(self, fd: int, data: bytes, offset: int) -> None:
        if (error := self._fails(self._paths[fd])) is not None:
            # Some of it gets there.
            super().write(fd, data[: len(data) // 3], offset)
            raise error
        super().write(fd, data, offset)

    def sync(self, fd: int) -> None:
        path = self._paths[fd]
        if path in self._given_up:
            self.wrongs.append(path)
        if (error := self._fails(path)) is not None:
            # Of the lane's state each slot is a page of its own, which is written again whole.
            if path.name != "state":
                self._given_up.add(path)
            raise error
        super().sync(fd)

    def kernel_sync(self) -> KernelSync | None:
        # Some with the kernel's, some with the thread's.
        return SyncInTurn(self.sync) if self._at % 2 else None

    def sync_folder(self, folder: Path) -> None:
        self._change(folder)
        super().sync_folder(folder)

    def rename(self, source: Path, target: Path) -> None:
        self._change(target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._change(path)
        super().unlink(path)


@dataclass
class Case:
    """One fault in one life of a store, and what its writers were told.

    Attributes:
        number: Which change of the disk fails.
        until: How long.
        acknowledged: Payloads by stream whose append returned.
        durable: Those of them after which the log said that all is well.
        refused: Those whose append raised.
    """

    folder: Path
    number: int
    until: Until
    error: int
    options: LogOptions
    acknowledged: dict[str, list[bytes]] = field(default_factory=dict)
    durable: set[bytes] = field(default_factory=set)
    refused: set[bytes] = field(default_factory=set)

    async def run(self) -> FailingDisk:
        disk = FailingDisk(self.number, self.error, lasting=self.until != "once")
        path = self.folder / "events.db"
        log = await self._opened(path, disk)
        async with asyncio.TaskGroup() as tasks:
            for writer in range(3):
                tasks.create_task(self._write(log, f"stream {writer}", 0))
        if self.until == "mended":
            if disk.broken and self.options.on_write_failure == "degrade" and log.health().status == "degraded":
                assert log.health().reason
            disk.mend()
        if self.until != "closed":
            await eventually(lambda: log.health().status == "ok", "well again")
            assert log.health().volatile_events == 0
            async with asyncio.TaskGroup() as tasks:
                for writer in range(3):
                    tasks.create_task(self._write(log, f"stream {writer}", 100))
            await self._check_open(log)
        # A disk that fails to the end is no reason not to close.
        with contextlib.suppress(OSError):
            await log.close()
        disk.mend()
        async with Log(path, self.options) as reopened:
            await self._check_reopened(reopened)
        assert not disk.wrongs, f"synced again after a failed sync: {disk.wrongs}"
        return disk

    async def _opened(self, path: Path, disk: FailingDisk) -> Log:
        log = Log(path, self.options, disk)
        try:
            await log.open()
        except WriteFailedError as error:
            assert os.strerror(self.error) in str(error)  # noqa: PT017
            disk.mend()
            log = Log(path, self.options, disk)
            await log.open()
        return log

    async def _write(self, log: Log, stream: str, first: int) -> None:
        told = self.acknowledged.setdefault(stream, [])
        for number in range(first, first + 8):
            payload = f"{stream} {number} ".encode().ljust(4000, b".")
            try:
                if number % 4:
                    await log.append(stream, payload)
                    stored = [payload]
                else:
                    stored = [payload, payload + b"!"]
                    await log.append_many([(stream, each, 0) for each in stored])
            except WriteFailedError:
                assert self.options.on_write_failure == "raise"
                self.refused |= {payload, payload + b"!"}
                continue
            told += stored
            if log.health().status == "ok":
                self.durable |= set(stored)
            await asyncio.sleep(0)

    async def _check_open(self, log: Log) -> None:
        for stream, told in self.acknowledged.items():
            assert await payloads(log, stream) == told
            events = await read_all(log, stream)
            assert {await log.stream_of(event.event_id) for event in events} == {stream}

    async def _check_reopened(self, log: Log) -> None:
        for stream, told in self.acknowledged.items():
            found, _ = await read_to_gap(log, stream)
            if self.until != "closed":
                # The refused ones are not there.
                assert found == told
                continue
            assert len(set(found)) == len(found)
            kept = set(found)
            # In the other modes what was acknowledged may still have waited for its sync.
            if self.options.durability == "always":
                assert [each for each in told if each in self.durable and each not in kept] == []
            in_order = [each for each in found if each not in self.refused]
            assert in_order == [each for each in told if each in kept]


@pytest.mark.promise("catches-up", "raise-refuses", "durable-stays", "failed-file-given-up")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("durability", MODES)
@pytest.mark.parametrize("until", UNTIL)
async def test_every_change_of_the_disk_may_fail(
    tmp_path: Path, durability: Durability, policy: WriteFailurePolicy, until: Until
) -> None:
    options = small(durability=durability, on_write_failure=policy, sync_interval_s=0.01)
    # Another part of the numbers for each of the eighteen.
    part = MODES.index(durability) + 3 * POLICIES.index(policy) + 6 * UNTIL.index(until)
    numbers = itertools.count(1 + part % STRIDE, STRIDE)
    unreached = 0

    async def try_all() -> None:
        nonlocal unreached
        # Some changes come later in one run than in another.
        while unreached < 4 + AT_ONCE // STRIDE:
            number = next(numbers)
            error = (errno.EIO, errno.ENOSPC)[number % 2]
            case = Case(tmp_path / str(number), number, until, error, options)
            try:
                async with deadline():
                    disk = await case.run()
            except Exception as problem:
                problem.add_note(f"change {number}")
                raise
            unreached += disk.failed == 0

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(try_all())
    assert next(numbers) > 60


@pytest.mark.promise("degrade-serves-on", "catches-up")
@pytest.mark.parametrize("durability", MODES)
async def test_while_the_disk_fails_events_are_volatile_and_said_to_be(tmp_path: Path, durability: Durability) -> None:
    disk = FailingDisk(error=errno.ENOSPC)
    async with Log(tmp_path / "events.db", small(durability=durability), disk) as log, deadline():
        await log.append("one", b"before")
        assert log.health() == ("ok", None, None, 0)
        disk.breaks()
        ids = [await log.append("one", b"%d" % number) for number in range(20)]
        await eventually(lambda: log.health().status == "degraded")
        health = log.health()
        assert health.reason is not None
        assert "No space left" in health.reason
        assert health.since_us is not None
        assert health.volatile_events >= 1
        expected = [b"before", *(b"%d" % number for number in range(20))]
        assert await payloads(log, "one") == expected
        assert await log.stream_of(ids[-1]) == "one"
        followed = [event.payload async for event in take(log, "one", 21)]
        assert followed == expected
        disk.mend()
        await eventually(lambda: log.health() == ("ok", None, None, 0))
        assert await payloads(log, "one") == expected
        await in_segments(log)
    async with Log(tmp_path / "events.db") as log:
        assert await payloads(log, "one") == expected
        assert [event.event_id for event in await read_all(log, "one")][1:] == ids


async def take(log: Log, stream: str, count: int):  # type: ignore[no-untyped-def]
    async for event in log.follow(stream):
        yield event
        count -= 1
        if not count:
            return


@pytest.mark.promise("volatile-bounded")
async def test_a_reader_is_told_of_volatile_events_that_were_dropped(tmp_path: Path) -> None:
    disk = FailingDisk()
    path = tmp_path / "events.db"
    async with Log(path, small(volatile_bytes=10_000), disk) as log, deadline():
        before = [await log.append("one", b"%d" % number) for number in range(5)]
        await in_segments(log)
        quiet = await log.append("quiet", b"q")
        disk.breaks()
        for number in range(5, 50):
            await log.append("one", b"%d" % number + b"." * 1000)
        assert log.health().status == "degraded"
        assert log.health().volatile_events < 12
        # What comes before the gap is returned first.
        found, gap = await read_to_gap(log, "one")
        assert found == [b"%d" % number for number in range(5)]
        assert gap is not None
        with pytest.raises(GapError):
            await log.read("one", before[-1])
        assert [event.event_id for event in await read_all(log, "quiet")] == [quiet]
        disk.mend()
        await eventually(lambda: log.health().status == "ok")
        last = await log.append("one", b"after")
        found, gap = await read_to_gap(log, "one")
        assert found == [b"%d" % number for number in range(5)]
        assert gap is not None
        # Whoever is past the gap reads on.
        assert await log.read("one", last) == []
    async with Log(path) as log:
        found, gap = await read_to_gap(log, "one")
        assert found == [b"%d" % number for number in range(5)]
        assert gap is not None
        assert await payloads(log, "quiet") == [b"q"]


@pytest.mark.promise("no-hole-passed-over", "volatile-bounded")
async def test_a_gap_at_the_end_of_a_stream_is_told_too(tmp_path: Path) -> None:
    disk = FailingDisk()
    async with Log(tmp_path / "events.db", small(volatile_bytes=0), disk) as log, deadline():
        before = await log.append("one", b"1")
        disk.breaks()
        await log.append("one", b"2")
        with pytest.raises(GapError):
            await log.read("one", before)
        found, gap = await read_to_gap(log, "one")
        assert found == [b"1"]
        assert gap is not None


@pytest.mark.promise("raise-refuses")
@pytest.mark.parametrize("durability", MODES)
async def test_with_raise_appends_raise_until_the_disk_is_back(tmp_path: Path, durability: Durability) -> None:
    disk = FailingDisk()
    path = tmp_path / "events.db"
    options = small(durability=durability, on_write_failure="raise", sync_interval_s=0.01)
    async with Log(path, options, disk) as log, deadline():
        stored = [b"before"]
        await log.append("one", b"before")
        disk.breaks()
        for number in range(30):
            payload = b"%d" % number
            with contextlib.suppress(WriteFailedError):
                await log.append("one", payload)
                stored.append(payload)
            await asyncio.sleep(0.002)
        # Where appends do not sync, nobody knows until a write or a sync fails.
        assert durability != "always" or stored == [b"before"]
        assert log.health().status == "failed"
        assert log.health().since_us is not None
        with pytest.raises(WriteFailedError, match="Input/output error"):
            await log.append("one", b"no")
        with pytest.raises(WriteFailedError):
            await log.append_many([("one", b"no", 0)])
        disk.mend()
        await eventually(lambda: log.health() == ("ok", None, None, 0))
        await log.append("one", b"after")
        stored.append(b"after")
        assert await payloads(log, "one") == stored
    async with Log(path) as log:
        assert await payloads(log, "one") == stored


@pytest.mark.promise("stuck-journals")
@pytest.mark.parametrize("policy", POLICIES)
async def test_segments_that_cannot_be_written_fill_the_journal_and_no_more(
    tmp_path: Path, policy: WriteFailurePolicy
) -> None:
    disk = FailingDisk(error=errno.ENOSPC, only="segments")
    path = tmp_path / "events.db"
    options = small(journal_bytes=128 << 10, on_write_failure=policy)
    stored: dict[str, list[bytes]] = {}

    async def write(log: Log, stream: str, first: int) -> None:
        for number in range(first, first + 40):
            payload = f"{stream} {number} ".encode().ljust(2000, b".")
            with contextlib.suppress(WriteFailedError):
                await log.append(stream, payload)
                stored.setdefault(stream, []).append(payload)
            await asyncio.sleep(0)

    async with Log(path, options, disk) as log, deadline():
        await write(log, "first", 0)
        disk.breaks()
        async with asyncio.TaskGroup() as tasks:
            for writer in range(6):
                tasks.create_task(write(log, f"stream {writer}", 0))
        assert log.health().status == ("failed" if policy == "raise" else "degraded")
        assert "journal" in str(log.health().reason)
        assert (policy == "raise") == (sum(map(len, stored.values())) < 280)
        failed = disk.failed
        await eventually(lambda: disk.failed > failed)
        for stream, told in stored.items():
            assert await payloads(log, stream) == told
        disk.mend()
        await eventually(lambda: log.health().status == "ok")
        async with asyncio.TaskGroup() as tasks:
            for writer in range(6):
                tasks.create_task(write(log, f"stream {writer}", 40))
        await in_segments(log)
        for stream, told in stored.items():
            assert await payloads(log, stream) == told
    async with Log(path) as log:
        for stream, told in stored.items():
            assert await payloads(log, stream) == told
        assert {each.stream: each.events for each in log.stream_summaries()} == {
            stream: len(told) for stream, told in stored.items()
        }


class NoRoomInSegments(Disk):
    """The real disk; segments can be created and written, their folder cannot be synced."""

    full = False
    tries = 0

    def sync_folder(self, folder: Path) -> None:
        if self.full and folder.name == "segments":
            self.tries += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        super().sync_folder(folder)


@pytest.mark.promise("stuck-journals")
async def test_a_checkpoint_that_fails_half_way_leaves_no_files(tmp_path: Path) -> None:
    disk = NoRoomInSegments()
    async with Log(tmp_path / "events.db", small(), disk) as log, deadline():
        await log.append("one", b"1")
        await in_segments(log)
        folder = tmp_path / "events-log" / "segments"
        segments, descriptors = open_files(folder)
        disk.full = True
        await log.append("one", b"2")
        await eventually(lambda: disk.tries > 2)
        assert log.health().status == "degraded"
        more_segments, more_descriptors = open_files(folder)
        # One may be just being tried.
        assert len(more_segments) <= len(segments) + 1
        assert len(more_descriptors) <= len(descriptors) + 1
        disk.full = False
        await in_segments(log)
        assert await payloads(log, "one") == [b"1", b"2"]


def open_files(folder: Path) -> tuple[list[Path], list[str]]:
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return list(folder.iterdir()), [link for link in links if str(folder) in link]


class NoUnlink(Disk):
    """The real disk, on which journals cannot be removed."""

    broken = True

    def unlink(self, path: Path) -> None:
        if self.broken and path.suffix == ".journal":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        super().unlink(path)


@pytest.mark.parametrize("mended", [True, False])
async def test_journals_that_cannot_be_removed_are_not_taken_twice(tmp_path: Path, mended: bool) -> None:
    disk = NoUnlink()
    path = tmp_path / "events.db"
    async with Log(path, small(), disk) as log, deadline():
        for number in range(100):
            await log.append("one", b"%d" % number)
        await in_segments(log)
        assert log.health().status == "ok"
        disk.broken = not mended
        await log.append("one", b"100")
    left = list((tmp_path / "events-log" / "lanes" / "0000").glob("*.journal"))
    assert bool(left) != mended
    async with Log(path) as log:
        assert await payloads(log, "one") == [b"%d" % number for number in range(101)]
        (summary,) = log.stream_summaries()
        assert summary.events == 101
        assert not list((tmp_path / "events-log" / "lanes" / "0000").glob("*.journal"))


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.promise("failed-opening-undone")
async def test_an_opening_that_failed_leaves_nothing_locked_or_open(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path, small()) as log:
        await log.append("one", b"1")
    failures = 0
    for number in itertools.count(1):
        before = open_descriptors()
        disk = FailingDisk(number)
        log = Log(path, small(), disk)
        try:
            async with deadline():
                await log.open()
        except WriteFailedError:
            failures += 1
            assert open_descriptors() == before
            for name in ("checkpoint.lock", "registry.lock", "lanes/0000/lock", "store.lock"):
                lock = Disk().lock(tmp_path / "events-log" / name)
                assert lock is not None, name
                lock.release()
        else:
            await log.close()
            if not disk.failed:
                break
    assert failures > 5
    async with Log(path) as log:
        assert await payloads(log, "one") == [b"1"]


class Unreadable(Disk):
    """The real disk, whose n-th look at a file or folder fails once."""

    def __init__(self, at: int) -> None:
        self.left = at

    def _look(self, path: Path) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        self._look(path)
        return super().open(path, write=write, create=create)

    def list(self, folder: Path) -> list[str]:
        self._look(folder)
        return super().list(folder)


async def test_a_store_that_cannot_be_read_says_so_and_opens_when_it_can(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path, small()) as log:
        await log.append("one", b"1")
    failures = 0
    for number in itertools.count(1):
        disk = Unreadable(number)
        log = Log(path, small(), disk)
        try:
            async with deadline():
                await log.open()
        except WriteFailedError:
            failures += 1
            assert "Input/output error" in str(log.health().reason)
            assert log.health().status == "failed"
        else:
            if disk.left > 0:
                disk.left = 0
                break
        assert await payloads(log, "one") == [b"1"]
        await log.close()
    await log.close()
    assert failures > 10


@pytest.mark.promise("unreadable-is-told")
@pytest.mark.parametrize("file", ["journal", "registry.log", "state"])
async def test_a_file_that_the_disk_no_longer_gives_is_named_with_what_to_do(tmp_path: Path, file: str) -> None:
    path = tmp_path / "events.db"
    with process(KILLED, path) as writer:
        assert await writer.rest_after_kill() == []
    disk = FaultyDisk()
    disk.fail(Fault("read", name=file, from_then_on=True))
    log = Log(path, small(), disk)
    with pytest.raises(WriteFailedError, match=rf"{file}'.*ddrescue.*logstore repair") as refused:
        await log.open()
    assert str(path) in str(refused.value)
    disk.heal()
    assert await payloads(log, "one") == [b"1"]
    await log.close()


@pytest.mark.promise("unreadable-is-told")
async def test_an_index_that_the_disk_no_longer_gives_is_made_again_once_it_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.db"
    async with Log(path, small()) as log:
        await log.append("one", b"1")

    def refuse(*_: object, **__: object) -> sqlite3.Connection:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
        raise error

    with monkeypatch.context() as failing:
        failing.setattr("sqlite3.connect", refuse)
        with pytest.raises(WriteFailedError, match=r"disk I/O error; if it is the catalogue .* move it away"):
            await Log(path, small()).open()
    path.rename(tmp_path / "away.db")
    async with Log(path, small()) as log:
        assert await payloads(log, "one") == [b"1"]


@pytest.mark.promise("sessions-outlive-faults")
@pytest.mark.parametrize("policy", POLICIES)
async def test_sessions_tell_that_the_disk_fails(tmp_path: Path, policy: WriteFailurePolicy) -> None:
    disk = FailingDisk()
    async with Log(tmp_path / "events.db", small(on_write_failure=policy), disk) as log, deadline():
        await log.sessions.open("first", b"1")
        disk.breaks()
        with pytest.raises((WriteFailedError, OSError)):
            await log.sessions.open("second", b"2")
        disk.mend()
        await log.sessions.open("third", b"3")
        await log.sessions.end("first")
        found = [await log.sessions.find(key) for key in ("first", "third")]
        assert [session.data if session else None for session in found] == [None, b"3"]
    async with Log(tmp_path / "events.db") as log:
        found = [await log.sessions.find(key) for key in ("first", "third")]
        assert [session.data if session else None for session in found] == [None, b"3"]


@pytest.mark.promise("loss-is-told")
async def test_what_a_store_could_not_write_to_the_end_is_lost_and_the_log_says_how_much(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FailingDisk()
    log = Log(tmp_path / "events.db", small(), disk)
    await log.append("one", b"durable")
    disk.breaks()
    for number in range(7):
        await log.append("one", b"%d" % number)
    caplog.set_level(logging.ERROR, "logstore")
    async with deadline():
        # The locks that closing takes are files, too.
        with contextlib.suppress(OSError):
            await log.close()
    assert "7 events were in memory only and are lost: [Errno 5] Input/output error" in caplog.text
    async with Log(tmp_path / "events.db") as log:
        assert await payloads(log, "one") == [b"durable"]


@pytest.mark.promise("tried-again")
async def test_a_failing_disk_is_tried_again_with_growing_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (commit._FIRST_RETRY_S, commit._LAST_RETRY_S) == (0.05, 5.0)
    monkeypatch.setattr(commit, "_FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(commit, "_LAST_RETRY_S", 0.008)
    pauses: list[float] = []
    start = Timers.start

    def note(timers: Timers, name: str, delay_s: float, action: Callable[[], None]) -> None:
        if name == "rewrite":
            pauses.append(delay_s)
        start(timers, name, delay_s, action)

    monkeypatch.setattr(Timers, "start", note)
    disk = FailingDisk()
    async with deadline(), Log(tmp_path / "events.db", small(), disk) as log:
        for _ in range(2):
            pauses.clear()
            disk.breaks()
            await log.append("one", b"")
            await eventually(lambda: len(pauses) > 6)
            disk.mend()
            await eventually(lambda: log.health().status == "ok")
            assert pauses == sorted(pauses)
            assert sorted(set(pauses)) == [0.001, 0.002, 0.004, 0.008]


@pytest.fixture(autouse=True)
def _no_unheard_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What the event loop reports as an exception nobody caught is a bug."""
    caplog.set_level(logging.CRITICAL, "logstore")
    yield
    unheard = [record for record in caplog.get_records("call") if record.name == "asyncio"]
    assert not unheard, [record.getMessage() for record in unheard]
