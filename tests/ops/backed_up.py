"""What the tests of backup and restore share: stores with known content, and a disk that dies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from logstore.ops.backup.create import BackupResult, create_backup
from logstore.ops.backup.pool import FolderTarget
from logstore.storage import Log, LogOptions
from logstore.storage.opening import OpenStore
from tests.engine import deadline, read_all, small
from tests.storage.disks import Fault, FaultyDisk

STREAMS = tuple(f"stream {number}" for number in range(4))
IN_JOURNALS = LogOptions(checkpoint_interval_s=3600)
"""Nothing goes to segments while the store is open."""

Contents = dict[str, list[tuple[int, bytes]]]


class DyingDisk(FaultyDisk):
    """A disk whose n-th call fails: alone, or with all that follow, as when the process died there."""

    def __init__(self, at: int, *, once: bool = False) -> None:
        super().__init__()
        self._at = at
        self._once = once

    @property
    def died(self) -> bool:
        """Whether there were so many calls."""
        return len(self.calls) >= self._at

    def _ask(self, kind: str, path: Path) -> Fault | None:
        self.calls.append((kind, path.name))
        place = len(self.calls)
        return Fault(kind) if place == self._at or (place > self._at and not self._once) else None


async def append(log: Log, count: int, first: int = 0, size: int = 400) -> None:
    """Append to all streams, one event each at a time."""
    async with deadline():
        for number in range(first, first + count):
            await log.append_many([(stream, f"{stream} {number} ".encode().ljust(size, b"."), 0) for stream in STREAMS])


def write(path: Path, count: int, first: int = 0, **options: Any) -> None:
    """Make a store, or go on with it, and close it."""

    async def run() -> None:
        async with Log(path, small(**options)) as log:
            await append(log, count, first)

    asyncio.run(run())


async def read(log: Log) -> Contents:
    """Return everything in a log."""
    return {stream: [(event.id, event.payload) for event in await read_all(log, stream)] for stream in STREAMS}


def contents(path: Path) -> Contents:
    """Open a store and return everything in it; it is healthy."""

    async def run() -> Contents:
        async with deadline(), Log(path) as log:
            assert log.health().status == "ok"
            return await read(log)

    return asyncio.run(run())


@contextlib.contextmanager
def opened(path: Path) -> Generator[OpenStore]:
    """Open a store as a command does."""
    store = OpenStore(FaultyDisk(), path, LogOptions().segment_bytes)
    try:
        yield store
    finally:
        store.close(empty=True)


def back_up(path: Path, folder: Path) -> BackupResult:
    """Back a store up, as a command does."""
    with opened(path) as store:
        return create_backup(store, FolderTarget(folder))


def every_call(limit: int = 2_000, start: int = 1, step: int = 1) -> Iterator[int]:
    """Count the calls of a disk that are to fail; the caller stops when there were fewer."""
    yield from range(start, limit, step)
    raise AssertionError(f"more than {limit} calls")


def snapshot(folder: Path) -> dict[str, str]:
    """Return name and digest of every file under a folder; locks apart, and the empty WAL of who only looked."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.stat().st_size and not file.name.endswith(("lock", "-shm"))
    }


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(bytes(data))
