"""Syncs that the kernel does beside the process, and what the group commit makes of them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from crash_sync import SyncInTurn
from logstore.errors import WriteFailedError
from logstore.storage import Log, LogOptions, commit
from logstore.storage.files import Disk
from logstore.storage.kernel_sync import Done, KernelSync, error_of
from tests.engine import deadline, eventually, payloads, small
from tests.storage.disks import Fault, FaultyDisk, open_descriptors

NEVER_S = 1e9


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture
def kernel_sync() -> Iterator[KernelSync]:
    try:
        made = KernelSync()
    except OSError as error:
        pytest.skip(f"this system has none: {error}")
    with closing(made):
        yield made


async def synced(kernel_sync: KernelSync, fd: int) -> OSError | None:
    ended: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    assert kernel_sync.start(fd, "the file", ended.set_result)
    return await ended


# The kernel's.


async def test_syncs_end_well_one_after_another(tmp_path: Path, kernel_sync: KernelSync) -> None:
    kernel_sync.bind(asyncio.get_running_loop())
    with (tmp_path / "file").open("wb") as file:
        for number in range(20):
            os.write(file.fileno(), b"%d" % number)
            assert await synced(kernel_sync, file.fileno()) is None


async def test_what_cannot_be_synced_so_is_told(kernel_sync: KernelSync) -> None:
    kernel_sync.bind(asyncio.get_running_loop())
    reading, writing = os.pipe()
    try:
        assert not kernel_sync.start(writing, "a pipe", lambda _: None)
        # Nor anything else from then on.
        assert not kernel_sync.start(reading, "a pipe", lambda _: None)
    finally:
        os.close(reading)
        os.close(writing)


def test_a_loop_hears_of_a_sync_that_an_earlier_one_began(tmp_path: Path, kernel_sync: KernelSync) -> None:
    ended: list[OSError | None] = []

    async def begin() -> None:
        kernel_sync.bind(asyncio.get_running_loop())
        assert kernel_sync.start(fd, "the file", ended.append)

    async def hear() -> None:
        kernel_sync.bind(asyncio.get_running_loop())
        await eventually(lambda: ended)

    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        # The first loop may still hear of it, in the turns that it takes at its end.
        asyncio.run(begin())
        asyncio.run(hear())
    finally:
        os.close(fd)
    assert ended == [None]


def test_an_error_that_the_kernel_tells_names_file_and_reason() -> None:
    error = error_of(-errno.EIO, "the file")
    assert isinstance(error, OSError)
    assert (error.errno, error.filename) == (errno.EIO, "the file")
    assert error_of(0, "the file") is None


def test_it_gives_back_what_it_took(kernel_sync: KernelSync) -> None:
    before = open_descriptors()
    KernelSync().close()
    assert open_descriptors() == before


def test_a_disk_with_a_sync_of_its_own_syncs_in_no_other_way(kernel_sync: KernelSync) -> None:
    assert FaultyDisk().kernel_sync() is None
    real = Disk().kernel_sync()
    assert real is not None
    real.close()


async def test_a_store_gives_back_what_it_took(path: Path) -> None:
    before = open_descriptors()
    async with deadline(), Log(path) as log:
        for number in range(5):
            await log.append("s", b"%d" % number)
    assert open_descriptors() == before


# What the group commit makes of it.


class Beside(FaultyDisk):
    """A disk that fails as it is told, whose syncs of journals end when a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = SyncInTurn(self.sync)

    def kernel_sync(self) -> SyncInTurn:
        return self.beside


def unhurried(**options: Any) -> LogOptions:
    return small(checkpoint_interval_s=NEVER_S, **options)


def journal_calls(disk: FaultyDisk) -> list[str]:
    return [kind for kind, name in disk.calls if name.endswith(".journal")]


