"""Disks that stand behind the file door: one that fails as it is told, and one that a crash can happen to."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from logstore.storage.files import Disk, Lock

SECTOR_BYTES = 512


def open_descriptors() -> int:
    """Return how many files this process has open."""
    return len(list(Path("/dev/fd").iterdir()))


@dataclass
class Fault:
    """What goes wrong: the n-th call of a kind, once or from then on.

    Attributes:
        kind: Name of the `Disk` method.
        at: Which call of that kind fails, counted from 1 when the fault was set.
        error: The `errno`.
        name: Only calls on a path that holds this text count.
        written: A write stores so many bytes before it fails.
        from_then_on: Whether all later calls fail too, until `heal`.
    """

    kind: str
    at: int = 1
    error: int = errno.EIO
    name: str = ""
    written: int = 0
    from_then_on: bool = False
    seen: int = field(default=0, init=False)

    def hits(self, kind: str, path: Path) -> bool:
        """Count a call; tell whether it fails."""
        if kind != self.kind or self.name not in str(path):
            return False
        self.seen += 1
        return self.seen == self.at or (self.from_then_on and self.seen > self.at)


class FaultyDisk(Disk):
    """The real disk, but for the calls that were told to fail.

    Attributes:
        calls: What was asked for, in order: name of the method and of the file or folder.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self._faults: list[Fault] = []
        self._paths: dict[int, Path] = {}

    def fail(self, fault: Fault) -> None:
        """Set a fault."""
        self._faults.append(fault)

    def heal(self) -> None:
        """Work from now on."""
        self._faults.clear()

    def _ask(self, kind: str, path: Path) -> Fault | None:
        self.calls.append((kind, path.name))
        hits = [fault for fault in self._faults if fault.hits(kind, path)]
        return hits[0] if hits else None

    def _check(self, kind: str, path: Path) -> None:
        if (fault := self._ask(kind, path)) is not None:
            raise OSError(fault.error, os.strerror(fault.error), str(path))

    def create(self, path: Path) -> int:
        self._check("create", path)
        fd = super().create(path)
        self._paths[fd] = path
        return fd

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        self._check("open", path)
        fd = super().open(path, write=write, create=create)
        self._paths[fd] = path
        return fd

    def write(self, fd: int, data: bytes, offset: int) -> None:
        path = self._paths[fd]
        if (fault := self._ask("write", path)) is not None:
            super().write(fd, data[: fault.written], offset)
            raise OSError(fault.error, os.strerror(fault.error), str(path))
        super().write(fd, data, offset)

    def read(self, fd: int, length: int, offset: int) -> bytes:
        self._check("read", self._paths[fd])
        return super().read(fd, length, offset)

    def sync(self, fd: int) -> None:
        self._check("sync", self._paths[fd])
        super().sync(fd)

    def sync_folder(self, folder: Path) -> None:
        self._check("sync_folder", folder)
        super().sync_folder(folder)

    def rename(self, source: Path, target: Path) -> None:
        self._check("rename", target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._check("unlink", path)
        super().unlink(path)

    def lock(self, path: Path, *, shared: bool = False, wait: bool = False, create: bool = True) -> Lock | None:
        self._check("lock", path)
        return super().lock(path, shared=shared, wait=wait, create=create)


class CrashDisk(Disk):
    """One file in memory, which remembers what a crash could leave of it.

    Attributes:
        content: The file as the operating system shows it.
    """

    def __init__(self) -> None:
        self.content = bytearray()
        self._durable = b""
        # Of each sector written since the last sync, all the contents it had meanwhile.
        self._versions: dict[int, list[bytes]] = {}

    def create(self, path: Path) -> int:
        return 3

    def close(self, fd: int) -> None:
        pass

    def write(self, fd: int, data: bytes, offset: int) -> None:
        end = offset + len(data)
        if end > len(self.content):
            self.content.extend(bytes(end - len(self.content)))
        self.content[offset:end] = data
        for sector in range(offset // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
            start = sector * SECTOR_BYTES
            self._versions.setdefault(sector, []).append(bytes(self.content[start : start + SECTOR_BYTES]))

    def sync(self, fd: int) -> None:
        self._durable = bytes(self.content)
        self._versions.clear()

    def sync_folder(self, folder: Path) -> None:
        pass

    def crashes(self, rng: random.Random) -> Iterator[bytes]:
        """Yield, without end, what the disk may hold after a power cut at this moment.

        Every sector written since the last sync was kept, lost, zeroed or trashed on its own; the file's length is any
        between the synced one and the newest.
        """
        if not self._versions:
            while True:
                yield self._durable
        first, last = min(self._versions), max(self._versions)
        while True:
            # Mostly kept or mostly lost: even odds for hundreds of sectors would never leave a batch whole.
            odds = rng.choice((0.02, 0.2, 0.5, 0.9, 0.99))
            image = bytearray(self._durable.ljust(len(self.content), b"\0"))
            for sector in range(first, last + 1):
                versions = self._versions.get(sector)
                if versions is None:
                    continue
                place = slice(sector * SECTOR_BYTES, sector * SECTOR_BYTES + len(versions[-1]))
                if rng.random() < odds:
                    image[place] = versions[-1]
                else:
                    image[place] = self._fate(rng, versions, bytes(image[place]))
            shortest = len(self._durable)
            if rng.random() < 0.2:
                length = rng.randrange(shortest, len(image) + 1)
                del image[length:]
            yield bytes(image)

    @staticmethod
    def _fate(rng: random.Random, versions: list[bytes], before: bytes) -> bytes:
        fate = rng.randrange(4)
        if fate == 0:
            return before
        if fate == 1:
            return bytes(len(before))
        if fate == 2:
            return rng.randbytes(len(before))
        return rng.choice(versions)[: len(before)].ljust(len(before), b"\0")
