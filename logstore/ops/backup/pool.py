"""Where backups are kept: whole files under keys, behind a seam that an object store can stand behind too.

```
objects/3f/3fa9…                       a file's bytes, named by their SHA-256
20261123T101530.123456Z.backup.json    a manifest: which objects make a store
```
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

from logstore.errors import LogstoreError, StoreLockedError
from logstore.storage.files import Disk, Lock, lock_holders

READ_BYTES: Final = 1 << 20
MANIFEST_SUFFIX: Final = ".backup.json"
_OBJECTS: Final = "objects"
_TEMPORARY: Final = ".tmp"
_LOCK: Final = "pool.lock"
_POLL_S: Final = 0.01
_PATIENCE_S: Final = 30.0
_SHORT_PATIENCE_S: Final = 1.0
"""Rotation can wait for another day."""


class Target(Protocol):
    """A place for backups. Its methods block, and raise OSError when the place refuses."""

    def locate(self, key: str) -> str:
        """Return where a key is, for people, and to be given to `restore`."""
        ...

    def put(self, key: str, pieces: Iterable[bytes]) -> None:
        """Store bytes under a key, whole or not at all: an error of `pieces` leaves nothing. Durable after `sync`."""
        ...

    def sync(self) -> None:
        """Return when everything that is there is there durably."""
        ...

    def read(self, key: str) -> Iterator[bytes]:
        """Yield what a key holds, piece by piece.

        Raises:
            FileNotFoundError: There is no such key.
        """
        ...

    def size(self, key: str) -> int | None:
        """Return how many bytes a key holds, None when there is no such key."""
        ...

    def manifests(self) -> list[str]:
        """Return the keys of all manifests, oldest first."""
        ...

    def objects(self) -> Iterator[str]:
        """Yield the keys of all objects, in no order."""
        ...

    def delete(self, key: str) -> None:
        """Remove a key; one that is gone already is no error. Durable after `sync`."""
        ...

    def remove_unfinished(self) -> None:
        """Remove what interrupted calls of `put` left; nobody else may use the place."""
        ...

    def adding(self) -> contextlib.AbstractContextManager[None]:
        """Keep out who removes, as long as the block lasts: what is there is relied on.

        Raises:
            StoreLockedError: Somebody is removing, and does not get on.
        """
        ...

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """As `adding`, for who writes nothing; also works where nothing can be written."""
        ...

    def removing(self) -> contextlib.AbstractContextManager[None]:
        """Keep everybody out as long as the block lasts.

        Raises:
            StoreLockedError: Somebody is there, and does not leave.
        """
        ...


def object_key(digest: str) -> str:
    """Return the key of the object with a SHA-256."""
    return f"{_OBJECTS}/{digest[:2]}/{digest}"


def verified(pieces: Iterable[bytes], digest: str, what: str) -> Iterator[bytes]:
    """Yield the pieces, and raise behind the last one when their SHA-256 is another.

    Raises:
        OtherBytesError: After all pieces.
    """
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
        yield piece
    if found.hexdigest() != digest:
        raise OtherBytesError(f"{what} has other bytes than it was written with")


class OtherBytesError(LogstoreError):
    """Bytes do not have the SHA-256 that they should have."""


def default_backups(path: Path) -> Path:
    """Return the folder for backups of a store: `events-backups` beside `events.db`."""
    return path.parent / f"{path.stem}-backups"


class FolderTarget:
    """A folder for backups, made when the first one is.

    Args:
        folder: The folder; private, since a backup holds what the store holds.
        disk: The file door.
    """

    def __init__(self, folder: Path, disk: Disk | None = None) -> None:
        self.folder = folder
        self._disk = disk or Disk()

    def locate(self, key: str) -> str:
        """Return the path of a key."""
        return str(self.folder / key)

    def put(self, key: str, pieces: Iterable[bytes]) -> None:
        """Write beside the place, sync, rename; the folder's entry is durable after `sync`."""
        path = self.folder / key
        disk = self._disk
        disk.make_folder(path.parent)
        # Two backups at once may bring the same object: each writes a file of its own.
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{_TEMPORARY}")
        fd = disk.create(temporary)
        try:
            try:
                offset = 0
                for piece in pieces:
                    disk.write(fd, piece, offset)
                    offset += len(piece)
                disk.sync(fd)
            finally:
                disk.close(fd)
            disk.rename(temporary, path)
        except BaseException:
            # On a full disk half a file that nobody reads would be in the way of everything else.
            with contextlib.suppress(OSError):
                disk.unlink(temporary)
            raise

    def sync(self) -> None:
        """Sync all folders: also those of objects that an earlier backup left and did not live to sync."""
        for folder in self._object_folders():
            self._disk.sync_folder(folder)
        if self.folder.is_dir():
            self._disk.sync_folder(self.folder)

    def read(self, key: str) -> Iterator[bytes]:
        """Yield a file's bytes, a mebibyte at a time."""
        return read_pieces(self._disk, self.folder / key)

    def size(self, key: str) -> int | None:
        """Return a file's length."""
        try:
            return (self.folder / key).stat().st_size
        except FileNotFoundError:
            return None

    def manifests(self) -> list[str]:
        """Return the names of the manifests, which sort by time."""
        return sorted(name for name in self._disk.list(self.folder) if name.endswith(MANIFEST_SUFFIX))

    def objects(self) -> Iterator[str]:
        """Yield the keys of all files under `objects/`."""
        for folder in self._object_folders():
            for name in self._disk.list(folder):
                if not name.endswith(_TEMPORARY):
                    yield f"{_OBJECTS}/{folder.name}/{name}"

    def _object_folders(self) -> list[Path]:
        objects = self.folder / _OBJECTS
        return [objects / name for name in sorted(self._disk.list(objects))]

    def delete(self, key: str) -> None:
        """Unlink a file."""
        self._disk.unlink(self.folder / key)

    def remove_unfinished(self) -> None:
        """Unlink the temporary files."""
        for folder in (self.folder, *self._object_folders()):
            for name in self._disk.list(folder):
                if name.endswith(_TEMPORARY):
                    self._disk.unlink(folder / name)

    @contextlib.contextmanager
    def adding(self) -> Generator[None]:
        """Share the `flock` of the folder's `pool.lock`."""
        self._disk.make_folder(self.folder)
        with wait_for_lock(self._disk, self.folder / _LOCK, shared=True):
            yield

    @contextlib.contextmanager
    def reading(self) -> Generator[None]:
        """Share the lock, if there is one: nobody removes anything from a copy that lacks it, or is read-only."""
        with contextlib.ExitStack() as held:
            with contextlib.suppress(FileNotFoundError):
                held.enter_context(wait_for_lock(self._disk, self.folder / _LOCK, shared=True, create=False))
            yield

    @contextlib.contextmanager
    def removing(self) -> Generator[None]:
        """Hold the lock alone."""
        self._disk.make_folder(self.folder)
        with wait_for_lock(self._disk, self.folder / _LOCK, shared=False, patience_s=_SHORT_PATIENCE_S):
            yield


