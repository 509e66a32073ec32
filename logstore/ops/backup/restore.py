"""Restore: a backup becomes a store, in an empty place or in the place of a closed store.

The new store is made beside the old one, every byte verified, opened and closed as any store is, and counted. Only then
it takes the place, see `storage.replacement`: a failure or a crash before that leaves the old store as it was.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from logstore.errors import DamageError, NotAStoreError, WriteFailedError
from logstore.ops.backup.cut import count_live, note_dropped
from logstore.ops.backup.manifest import Manifest, StoredFile, missing_objects, read_manifest
from logstore.ops.backup.moment import cut_off
from logstore.ops.backup.pool import MANIFEST_SUFFIX, FolderTarget, OtherBytesError, Target, verified
from logstore.ops.progress import Progress, silent
from logstore.storage.catalogue import Catalogue
from logstore.storage.database import connect, inspect_file
from logstore.storage.files import Disk
from logstore.storage.indexing import make_index
from logstore.storage.lane import Reservation, first_reservation, lane_folders, read_reservation
from logstore.storage.opening import OpenStore, log_folder
from logstore.storage.options import LogOptions
from logstore.storage.registry import Registry
from logstore.storage.replacement import (
    begin_replacing,
    claim_store,
    finish_replacing,
    is_replacing,
    remove_waste,
    staged_catalogue,
)

logger = logging.getLogger("logstore")


class RestoreResult(NamedTuple):
    """A store that was restored.

    Attributes:
        path: Its catalogue.
        backup: The manifest that it was made of.
        events: Events that it serves.
        bytes: Bytes that were copied.
        files: Files that were copied.
        left_out: Events that were left out because they, or one before them on their stream, came too late.
        damaged: Files that were damaged when the backup was made, with the reason.
    """

    path: str
    backup: str
    events: int
    bytes: int
    files: int
    left_out: int
    damaged: tuple[str, ...]


def find_backup(path: Path) -> tuple[Target, str]:
    """Return pool and key of a backup: of a manifest, or of the newest one in a folder.

    Raises:
        NotAStoreError: There is none.
    """
    if path.is_dir():
        target = FolderTarget(path)
        keys = target.manifests()
        if not keys:
            raise NotAStoreError(f"there is no backup in {path}: no file there is named *{MANIFEST_SUFFIX}")
        return target, keys[-1]
    if not path.is_file():
        raise NotAStoreError(f"there is no backup at {path}: give a *{MANIFEST_SUFFIX} file, or the folder of backups")
    return FolderTarget(path.parent), path.name


def restore(
    backup: Path, path: Path, *, until: datetime | None = None, progress: Progress = silent, disk: Disk | None = None
) -> RestoreResult:
    """Make a store of a backup; on return it is on disk, in the place of the one that was there.

    Args:
        backup: A manifest, or a folder of backups, of which the newest is taken.
        path: The catalogue of the store to be.
        until: Of each stream only the events before the first that was recorded later; UTC when it has no zone.
        progress: Told of the bytes.
        disk: The file door.

    Raises:
        NotAStoreError: There is no backup, or the place holds something that is not a store.
        StoreLockedError: Processes have the store open; it names them.
        DamageError: The backup is damaged or incomplete; the store is as it was.
        FormatVersionError: A newer release made the backup.
        WriteFailedError: The disk refuses; the message says which of the two stores is in the place.
    """
    try:
        target, key = find_backup(backup)
    except OSError as error:
        raise WriteFailedError(f"{_nothing_restored(path)}: {error}") from error
    return restore_from(target, key, path, until=until, progress=progress, disk=disk)


def restore_from(
    target: Target,
    key: str,
    path: Path,
    *,
    until: datetime | None = None,
    progress: Progress = silent,
    disk: Disk | None = None,
) -> RestoreResult:
    """As `restore`, from any target."""
    disk = disk or Disk()
    root = log_folder(path)
    restoring: _Restore | None = None
    try:
        with target.reading():
            manifest = read_manifest(target, key)
            if missing := missing_objects(target, manifest):
                raise DamageError(
                    Path(target.locate(key)), 0, 0, f"{len(missing)} files of the backup are missing: {missing[0]}"
                )
            _refuse_foreign(path, root)
            restoring = _Restore(disk, target, key, manifest, path, progress)
            with claim_store(disk, path, root):
                return restoring.run(until)
    except (OSError, sqlite3.Error, WriteFailedError) as error:
        standing = restoring.standing() if restoring else _nothing_restored(path)
        # What to do about a store that cannot be opened is no advice for one that is only being made.
        reason = error.__cause__ or error if isinstance(error, WriteFailedError) else error
        raise WriteFailedError(f"{standing}: {reason}") from error


def _nothing_restored(path: Path) -> str:
    return f"nothing was restored, {path} is as it was"


def _refuse_foreign(path: Path, root: Path) -> None:
    try:
        found = inspect_file(path, look_only=True)
    except sqlite3.Error:
        found = "damaged"
    if found == "damaged" and not (root / "registry.log").exists():
        raise NotAStoreError(f"{path} is not a SQLite database, nothing was written; give another path")


class _Restore:
    """One restore under way, of a claimed store."""

    def __init__(
        self, disk: Disk, target: Target, key: str, manifest: Manifest, path: Path, progress: Progress
    ) -> None:
        self._disk = disk
        self._target = target
        self._key = key
        self._manifest = manifest
        self._path = path
        self._root = log_folder(path)
        self._staged = staged_catalogue(path, self._root)
        self._staged_root = log_folder(self._staged)
        self._progress = progress
        self._dropped = b""
        self._is_decided = False

    def standing(self) -> str:
        """Say which store is there after the disk refused."""
        if is_replacing(self._root):
            return f"the restored store is whole, and takes its place when {self._path} is opened next"
        if self._is_decided:
            return f"the restored store is in its place at {self._path}, but the disk refuses"
        return _nothing_restored(self._path)

    def run(self, until: datetime | None) -> RestoreResult:
        if is_replacing(self._root):
            finish_replacing(self._disk, self._path, self._root)
        remove_waste(self._disk, self._root)
        try:
            left_out = self._build(until)
            events = self._open_once(exact=until is None and not self._manifest.damaged)
            begin_replacing(self._disk, self._path, self._root)
        except BaseException:
            if not is_replacing(self._root):
                # On a full disk half a store that nobody reads would be in the way of everything else.
                with contextlib.suppress(OSError):
                    remove_waste(self._disk, self._root)
            raise
        self._is_decided = True
        finish_replacing(self._disk, self._path, self._root)
        self._remove_old()
        return RestoreResult(
            path=str(self._path),
            backup=self._target.locate(self._key),
            events=events,
            bytes=self._manifest.bytes,
            files=len(self._manifest.files),
            left_out=left_out,
            damaged=tuple(f"{file.path}: {file.reason}" for file in self._manifest.damaged),
        )

    def _remove_old(self) -> None:
        try:
            remove_waste(self._disk, self._root)
        except OSError as error:
            logger.warning("the old store is removed when %s is opened next: %s", self._path, error)

    def _build(self, until: datetime | None) -> int:
        """Bring all files into place beside the store; return how many events came too late."""
        for part in ("lanes", "segments"):
            self._disk.make_folder(self._staged_root / part)
        done = 0
        for file in self._manifest.files:
            self._bring(file)
            done += file.bytes
            self._progress("copying the backup", done, self._manifest.bytes)
        # A new one when that of the backup was damaged: sessions are gone then, events are not.
        registry = Registry(self._disk, self._staged_root)
        try:
            registry.open(self._manifest.store_id)
        finally:
            registry.close()
        for lane, reservation in self._reservations().items():
            folder = self._staged_root / "lanes" / f"{lane:04d}"
            self._disk.make_folder(folder)
            first_reservation(self._disk, folder, reservation)
        if until is None:
            return 0
        moment = until if until.tzinfo else until.replace(tzinfo=UTC)
        return cut_off(self._disk, self._staged_root, self._manifest.store_id, moment)

    def _bring(self, file: StoredFile) -> None:
        """Copy one file, or refuse it.

        Raises:
            DamageError: The pool has other bytes, or none.
        """
        place = Path(self._target.locate(file.key))
        pieces = verified(self._target.read(file.key), file.sha256, str(place))
        try:
            if file.kind == "dropped":
                self._dropped = b"".join(pieces)
            elif file.bytes == 0 or (file.kind == "registry" and file.damaged):
                # Nothing to be opened; but what the backup says of it must be so.
                for _ in pieces:
                    pass
            else:
                self._write(self._staged_root / file.path, pieces)
        except (OtherBytesError, FileNotFoundError) as error:
            raise DamageError(
                place, 0, file.bytes, f"{error}; nothing was changed, restore from another backup"
            ) from error

    def _write(self, path: Path, pieces: Iterable[bytes]) -> None:
        self._disk.make_folder(path.parent)
        fd = self._disk.create(path)
        try:
            offset = 0
            for piece in pieces:
                self._disk.write(fd, piece, offset)
                offset += len(piece)
            self._disk.sync(fd)
        finally:
            self._disk.close(fd)

    def _reservations(self) -> dict[int, Reservation]:
        """Return what each lane has given out at most, here or in the store that is replaced: no id comes twice."""
        found = {mark.lane: Reservation(mark.reserved_id, mark.reserved_ordinal) for mark in self._manifest.lanes}
        for lane, folder in lane_folders(self._disk, self._root):
            here = read_reservation(self._disk, folder)
            there = found.get(lane, Reservation(0, 0))
            found[lane] = Reservation(max(here.event_id, there.event_id), max(here.ordinal, there.ordinal))
        return found

    def _open_once(self, *, exact: bool) -> int:
        """Open the new store, which adopts its journals and makes its index; return how many events it serves.

        Raises:
            DamageError: Fewer than the backup counted.
        """
        self._progress("indexing", 0, None)
        if self._dropped:
            self._note_dropped()
        store = OpenStore(self._disk, self._staged, LogOptions().segment_bytes)
        try:
            with contextlib.closing(connect(self._staged, write=False)) as catalogue:
                events = count_live(catalogue)
        finally:
            store.close(empty=True)
        # More is no loss: files also hold old events of streams that retention dropped so long ago that it forgot them.
        if exact and events < self._manifest.events:
            raise DamageError(
                Path(self._target.locate(self._key)),
                0,
                0,
                f"the backup holds {events} events and says {self._manifest.events}; nothing was changed",
            )
        return events

    def _note_dropped(self) -> None:
        """Make the index so that it leaves out what retention had dropped and files still hold."""
        self._disk.close(self._disk.create(self._staged))
        notes = Catalogue(self._staged)
        try:
            notes.open()
            try:
                note_dropped(notes, self._dropped)
            except ValueError as error:
                place = Path(self._target.locate(self._key))
                reason = f"what retention had dropped cannot be read ({error}); nothing was changed"
                raise DamageError(place, 0, len(self._dropped), reason) from error
        finally:
            notes.close()
        make_index(self._disk, self._staged_root, self._staged, self._manifest.store_id)
