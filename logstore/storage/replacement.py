"""Putting another store in the place of a closed one: the switch with which a restore ends.

```
events-log/restoring/    the new store while it is made: its catalogue, and its log folder
events-log/replacing     marker: the new store is whole, and takes the place
events-log/replaced/     the old store, until the new one is in its place
```

Until the marker is there, the old store is untouched, and what is beside it is waste. From then on the switch is always
finished, by whoever opens the store next: a file that is still in `restoring` has not been moved yet.
`store.lock` stays where it is: whoever waits for it waits for the one that counts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from logstore.errors import StoreLockedError
from logstore.storage.files import Disk, Lock, lock_holders

_STAGING: Final = "restoring"
_ASIDE: Final = "replaced"
_MARKER: Final = "replacing"
_PARTS: Final = ("segments", "lanes", "damaged", "registry.log")
_SQLITE_FILES: Final = ("", "-wal", "-shm")


def claim_store(disk: Disk, path: Path, root: Path) -> Lock:
    """Return the lock of a store that nobody has open, made when there is no store.

    Args:
        disk: The file door.
        path: The catalogue.
        root: The log folder.

    Raises:
        StoreLockedError: Processes have it open.
    """
    disk.make_folder(root)
    lock = disk.lock(root / "store.lock")
    if lock is None:
        pids = lock_holders(root / "store.lock")
        raise StoreLockedError(f"{path} is open in process {', '.join(map(str, pids)) or '?'}; stop that first", pids)
    return lock


def staged_catalogue(path: Path, root: Path) -> Path:
    """Return where the catalogue of the new store is made; its log folder stands beside it."""
    return root / _STAGING / path.name


def is_replacing(root: Path) -> bool:
    """Whether a switch was begun and is not finished."""
    return (root / _MARKER).exists()


def begin_replacing(disk: Disk, path: Path, root: Path) -> None:
    """Decide for the new store, which is closed and whole; the caller has claimed the store.

    Raises:
        OSError: The disk refuses. Whether it is decided tells `is_replacing`.
    """
    catalogue = staged_catalogue(path, root)
    if _suffixed(catalogue, "-wal").exists():
        raise OSError(f"SQLite left {catalogue} unfinished")
    # What is missing on one side could not be told from what was moved.
    disk.make_folder(_log_beside(catalogue) / "damaged")
    for folder, _, _ in os.walk(catalogue.parent):
        disk.sync_folder(Path(folder))
    disk.publish(root / _MARKER, b"")


def finish_replacing(disk: Disk, path: Path, root: Path) -> None:
    """Move the old store aside and the new one in, wherever an earlier try has ended; the store is claimed."""
    aside = root / _ASIDE
    disk.make_folder(aside)
    moves = list(_moves(path, root))
    for staged, places in moves:
        if staged.exists():
            for place in places:
                if place.exists():
                    disk.rename(place, aside / place.name)
    # All that is old is away, whatever a power cut takes back, before anything new is in its place.
    for folder in (aside, root, path.parent):
        disk.sync_folder(folder)
    for staged, places in moves:
        if staged.exists():
            disk.rename(staged, places[0])
    for folder in (root, path.parent):
        disk.sync_folder(folder)
    disk.unlink(root / _MARKER)
    disk.sync_folder(root)


def _moves(path: Path, root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each part of the new store with what it displaces, its own place first."""
    catalogue = staged_catalogue(path, root)
    for part in _PARTS:
        yield _log_beside(catalogue) / part, [root / part]
    yield catalogue, [_suffixed(path, suffix) for suffix in _SQLITE_FILES]


def remove_waste(disk: Disk, root: Path) -> None:
    """Remove what restores left behind; the caller holds `store.lock`, so that none is under way."""
    for name in (_STAGING, _ASIDE):
        if (root / name).exists():
            _remove_folder(disk, root / name)


def _remove_folder(disk: Disk, folder: Path) -> None:
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            disk.unlink(Path(parent, name))
        for name in folders:
            _remove_empty(Path(parent, name))
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    # Another process that opens the store may be faster.
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()


def _log_beside(catalogue: Path) -> Path:
    return catalogue.with_name(f"{catalogue.stem}-log")


def _suffixed(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