def wait_for_lock(
    disk: Disk, path: Path, *, shared: bool, create: bool = True, patience_s: float | None = None
) -> Lock:
    """Return a lock when whoever is in the way lets go.

    Raises:
        StoreLockedError: They do not in time.
        FileNotFoundError: There is no such file, and none may be made.
    """
    deadline = time.monotonic() + (_PATIENCE_S if patience_s is None else patience_s)
    while (lock := disk.lock(path, shared=shared, create=create)) is None:
        if time.monotonic() > deadline:
            pids = lock_holders(path)
            raise StoreLockedError(f"{path.parent} is in use by process {pids}; try again when it is done", pids)
        time.sleep(_POLL_S)
    return lock


def read_pieces(disk: Disk, path: Path, length: int | None = None) -> Iterator[bytes]:
    """Yield a file's bytes, a mebibyte at a time; with `length` no more than its first so many."""
    fd = disk.open(path)
    try:
        end = disk.size(fd) if length is None else length
        offset = 0
        while offset < end and (piece := disk.read(fd, min(READ_BYTES, end - offset), offset)):
            yield piece
            offset += len(piece)
    except OSError as error:
        # Of a descriptor the system does not say which file it is.
        error.filename = error.filename or str(path)
        raise
    finally:
        disk.close(fd)