@pytest.mark.promise("visible-when-acknowledged", "one-sync-for-all")
async def test_nothing_is_seen_or_written_before_the_sync_has_ended_which_all_others_share(path: Path) -> None:
    disk = Beside()
    async with deadline(), Log(path, unhurried(), disk) as log, Log(path, small()) as other:
        await log.append("s", b"first")
        disk.beside.is_held = True
        appending = [asyncio.create_task(log.append("s", b"second"))]
        await eventually(lambda: disk.beside.begun)
        disk.calls.clear()
        appending += [asyncio.create_task(log.append("s", b"%d" % number)) for number in range(50)]
        for _ in range(5):
            await asyncio.sleep(0)
            assert await payloads(log, "s") == await payloads(other, "s") == [b"first"]
        assert journal_calls(disk) == []
        assert log.health().status == "ok"
        disk.beside.let_go()
        await asyncio.gather(*appending)
        assert journal_calls(disk) == ["sync", "write", "sync"]
        everything = [b"first", b"second", *(b"%d" % number for number in range(50))]
        assert await payloads(log, "s") == await payloads(other, "s") == everything


async def test_with_interval_nothing_is_written_beside_a_sync_either(path: Path) -> None:
    disk = Beside()
    async with deadline(), Log(path, unhurried(durability="interval", sync_interval_s=0.01), disk) as log:
        await log.append("s", b"first")
        disk.beside.is_held = True
        begun = disk.beside.begun
        await log.append("s", b"second")
        await eventually(lambda: disk.beside.begun > begun)
        disk.calls.clear()
        appending = asyncio.create_task(log.append("s", b"third"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert journal_calls(disk) == []
        disk.beside.let_go()
        await appending
        assert await payloads(log, "s") == [b"first", b"second", b"third"]


@pytest.mark.promise("failed-file-given-up")
@pytest.mark.parametrize("policy", ["degrade", "raise"])
async def test_a_file_whose_sync_failed_in_the_kernel_is_given_up(path: Path, policy: Any) -> None:
    disk = Beside()
    async with deadline(), Log(path, unhurried(on_write_failure=policy), disk) as log:
        await log.append("s", b"first")
        disk.fail(Fault("sync", name="0000000001.journal"))
        if policy == "raise":
            with pytest.raises(WriteFailedError, match=r"0000000001\.journal"):
                await log.append("s", b"second")
        else:
            await log.append("s", b"second")
        await eventually(lambda: log.health().status == "ok")
        await log.append("s", b"third")
    kinds = [(kind, name) for kind, name in disk.calls if name == "0000000001.journal"]
    async with Log(path) as log:
        kept = [b"second"] if policy == "degrade" else []
        assert await payloads(log, "s") == [b"first", *kept, b"third"]
    # Of the first event, and the one that failed.
    assert kinds.count(("sync", "0000000001.journal")) == 2


async def test_closing_waits_for_a_sync_and_for_what_is_queued_behind_it(path: Path) -> None:
    disk = Beside()
    async with deadline():
        log = Log(path, unhurried(), disk)
        await log.append("s", b"first")
        disk.beside.is_held = True
        appending = [asyncio.create_task(log.append("s", b"%d" % number)) for number in range(3)]
        await eventually(lambda: disk.beside.begun)
        closing_it = asyncio.create_task(log.close())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not closing_it.done()
        disk.beside.let_go()
        await asyncio.gather(closing_it, *appending)
    async with Log(path) as log:
        assert await payloads(log, "s") == [b"first", b"0", b"1", b"2"]


@pytest.mark.parametrize("hears", [True, False])
def test_an_event_whose_loop_ended_in_its_sync_is_stored_on_the_next_whether_that_hears_of_it_or_not(
    path: Path, hears: bool
) -> None:
    disk = Beside()
    log = Log(path, unhurried(), disk)

    async def begin() -> None:
        await log.append("s", b"first")
        disk.beside.is_held = True
        task = asyncio.create_task(log.append("s", b"second"))
        await eventually(lambda: disk.beside.begun)
        task.cancel()

    async def go_on() -> list[bytes]:
        async with deadline(), log:
            disk.beside.is_held = False
            await log.append("s", b"third")
            return await payloads(log, "s")

    asyncio.run(begin())
    disk.beside.watches = hears
    assert asyncio.run(go_on()) == [b"first", b"second", b"third"]


class Refusing(SyncInTurn):
    """Takes no sync."""

    def start(self, fd: int, path: str, done: Done) -> bool:
        self.begun += 1
        return False


async def test_where_the_kernel_takes_none_the_thread_syncs(path: Path) -> None:
    disk = Beside()
    disk.beside = Refusing(disk.sync)
    async with deadline(), Log(path, unhurried(), disk) as log:
        for number in range(4):
            await log.append("s", b"%d" % number)
        assert len(await payloads(log, "s")) == 4
    assert disk.beside.begun == 1
    assert journal_calls(disk)[:10].count("sync") >= 4


async def test_a_loop_that_watches_no_descriptors_has_the_thread_sync(path: Path) -> None:
    disk = Beside()
    disk.beside.watches = False
    async with deadline(), Log(path, unhurried(), disk) as log:
        await log.append("s", b"first")
        await log.append("s", b"second")
        assert await payloads(log, "s") == [b"first", b"second"]
    assert disk.beside.begun == 0


class OneThread(FaultyDisk):
    """A disk that remembers the threads which wrote to journals."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []

    def write(self, fd: int, data: bytes, offset: int) -> None:
        if self._paths[fd].suffix == ".journal":
            self.threads.append(threading.get_ident())
        super().write(fd, data, offset)


@pytest.mark.parametrize(("size", "here"), [(700, True), (300 << 10, False)])
async def test_the_loop_writes_what_is_small_and_the_thread_what_would_keep_it(
    path: Path, size: int, here: bool
) -> None:
    disk = OneThread()
    async with deadline(), Log(path, LogOptions(checkpoint_interval_s=NEVER_S), disk) as log:
        await log.append("s", b"makes the file")
        disk.threads.clear()
        await log.append("s", bytes(size))
        assert [thread == threading.get_ident() for thread in disk.threads] == [here]


# What raises in the middle.


class SignalError(BaseException):
    """What a signal's handler raises, wherever the program is."""


class Interrupting(FaultyDisk):
    """A disk in whose next write to a journal a signal comes: the write is done, and what called it is broken off."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = False

    def write(self, fd: int, data: bytes, offset: int) -> None:
        super().write(fd, data, offset)
        if self.armed and self._paths[fd].suffix == ".journal":
            self.armed = False
            raise SignalError


class InterruptedSync(KernelSync):
    """Breaks off once, before a system call of a kind or after it."""

    def __init__(self, call: str, after: bool, error: BaseException) -> None:
        self.armed = False
        super().__init__()
        self._number = getattr(self._numbers, call)
        self._after = after
        self._error = error

    def _call(self, number: int, *arguments: Any) -> None:
        hit = self.armed and number == self._number
        if hit and not self._after:
            self.armed = False
            raise self._error
        super()._call(number, *arguments)
        if hit:
            self.armed = False
            raise self._error


class WithSync(FaultyDisk):
    """A disk with a sync beside the process that a test has made."""

    def __init__(self, made: KernelSync) -> None:
        super().__init__()
        self.made = made

    def kernel_sync(self) -> KernelSync:
        return self.made


def goes_on_after_a_signal(path: Path, disk: FaultyDisk, arm: Callable[[], None], **options: Any) -> None:
    """Have a signal break off an append, go on, and check that nothing acknowledged is missing, then or later."""
    log = Log(path, unhurried(**options), disk)
    acknowledged: list[bytes] = []

    async def append(first: int, count: int) -> None:
        async with deadline():
            for number in range(first, first + count):
                await log.append("s", b"%d" % number)
                acknowledged.append(b"%d" % number)

    async def look() -> None:
        async with deadline():
            await eventually(lambda: log.health().status == "ok")
            assert [each for each in await payloads(log, "s") if each in acknowledged] == acknowledged
            await log.close()

    with asyncio.Runner() as runner:
        runner.run(append(0, 3))
        arm()
        loop = runner.get_loop()
        task = loop.create_task(append(3, 3))
        with contextlib.suppress(SignalError):
            loop.run_until_complete(task)
        runner.run(append(10, 3))
        runner.run(look())
        if not task.done():
            task.cancel()

    async def left() -> None:
        async with Log(path) as again:
            assert [each for each in await payloads(again, "s") if each in acknowledged] == acknowledged

    asyncio.run(left())


@pytest.mark.promise("order", "no-hole-passed-over")
@pytest.mark.parametrize("durability", ["always", "interval", "os"])
def test_a_signal_in_a_write_loses_nothing(path: Path, durability: Any) -> None:
    disk = Interrupting()

    def arm() -> None:
        disk.armed = True

    goes_on_after_a_signal(path, disk, arm, durability=durability)
    assert not disk.armed


@pytest.mark.promise("order", "no-hole-passed-over")
@pytest.mark.parametrize("error", [SignalError(), OSError(errno.EINVAL, "no such call")], ids=["signal", "error"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", ["submit", "events"])
def test_what_breaks_off_a_call_of_the_kernel_loses_nothing(
    path: Path, kernel_sync: KernelSync, call: str, after: bool, error: BaseException
) -> None:
    made = InterruptedSync(call, after, error)

    def arm() -> None:
        made.armed = True

    goes_on_after_a_signal(path, WithSync(made), arm)
    assert not made.armed


@pytest.mark.promise("order", "no-hole-passed-over")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_signal_in_the_sync_of_an_interval_loses_nothing(path: Path, kernel_sync: KernelSync, after: bool) -> None:
    made = InterruptedSync("submit", after, SignalError())
    log = Log(path, unhurried(durability="interval", sync_interval_s=0.05), WithSync(made))

    async def begin() -> None:
        # The first goes through the queue, and is synced.
        await log.append("s", b"first")
        await log.append("s", b"second")
        made.armed = True
        await eventually(lambda: not made.armed)

    async def go_on() -> list[bytes]:
        async with deadline(), log:
            await log.append("s", b"third")
            return await payloads(log, "s")

    with asyncio.Runner() as runner:
        with contextlib.suppress(SignalError):
            runner.get_loop().run_until_complete(begin())
        assert runner.run(go_on()) == [b"first", b"second", b"third"]
    assert not made.armed


def test_what_the_thread_began_for_one_loop_is_ended_on_the_next(path: Path) -> None:
    log = Log(path, unhurried())

    async def begin() -> None:
        await log.open()
        # Makes the file, in the thread.
        asyncio.create_task(log.append("s", b"first")).add_done_callback(lambda _: None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def go_on() -> list[bytes]:
        async with deadline(), log:
            await log.append("s", b"second")
            return await payloads(log, "s")

    asyncio.run(begin())
    assert asyncio.run(go_on())[-1:] == [b"second"]


async def test_once_a_write_has_kept_the_loop_waiting_the_thread_writes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = OneThread()
    async with deadline(), Log(path, LogOptions(checkpoint_interval_s=NEVER_S), disk) as log:
        await log.append("s", b"makes the file")
        monkeypatch.setattr(commit, "_SLOW_WRITE_S", -1.0)
        disk.threads.clear()
        await log.append("s", b"here")
        await log.append("s", b"there")
        assert [thread == threading.get_ident() for thread in disk.threads] == [True, False]


async def test_a_context_with_an_end_in_it_goes_to_nobody(tmp_path: Path, kernel_sync: KernelSync) -> None:
    made = KernelSync()
    ended: list[OSError | None] = []
    with (tmp_path / "file").open("wb") as file:
        made.bind(asyncio.get_running_loop())
        assert made.start(file.fileno(), "the file", ended.append)
        made.close()
        made.close()
        (told,) = ended
        assert isinstance(told, OSError)
        assert not made.start(file.fileno(), "the file", ended.append)
        following = KernelSync()
        following.bind(asyncio.get_running_loop())
        assert await synced(following, file.fileno()) is None
        following.close()
