"""A folder of this process alone that leaves nothing behind, also when the process is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Final

from logstore.storage.files import Disk, Lock

_PREFIX: Final = "logstore-memory-"
_LOCK: Final = "lock"


class PrivateFolder:
    """A new folder under the system's temporary one, for its owner only (0700).

    A `flock` on a file inside says that its process lives; pids are reused, locks are not. Making one sweeps the
    folders of dead processes.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Locked before it has the name that a sweep looks for: a folder is never seen with its lock still free.
        unnamed = self.path / f"{_LOCK}.new"
        lock = Disk().lock(unnamed)
        unnamed.rename(self.path / _LOCK)
        self._finalizer = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def remove(self) -> None:
        """Remove the folder and all in it; a second call does nothing. Happens at exit too."""
        self._finalizer()


def sweep() -> None:
    """Remove the folders that dead processes of this user left behind."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            foreign = folder.is_symlink() or folder.stat().st_uid != os.geteuid()
            if foreign or not (folder / _LOCK).exists():
                continue
            lock = Disk().lock(folder / _LOCK)
        except OSError:
            # Another sweep removes it just now.
            continue
        if lock is not None:
            with lock:
                shutil.rmtree(folder, ignore_errors=True)


def _remove(path: Path, lock: Lock | None, owner: int) -> None:
    # A forked child runs the same exit handlers; the folder is its parent's.
    if os.getpid() == owner:
        # Threads of a store that nobody closed may be writing: under another name they find it no more.
        gone = path.with_name(f"{path.name}-gone")
        with contextlib.suppress(OSError):
            path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        if lock is not None:
            lock.release()
