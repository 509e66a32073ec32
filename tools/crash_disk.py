"""A disk behind the file door whose power can be cut at any call.

It works on real files, as the system shows them, and keeps in memory what the device would have of them. What passes
the door is modelled in `crash_device`. Two things do not pass it:

- The **marks** of a lane are written through memory and never synced: any page that was ever seen may be left, and what
  says which boot it is of is changed, as after a boot.
- **SQLite** syncs what it commits, but for an index that is only being made. Its files are looked at before each call
  that changes something, unless another thread may be writing them at that moment; what was seen last is on the device.
  So an image has the catalogue as it was. It can also be left without what the last commits wrote, or altogether: more
  than a power cut may do, since a commit is synced before anything is done on its word, but the log is to restore that.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
from collections.abc import Callable, Generator, Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Final, Literal, NamedTuple, get_args

from crash_device import TORN, Device, File, FileState, Frozen
from crash_sync import SyncInTurn
from logstore.storage.files import Disk, Lock
from logstore.storage.lane import boot_id

_MARKS: Final = "marks"
_BOOT_AT: Final = slice(16, 32)
_WRITERS_LOCK: Final = "checkpoint.lock"
_UNFINISHED: Final = ".new"
_MOST_VERSIONS: Final = 50

CatalogueFate = Literal["kept", "torn", "older", "gone"]
"""What is left of the index: all of it; not all that its last commits wrote; an earlier state; nothing."""
CATALOGUE_FATES: Final[tuple[CatalogueFate, ...]] = get_args(CatalogueFate)


class Omitted(NamedTuple):
    """A sync that is acknowledged and not done, to see that its lack is found.

    Attributes:
        call: `sync` or `sync_folder`.
        name: Pattern of the last parts of the path: `*.journal`, `lanes/*/state`, `segments`.
    """

    call: Literal["sync", "sync_folder"]
    name: str


class _Plan:
    """A cut that is to come: before the n-th call of a kind on a path, both given by patterns."""

    def __init__(self, call: str, name: str, nth: int, then: Callable[[PowerCut], None]) -> None:
        self._call = call
        self._name = name
        self._left = nth
        self.then = then

    def is_due(self, call: str, path: Path) -> bool:
        """Count a call; tell whether the power goes before it."""
        if self._left and fnmatch(call, self._call) and PurePosixPath(path).match(self._name):
            self._left -= 1
            return not self._left
        return False


class _Version(NamedTuple):
    """The catalogue after a commit: the database, its write-ahead log, and how much of that is in the database too."""

    database: bytes
    wal: bytes | None
    folded: int


class PowerCut(NamedTuple):
    """What there was when the power went.

    Attributes:
        device: Everything that passed the door.
        catalogue: Path of the catalogue below the folder of the disk.
        versions: The catalogue as it was after each commit that was seen.
        call: How many changes there were before.
    """

    device: Frozen
    catalogue: str
    versions: list[_Version]
    call: int

    def leave(
        self, rng: random.Random, folder: Path, *, catalogue: CatalogueFate = "kept", torn: tuple[str, ...] = TORN
    ) -> Path:
        """Write one of the states that may be left to a folder that does not exist; return the catalogue's path.

        Args:
            rng: What is drawn from.
            folder: Where.
            catalogue: What becomes of the index, if there is one.
            torn: As of `Frozen.leave`.
        """
        self.device.leave(rng, folder, torn)
        for marks in folder.rglob(_MARKS):
            page = marks.read_bytes()
            if page[_BOOT_AT] == boot_id():
                marks.write_bytes(page[: _BOOT_AT.start] + rng.randbytes(16) + page[_BOOT_AT.stop :])
        path = folder / self.catalogue
        if path.exists() and self.versions:
            self._spoil(rng, path, catalogue)
        return path

    def _spoil(self, rng: random.Random, path: Path, fate: CatalogueFate) -> None:
        wal = path.with_name(f"{path.name}-wal")
        if fate == "gone":
            path.unlink()
            wal.unlink(missing_ok=True)
        elif fate == "older":
            version = rng.choice(self.versions)
            path.write_bytes(version.database)
            wal.unlink(missing_ok=True)
            if version.wal is not None:
                wal.write_bytes(version.wal)
        elif fate == "torn" and wal.exists():
            data, last = wal.read_bytes(), self.versions[-1]
            if last.wal == data and last.folded < len(data):
                cut = rng.randrange(last.folded, len(data))
                rest = len(data) - cut
                wal.write_bytes(data[:cut] + rng.choice((b"", bytes(rest), rng.randbytes(rest))))


class PowerDisk(Disk):
    """Works on the real files of a folder, and can say at any moment what a power cut would leave. For any threads.

    Args:
        home: Folder of the store: its catalogue, its log, its backups. What is there is on the device.
        catalogue: The store's catalogue.
        omit: Syncs that are not done.
        device: What is on the device, if that is not all.

    Attributes:
        home: The folder.
        calls: How many changes were asked for.
        made: What they were: the call, and the path.
        on_sync: Called with the path of each file that was synced.
    """

    def __init__(
        self, home: Path, catalogue: Path, omit: Iterable[Omitted] = (), *, device: Device | None = None
    ) -> None:
        self.home = home
        self.calls = 0
        self.made: list[tuple[str, Path]] = []
        self.on_sync: Callable[[Path], None] = lambda path: None
        self._mutex = threading.RLock()
        self._catalogue = catalogue
        self._omit = tuple(omit)
        self._device = device or Device(home, _MARKS)
        self._opened: dict[int, tuple[File, Path]] = {}
        self._plans: list[_Plan] = []
        self._writers: list[tuple[Lock, int]] = []
        self._databases = {path for path in home.rglob("*.db*") if _is_database(path)}
        self._seen: dict[Path, tuple[object, ...]] = {}
        self._versions: list[_Version] = []
        with self._mutex:
            self._observe()

    # The power.

    def cut_at(self, nth: int, then: Callable[[PowerCut], None], call: str = "*", name: str = "*") -> None:
        """Cut the power before a change to come; the disk works on all the same.

        Args:
            nth: Before which of them, counted from 1.
            then: Called in the thread that asked for the change, with nobody else at the disk.
            call: Pattern of the kind of change: `sync`, `sync_folder`, `create`, `write`, `rename`, `unlink`, …
            name: Pattern of the last parts of its path.
        """
        self._plans.append(_Plan(call, name, nth, then))

    def cancel_cuts(self) -> None:
        """Forget the cuts that are still to come."""
        with self._mutex:
            self._plans.clear()

    def cut(self) -> PowerCut:
        """Return what there is when the power goes now."""
        with self._mutex:
            self._observe()
            return self._power_cut()

    def killed(self, home: Path) -> PowerDisk:
        """Return a disk with everything that the system shows, as if all processes had been killed just now.

        The device has what it has here. The caller sees to it that no other thread writes with SQLite.
        """
        with self._mutex:
            self._observe()
            shutil.copytree(self.home, home, ignore=shutil.ignore_patterns("*-shm"))
            catalogue = home / self._catalogue.relative_to(self.home)
            return PowerDisk(home, catalogue, self._omit, device=self._device.copy(home))

    def _power_cut(self) -> PowerCut:
        self._see_marks()
        name = str(self._catalogue.relative_to(self.home))
        return PowerCut(self._device.freeze(), name, self._versions.copy(), self.calls)

    @contextlib.contextmanager
    def _changing(self, call: str, path: Path) -> Generator[None]:
        """Keep the others out for one change, before which the power may go."""
        with self._mutex:
            self._observe()
            self.calls += 1
            self.made.append((call, path))
            for plan in list(self._plans):
                if plan.is_due(call, path):
                    plan.then(self._power_cut())
            yield

    # What does not pass the door.

    def _see_marks(self) -> None:
        for path, file in self._device.files_named(_MARKS):
            page = path.read_bytes()
            if file.versions is not None and page not in file.versions:
                file.versions.append(page)

    def _observe(self) -> None:
        """Take up what SQLite did since the last look."""
        self._writers = [(lock, thread) for lock, thread in self._writers if lock.fd >= 0]
        if any(thread != threading.get_ident() for _, thread in self._writers):
            return
        for path in sorted(self._databases):
            seen = _signature(path)
            if seen != self._seen.get(path):
                self._take_up(path, seen)

    def _take_up(self, path: Path, seen: tuple[object, ...]) -> None:
        before = self._seen.get(path)
        self._seen[path] = seen
        if path.name.endswith(_UNFINISHED):
            # Made without syncs, until it is whole.
            return
        database = self._device.find(path)
        assert isinstance(database, File)
        if before is None or before[0] != seen[0]:
            database.state = FileState(path.read_bytes())
        wal_path = path.with_name(f"{path.name}-wal")
        wal = wal_path.read_bytes() if seen[1] is not None else None
        known = self._device.find(wal_path)
        if isinstance(known, File):
            # A log that is gone was folded into the database, whole. It may come back, but not as it was seen last:
            # its first commits without the later ones would undo these.
            known.state = FileState(wal or b"")
        if wal is None:
            self._device.remove(wal_path)
        elif known is None:
            self._device.put(wal_path, self._device.new_file(wal_path.name, wal))
            # SQLite syncs the folder of a log that it begins.
            self._device.sync_folder(path.parent)
        if path == self._catalogue:
            self._add_version(path.read_bytes(), wal)

    def _add_version(self, database: bytes, wal: bytes | None) -> None:
        last = self._versions[-1] if self._versions else _Version(b"", None, 0)
        folded = last.folded
        if wal is None or (last.wal is not None and wal[:32] != last.wal[:32]):
            folded = 0
        elif database != last.database:
            folded = len(wal)
        self._versions.append(_Version(database, wal, folded))
        del self._versions[:-_MOST_VERSIONS]

    def _move_database(self, source: Path, target: Path) -> None:
        if source not in self._databases:
            return
        self._databases.discard(source)
        self._databases.add(target)
        self._seen.pop(source, None)
        if target == self._catalogue and source.parent != target.parent:
            # That of a restored store, which knows nothing of the one before.
            self._versions.clear()
        # What is on the device of it its own sync has brought there, or nobody.
        self._seen[target] = (_signature(target)[0], None)
        if target == self._catalogue:
            self._add_version(target.read_bytes(), None)

    # The door.

    def create(self, path: Path) -> int:
        """Create a file, as `Disk` does."""
        if not self._device.holds(path):
            fd = super().create(path)
            self._opened.pop(fd, None)
            return fd
        with self._changing("create", path):
            fd = super().create(path)
            self._put(fd, path)
            return fd

    def _put(self, fd: int, path: Path) -> None:
        file = self._device.new_file(path.name)
        self._device.put(path, file)
        self._opened[fd] = file, path
        if _is_database(path):
            self._databases.add(path)
            self._seen[path] = _signature(path)

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        """Open a file, as `Disk` does."""
        with self._mutex:
            if not self._device.holds(path):
                fd = super().open(path, write=write, create=create)
                # A lock that was let go of had this number, and did not tell.
                self._opened.pop(fd, None)
                return fd
            if create and not path.exists():
                with self._changing("create", path):
                    fd = super().open(path, write=write, create=create)
                    self._put(fd, path)
                    return fd
            fd = super().open(path, write=write, create=create)
            found = self._device.find(path)
            if isinstance(found, File):
                self._opened[fd] = found, path
            return fd

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        with self._mutex:
            self._opened.pop(fd, None)
            super().close(fd)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """Write to the file, in the model and for real."""
        if fd not in self._opened:
            super().write(fd, data, offset)
            return
        file, path = self._opened[fd]
        with self._changing("write", path):
            super().write(fd, data, offset)
            file.state.write(data, offset)
            if file.versions is not None:
                self._see_marks()

    def extend(self, fd: int, length: int) -> None:
        """Make a file longer."""
        file, path = self._opened[fd]
        if self.size(fd) < length:
            with self._changing("extend", path):
                super().extend(fd, length)
                file.state.extend(length)

    def shorten(self, fd: int, length: int) -> None:
        """Cut a file off."""
        if fd not in self._opened:
            super().shorten(fd, length)
            return
        file, path = self._opened[fd]
        with self._changing("shorten", path):
            super().shorten(fd, length)
            file.state.shorten(length)

    def allocate(self, fd: int, length: int) -> None:
        """Take the blocks of a file."""
        file, path = self._opened[fd]
        with self._changing("allocate", path):
            super().allocate(fd, length)
            file.state.extend(length)

    def sync(self, fd: int) -> None:
        """Bring the file to the device, in the model; the real one is spared."""
        if fd not in self._opened:
            return
        file, path = self._opened[fd]
        with self._changing("sync", path):
            self._see_marks()
            if not self._is_omitted("sync", path):
                if path in self._databases:
                    file.state = FileState(path.read_bytes())
                file.state.sync()
            self.on_sync(path)

    def kernel_sync(self) -> SyncInTurn:
        """Return what has the loop do `sync`, some time after it was asked for."""
        return SyncInTurn(self.sync)

    def forget_cache(self, fd: int) -> None:
        """Do nothing: what the system shows is what was written."""

    def sync_folder(self, folder: Path) -> None:
        """Bring the folder's entries to the device, in the model."""
        if folder != self.home and not self._device.holds(folder):
            return
        with self._mutex:
            self._device.look(folder)
            with self._changing("sync_folder", folder):
                if not self._is_omitted("sync_folder", folder):
                    self._device.sync_folder(folder)

    def make_folder(self, folder: Path) -> None:
        """Make a folder, as `Disk` does."""
        if self._device.holds(folder) and not folder.is_dir():
            self.make_folder(folder.parent)
            with self._mutex:
                # One that was here is gone, and its like not the same.
                self._device.remove(folder)
        super().make_folder(folder)

    def rename(self, source: Path, target: Path) -> None:
        """Rename, as `Disk` does."""
        with self._changing("rename", target):
            super().rename(source, target)
            self._device.move(source, target)
            self._move_database(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file, as `Disk` does."""
        with self._changing("unlink", path):
            super().unlink(path)
            self._device.remove(path)
            self._databases.discard(path)
            self._seen.pop(path, None)

    def lock(self, path: Path, *, shared: bool = False, wait: bool = False, create: bool = True) -> Lock | None:
        """Take a lock, and note whose the one is that SQLite is written under."""
        lock = super().lock(path, shared=shared, wait=wait, create=create)
        if lock is not None and path.name == _WRITERS_LOCK:
            with self._mutex:
                self._writers.append((lock, threading.get_ident()))
        return lock

    def _is_omitted(self, call: str, path: Path) -> bool:
        below = PurePosixPath(path)
        return any(each.call == call and below.match(each.name) for each in self._omit)


def _is_database(path: Path) -> bool:
    """Whether SQLite writes a file: the catalogue, one that is being made, one that was put aside."""
    return ".db" in path.name and not path.name.endswith(("-wal", "-shm"))


def _signature(path: Path) -> tuple[object, ...]:
    """Return what changes when SQLite writes a database: of its file, and of its write-ahead log, None when empty."""
    found: list[object] = []
    for each in (path, path.with_name(f"{path.name}-wal")):
        try:
            status = each.stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns) if status.st_size else None)
    return tuple(found)
