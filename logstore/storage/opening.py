"""Opening and closing a store: locks, lane, catalogue, and what dead processes left behind."""

from __future__ import annotations

import contextlib
import logging
import secrets
import sqlite3
import time
from pathlib import Path
from typing import Final

from logstore.errors import DamageError, LogstoreError, StoreLockedError, WriteFailedError
from logstore.storage.catalogue import Catalogue, inspect_file
from logstore.storage.checkpoint import Journal, SegmentStore
from logstore.storage.files import Disk, Lock, lock_holders, refuse_unsupported_place
from logstore.storage.header import HEADER_BYTES, KIND_SEGMENT, decode_header
from logstore.storage.ids import IdGenerator, lane_of
from logstore.storage.lane import Lane, Marks, journal_ordinals, lane_folders, read_reservation
from logstore.storage.recovery import adopt_lane, reindex
from logstore.storage.registry import Registry
from logstore.storage.segment import segment_numbers, segment_path
from logstore.storage.tail import Generation, Tail

logger = logging.getLogger("logstore")

_WAIT_S: Final = 0.01


def log_folder(path: Path) -> Path:
    """Return the folder of the log that belongs to a catalogue: `events-log` beside `events.db`."""
    return path.with_name(f"{path.stem}-log")


class OpenStore:
    """The files of a store that this process has open. Its methods block: call them in a thread.

    Attributes:
        root: The log folder.
        store_id: Of the store, random at its birth.
        lane: The lane of this process.
        registry: The sessions.
        catalogue: The index.
        segments: Where events go from the journals.
    """

    def __init__(self, disk: Disk, path: Path, segment_bytes: int) -> None:
        """Open a store, made when there is none, and recover what dead processes left.

        Raises:
            NotAStoreError: The path cannot hold a store.
            FormatVersionError: A newer release wrote it.
            StoreLockedError: A restore is under way, or all lanes are in use.
            DamageError: The registry is damaged.
            WriteFailedError: The disk refuses.
        """
        self._disk = disk
        self._path = path
        self._segment_bytes = segment_bytes
        self.root = log_folder(path)
        with contextlib.ExitStack() as undo:
            try:
                self._open(undo)
            except LogstoreError:
                raise
            except (OSError, sqlite3.Error) as error:
                raise WriteFailedError(f"the store {path} cannot be opened: {error}") from error
            undo.pop_all()

    def _open(self, undo: contextlib.ExitStack) -> None:
        disk, root = self._disk, self.root
        found = inspect_file(self._path)
        disk.make_folder(self._path.parent)
        refuse_unsupported_place(self._path.parent)
        for folder in ("lanes", "segments"):
            disk.make_folder(root / folder)
        self._store_lock = self._share_store()
        undo.callback(self._store_lock.release)
        self.registry = Registry(disk, root)
        self.store_id = self.registry.open(self._existing_store_id() or secrets.randbits(63) | 1)
        undo.callback(self.registry.close)
        self.catalogue = Catalogue(self._path)
        undo.callback(self.catalogue.close)
        with self.checkpoint_lock():
            self._open_catalogue(found)
            self.lane = Lane.acquire(disk, root, self.store_id)
            undo.callback(self.lane.end)
            reserved = (read_reservation(disk, folder).event_id for _, folder in lane_folders(disk, root))
            floor = max(self.catalogue.last_id(), *reserved)
            self.lane.begin(floor, time.time_ns() // 1000)
            self.segments = SegmentStore(
                disk,
                root,
                self.catalogue,
                store_id=self.store_id,
                incarnation=self.lane.incarnation,
                numbers=IdGenerator(self.lane.number, floor),
                segment_bytes=self._segment_bytes,
            )
            highest = self._adopt(self.lane.number, self.lane.folder)
        self.lane.marks.begin(self.lane.incarnation)
        self.lane.ids.advance(max(highest, self.adopt_dead_lanes()))
        self._wait_for_void_lanes()

    def _share_store(self) -> Lock:
        path = self.root / "store.lock"
        lock = self._disk.lock(path, shared=True)
        if lock is None:
            pids = lock_holders(path)
            raise StoreLockedError(f"{self._path} is being replaced by process {pids}; try again when it is done", pids)
        return lock

    def _existing_store_id(self) -> int | None:
        """Return the id that the segments name, for a store that lost its registry."""
        if (self.root / "registry.log").exists():
            return None
        for number in segment_numbers(self._disk, self.root):
            path = segment_path(self.root, number)
            fd = self._disk.open(path)
            try:
                store_id = decode_header(self._disk.read(fd, HEADER_BYTES, 0), path, KIND_SEGMENT).store_id
            except DamageError:
                continue
            finally:
                self._disk.close(fd)
            logger.error("%s lost its registry: sessions are gone, events are not", self.root)
            return store_id
        return None

    def _open_catalogue(self, found: str) -> None:
        """Open the index; one that is lost or damaged is made again from the segments."""
        if found == "damaged":
            self._set_catalogue_aside()
        try:
            self.catalogue.open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            self.catalogue.close()
            self._set_catalogue_aside()
            self.catalogue.open()
        self.index_again()

    def index_again(self) -> None:
        """Fill an empty index from the segments; the caller holds the checkpoint lock."""
        if self.catalogue.last_id() == 0 and segment_numbers(self._disk, self.root):
            started = time.monotonic()
            events = reindex(self._disk, self.root, self.catalogue, self.store_id)
            logger.warning("indexed %d events again in %.1f s", events, time.monotonic() - started)

    def _set_catalogue_aside(self) -> None:
        """Move a damaged index away, never over another one, unless somebody else works with it."""
        if not (self.root / "registry.log").exists() or not segment_numbers(self._disk, self.root):
            # Without a log beside it nothing says that the file was ever ours.
            raise DamageError(self._path, 0, self._path.stat().st_size, "this is not a SQLite database; move it away")
        self._store_lock.release()
        exclusive = self._disk.lock(self.root / "store.lock")
        if exclusive is None:
            pids = lock_holders(self.root / "store.lock")
            raise StoreLockedError(
                f"the catalogue {self._path} is damaged and in use by process {pids}; close it there, then open again",
                pids,
            )
        try:
            for suffix in ("", "-wal", "-shm"):
                source = self._path.with_name(self._path.name + suffix)
                if source.exists():
                    target = self._path.with_name(f"{self._path.name}.damaged-{time.time_ns()}{suffix}")
                    self._disk.rename(source, target)
                    logger.error("the catalogue is damaged: kept as %s, made again from the log", target)
            self._disk.sync_folder(self._path.parent)
        finally:
            exclusive.release()
        self._store_lock = self._share_store()

    def checkpoint_lock(self) -> Lock:
        """Wait for the lock that the writer of segments and catalogue holds."""
        lock = self._disk.lock(self.root / "checkpoint.lock", wait=True)
        assert lock is not None
        return lock

    def checkpoint(self, tail: Tail, generations: list[Generation]) -> None:
        """Bring finished journals of the own lane into segments, and remove them.

        Raises:
            OSError, sqlite3.Error: Not done; the journals are still there.
        """
        lane = self.lane
        journals = [Journal(lane.folder, lane.number, generation.ordinal) for generation in generations]
        with self.checkpoint_lock():
            if self.catalogue.replaced:
                logger.error("%s was removed or replaced while it was open; it is made again", self._path)
                self.catalogue.close()
                inspect_file(self._path)
                self.catalogue.open()
                self.index_again()
            self.segments.write(tail.runs(generations), journals, time.time_ns() // 1000)
            changes = self.registry.changes()
            if changes:
                with self.catalogue.transaction():
                    self.catalogue.put_sessions(changes)

    def adopt_dead_lanes(self) -> int:
        """Take what dead processes left in their lanes, without waiting for anybody who does the same.

        Returns:
            The highest event id found, 0 for none.
        """
        highest = 0
        for number, folder in lane_folders(self._disk, self.root):
            if number == self.lane.number or not journal_ordinals(self._disk, folder):
                continue
            lock = self._disk.lock(folder / "lock")
            if lock is None:
                continue
            with lock, self.checkpoint_lock():
                highest = max(highest, self._adopt(number, folder))
        return highest

    def _adopt(self, number: int, folder: Path) -> int:
        return adopt_lane(self._disk, self.root, number, folder, self.catalogue, self.segments, self.store_id)

    def _wait_for_void_lanes(self) -> None:
        """Wait while another process recovers lanes of which, since the machine started, nobody can read anything."""
        for _, folder in lane_folders(self._disk, self.root):
            while journal_ordinals(self._disk, folder) and not self._marks_valid(folder):
                time.sleep(_WAIT_S)
                self.adopt_dead_lanes()

    def _marks_valid(self, folder: Path) -> bool:
        marks = Marks(self._disk, folder)
        try:
            return marks.valid
        finally:
            marks.close()

    def is_alive(self, incarnation: int) -> bool:
        """Whether the opening with this incarnation still holds its lane."""
        folder = self.root / "lanes" / f"{lane_of(incarnation):04d}"
        marks = Marks(self._disk, folder)
        try:
            if marks.incarnation != incarnation:
                return False
        finally:
            marks.close()
        if incarnation == self.lane.incarnation:
            return True
        lock = self._disk.lock(folder / "lock")
        if lock is None:
            return True
        lock.release()
        return False

    def highest_reserved(self) -> int:
        """Return an id at or above everything that any lane has given out."""
        folders = lane_folders(self._disk, self.root)
        return max(read_reservation(self._disk, folder).event_id for _, folder in folders)

    def close(self, *, empty: bool) -> None:
        """Give everything back.

        Args:
            empty: Whether all events of the lane are in segments, so that its ids may begin at the clock next time.
        """
        with self.checkpoint_lock():
            with contextlib.suppress(OSError, sqlite3.Error):
                # What cannot be sealed now is taken as it is by the next opening.
                self.segments.close()
            self.catalogue.close()
        if empty:
            with contextlib.suppress(OSError):
                self.lane.settle()
        self.lane.end()
        self.registry.close()
        self._store_lock.release()
