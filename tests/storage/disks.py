"""Disks that stand behind the file door: one that fails as it is told, and one file that a crash can happen to."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from crash_device import FileState
from logstore.storage.files import Disk, Lock


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
        self._state = FileState()

    def create(self, path: Path) -> int:
        return 3

    def close(self, fd: int) -> None:
        pass

    def write(self, fd: int, data: bytes, offset: int) -> None:
        end = offset + len(data)
        if end > len(self.content):
            self.content.extend(bytes(end - len(self.content)))
        self.content[offset:end] = data
        self._state.write(data, offset)

    def sync(self, fd: int) -> None:
        self._state.sync()

    def sync_folder(self, folder: Path) -> None:
        pass

    def crashes(self, rng: random.Random) -> Iterator[bytes]:
        """Yield, without end, what the disk may hold after a power cut at this moment."""
        while True:
            yield self._state.after_cut(rng, torn=True)


class HeldDisk(Disk):
    """The real disk, on which a sync of a journal takes as long as a test wants.

    Attributes:
        syncs: How many have begun.
    """

    def __init__(self) -> None:
        self._journals: set[int] = set()
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self.syncs = 0

    def hold(self) -> None:
        """Let no sync end from here on."""
        self._may_go_on.clear()

    def let_go(self) -> None:
        """Let them end."""
        self._may_go_on.set()

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self._journals.discard(fd)
        if path.suffix == ".journal":
            self._journals.add(fd)
        return fd

    def sync(self, fd: int) -> None:
        if fd in self._journals:
            self.syncs += 1
            self._may_go_on.wait()
        super().sync(fd)
