"""The one door to the operating system.

Everything the engine reads from or writes to disk, SQLite's own files apart, goes through a `Disk`. Tests put a disk
behind it that fails, or that forgets what was not synced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import sys
import weakref
from pathlib import Path
from typing import Final

from logstore.errors import NotAStoreError
from logstore.storage.kernel_sync import KernelSync

_READ_STEP: Final = 1 << 20
_FILE_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700
_NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "ceph", "lustre", "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs"}
)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """Close the locks in a forked child: it shares them, and would hold them after the death of its parent."""
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_let_go_in_child)


class Lock:
    """A `flock`; the kernel releases it when the process dies.

    Attributes:
        fd: The descriptor, -1 once it is closed.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        _held.add(self)

    def release(self) -> None:
        """Let go of the lock; a second call does nothing."""
        if self.fd >= 0:
            # Not by closing alone: a child may have been forked just before the descriptor was noted here, and have it.
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            self.close()

    def close(self) -> None:
        """Close the descriptor; whoever shares it holds the lock on."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _naming(error: OSError, fd: int) -> OSError:
    """Return an error of a call that has no path with the path of its file, where the system tells (Linux)."""
    try:
        return OSError(error.errno, error.strerror, os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        return error


class Disk:
    """Files, folders, syncs and locks of the real operating system."""

    def create(self, path: Path) -> int:
        """Create a private file that must not exist and return a descriptor for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        """Open a file; with `create` it is made when it does not exist."""
        flags = os.O_CLOEXEC | (os.O_RDWR if write or create else os.O_RDONLY) | (os.O_CREAT if create else 0)
        return os.open(path, flags, _FILE_MODE)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises:
            OSError: The disk refused; what was written of `data` is not known.
        """
        try:
            written = os.pwrite(fd, data, offset)
            if written != len(data):
                rest = memoryview(data)[written:]
                while rest:
                    offset += written
                    written = os.pwrite(fd, rest, offset)
                    rest = rest[written:]
        except OSError as error:
            raise _naming(error, fd) from None

    def read(self, fd: int, length: int, offset: int) -> bytes:
        """Return up to `length` bytes from `offset`; fewer only at the end of the file.

        Raises:
            OSError: The disk does not give them.
        """
        if length > _READ_STEP:
            # Room for all of it is made before anything is read, and a length may be anybody's word.
            length = min(length, max(0, self.size(fd) - offset))
        try:
            data = os.pread(fd, length, offset)
            if len(data) == length or not data:
                return data
            pieces = [data]
            done = len(data)
            while done < length and (data := os.pread(fd, min(length - done, _READ_STEP), offset + done)):
                pieces.append(data)
                done += len(data)
        except OSError as error:
            raise _naming(error, fd) from None
        return b"".join(pieces)

    def read_file(self, path: Path) -> bytes:
        """Return all bytes of a file."""
        fd = self.open(path)
        try:
            return self.read(fd, self.size(fd), 0)
        finally:
            self.close(fd)

    def size(self, fd: int) -> int:
        """Return the length of an open file in bytes."""
        return os.fstat(fd).st_size

    def extend(self, fd: int, length: int) -> None:
        """Make a file at least `length` bytes long without touching what it holds."""
        if self.size(fd) < length:
            os.ftruncate(fd, length)

    def shorten(self, fd: int, length: int) -> None:
        """Cut a file off at a length."""
        os.ftruncate(fd, length)

    def allocate(self, fd: int, length: int) -> None:
        """Take the blocks of a file of zeros that is at least `length` bytes long.

        Raises:
            OSError: There is no room for it.
        """
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, length)
        else:
            self.write(fd, bytes(length), 0)

    def inode(self, fd: int) -> int:
        """Return the number that tells an open file from another one put in its place."""
        return os.fstat(fd).st_ino

    def sync(self, fd: int) -> None:
        """Return when the file's bytes, and its length, are on disk.

        Raises:
            OSError: The disk refused; what it has of the file is not known.
        """
        try:
            if sys.platform == "darwin":
                # fsync on macOS leaves the data in the drive's cache.
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            else:
                os.fdatasync(fd)
        except OSError as error:
            raise _naming(error, fd) from None

    def kernel_sync(self) -> KernelSync | None:
        """Return what does `sync` beside the process; None where that cannot be had, or `sync` is not this one."""
        if type(self).sync is not Disk.sync:
            return None
        try:
            return KernelSync()
        except OSError:
            return None

    def forget_cache(self, fd: int) -> None:
        """Have the next read come from the device, where the system can do that.

        After a failed sync the page cache shows data that the disk does not hold; recovery must not believe it.
        """
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync_folder(self, folder: Path) -> None:
        """Return when the folder's entries are on disk."""
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def make_folder(self, folder: Path) -> None:
        """Make a private folder and its parents, each entry synced; existing ones stay as they are."""
        if folder.is_dir():
            return
        self.make_folder(folder.parent)
        try:
            folder.mkdir(mode=_FOLDER_MODE)
        except FileExistsError:
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
        self.sync_folder(folder.parent)

    def list(self, folder: Path) -> list[str]:
        """Return the names in a folder, in no order; none when it does not exist."""
        try:
            return os.listdir(folder)
        except FileNotFoundError:
            return []

    def rename(self, source: Path, target: Path) -> None:
        """Put `source` in the place of `target`; durable after a sync of the folder."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file; one that is gone already is no error. Durable after a sync of the folder."""
        path.unlink(missing_ok=True)

    def publish(self, path: Path, data: bytes) -> None:
        """Put a whole file in place: at any instant a reader, or a crash, finds the old one or the new one."""
        temporary = path.with_name(f"{path.name}.tmp")
        self.unlink(temporary)
        try:
            fd = self.create(temporary)
            try:
                self.write(fd, data, 0)
                self.sync(fd)
            finally:
                self.close(fd)
            self.rename(temporary, path)
        except BaseException:
            # On a full disk half a file that nobody reads would be in the way of everything else.
            with contextlib.suppress(OSError):
                self.unlink(temporary)
            raise
        self.sync_folder(path.parent)

    def lock(self, path: Path, *, shared: bool = False, wait: bool = False, create: bool = True) -> Lock | None:
        """Take the `flock` of a file that is never unlinked; None when another holds it and `wait` is false.

        Raises:
            FileNotFoundError: There is no such file, and none may be made.
        """
        # Noted before it is locked: a child that is forked while this thread waits must close it.
        lock = Lock(self.open(path, create=create))
        try:
            fcntl.flock(lock.fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            lock.close()
            return None
        except BaseException:
            lock.close()
            raise
        return lock


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of the system, or of SQLite, says that there is no room."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF == sqlite3.SQLITE_FULL


def lock_holders(path: Path) -> list[int]:
    """Return the pids that hold the `flock` of a file, as far as the system tells (Linux)."""
    try:
        status = path.stat()
        locks = Path("/proc/locks").read_text()
    except OSError:
        return []
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    rows = (line.split() for line in locks.splitlines())
    return sorted({int(row[4]) for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[5] == wanted})


def refuse_unsupported_place(folder: Path) -> None:
    """Refuse systems without `flock`, and network file systems, where it does not hold between machines.

    Raises:
        NotAStoreError: With the reason.
    """
    if sys.platform not in ("linux", "darwin"):
        raise NotAStoreError(f"logstore runs on Linux and macOS; {sys.platform} has no flock and no folder sync")
    _refuse_type(folder, _file_system_type(folder))


def _refuse_type(folder: Path, kind: str | None) -> None:
    if kind in _NETWORK_FILE_SYSTEMS:
        raise NotAStoreError(f"{folder} is on a network file system ({kind}); put the store on a local disk")


def _file_system_type(folder: Path) -> str | None:
    """Return the type of the file system that holds `folder` (Linux), or None where the system does not tell."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return None
    return _type_of_device(mounts, os.stat(folder).st_dev)


def _type_of_device(mounts: str, device: int) -> str | None:
    """Return the file system type of a device, from the text of `/proc/self/mountinfo`.

    Source: proc_pid_mountinfo(5): optional fields of any number end with a lone hyphen, then comes the type.
    """
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            return right.split()[0]
    return None
