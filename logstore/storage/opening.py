"""Opening and closing a store: locks, lane, catalogue, and what dead processes left behind."""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import Generator
from concurrent.futures import Executor
from pathlib import Path
from typing import Final

from logstore.errors import DamageError, IndexReplacedError, NotAStoreError, StoreLockedError, WriteFailedError
from logstore.storage.catalogue import Catalogue
from logstore.storage.checkpoint import Journal, SegmentStore
from logstore.storage.database import damage_of, inspect_file, is_damage, is_io_error, is_whole
from logstore.storage.files import Disk, Lock, lock_holders, refuse_unsupported_place
from logstore.storage.header import HEADER_BYTES, KIND_JOURNAL, KIND_SEGMENT, decode_header
from logstore.storage.ids import IdGenerator, lane_of
from logstore.storage.indexing import SQLITE_FILES, BytesDone, Indexed, make_index, reindex, silent
from logstore.storage.lane import Lane, Marks, is_held, journal_ordinals, journal_path, lane_folders, read_reservation
from logstore.storage.recovery import adopt_lane
from logstore.storage.registry import Registry
from logstore.storage.replacement import finish_replacing, is_replacing, remove_waste
from logstore.storage.segment import segment_numbers, segment_path
from logstore.storage.tail import Generation, Tail

logger = logging.getLogger("logstore")

_WAIT_S: Final = 0.01
_PATIENCE_S: Final = 30.0
_SWITCH_S: Final = 1.0
"""More than it takes to put a restored store in its place."""
_LOCK_LOOK_S: Final = 0.001
_LOCK_PATIENCE_S: Final = 300.0
"""Longer than it takes to make the index of a hundred million events again."""
_RESERVE_BYTES: Final = 8 << 20
_RESERVE_FROM_BYTES: Final = 64 << 20
_PROBE_BYTES: Final = 64 << 10
_UNREADABLE_FILE: Final = (
    "; if it stays so, put a copy of what can be read of that file in its place, with zeros for the rest (ddrescue "
    "makes one): `logstore repair` then keeps what is whole. Or restore a backup"
)
_UNREADABLE_INDEX: Final = (
    "; if it is the catalogue that the disk no longer gives, move it away with its -wal and -shm: the next opening "
    "makes it again from the log"
)


def log_folder(path: Path) -> Path:
    """Return the folder of the log that belongs to a catalogue: `events-log` beside `events.db`."""
    # Not `with_name`: the path may be `.`, which is refused where it is told from a file.
    return path.parent / f"{path.stem}-log"


def reserve_path(root: Path) -> Path:
    """Return the path of a file that only takes room, see `OpenStore.keep_reserve`."""
    return root / "reserve"


class OpenStore:
    """The files of a store that this process has open. Its methods block: call them in a thread.

    Attributes:
        disk: The file door.
        root: The log folder.
        store_id: Of the store, random at its birth.
        lane: The lane of this process.
        registry: The sessions.
        catalogue: The index.
        segments: Where events go from the journals.
        made: What is in the index when this opening had to make it, else None.
        stopping: Set when the store is about to be closed: long work on it ends early.
    """

    def __init__(self, disk: Disk, path: Path, segment_bytes: int, scanners: Executor | None = None) -> None:
        """Open a store, made when there is none, and recover what dead processes left.

        Args:
            disk: The file door.
            path: The catalogue.
            segment_bytes: Size at which a segment is sealed.
            scanners: Who reads segments when the index has to be made; a thread when it is None.

        Raises:
            NotAStoreError: The path cannot hold a store.
            FormatVersionError: A newer release wrote it.
            StoreLockedError: A restore is under way, or all lanes are in use.
            DamageError: The registry is damaged.
            WriteFailedError: The disk refuses.
        """
        self.disk = disk
        self._path = path
        self._segment_bytes = segment_bytes
        self._scanners = scanners
        self.stopping = threading.Event()
        # The inode of an index that was found whole after SQLite had called it damaged.
        self._acquitted = 0
        self.root = log_folder(path)
        self.made: Indexed | None = None
        try:
            self._open_and_mend()
        except OSError as error:
            advice = _UNREADABLE_FILE if error.errno == errno.EIO else ""
            raise WriteFailedError(f"the store {path} cannot be opened: {error}{advice}") from error
        except sqlite3.Error as error:
            cause = self._cause()
            reason = f"{error} ({cause})" if cause else f"{error}{_UNREADABLE_INDEX if is_io_error(error) else ''}"
            raise WriteFailedError(f"the store {path} cannot be opened: {reason}") from cause or error
        self.segments.beside_appends = True

    def _cause(self) -> OSError | None:
        """Return what the system answers to a write beside the catalogue: SQLite only says that it failed."""
        probe = _beside(self._path, ".probe")
        try:
            fd = self.disk.create(probe)
            try:
                self.disk.write(fd, bytes(_PROBE_BYTES), 0)
            finally:
                self.disk.close(fd)
                self.disk.unlink(probe)
        except OSError as error:
            return error
        return None

    def _open_and_mend(self) -> None:
        # The first time it may be that the disk did not give SQLite the schema, which to it is damage, too.
        for mend in (False, False, True):
            try:
                self._open_or_undo(mend=mend)
            except sqlite3.DatabaseError as error:
                if mend or not is_damage(error):
                    raise
            else:
                return

    def _open_or_undo(self, *, mend: bool) -> None:
        with contextlib.ExitStack() as undo:
            self._open(undo, mend)
            undo.pop_all()

    def _open(self, undo: contextlib.ExitStack, mend: bool) -> None:
        disk, root = self.disk, self.root
        # While a restored store is put in its place, files come and go; what is there then is ours.
        if not is_replacing(root):
            self._refuse_foreign_file()
        disk.make_folder(self._path.parent)
        refuse_unsupported_place(self._path.parent)
        disk.make_folder(root)
        self._store_lock = self._share_store()
        undo.callback(self._store_lock.release)
        for folder in ("lanes", "segments"):
            disk.make_folder(root / folder)
        # A process that died may have made them, and not synced.
        for parent in (self._path.parent, root, root / "lanes"):
            disk.sync_folder(parent)
        self.registry = Registry(disk, root)
        self.store_id = self.registry.open(self._existing_store_id() or secrets.randbits(63) | 1)
        undo.callback(self.registry.close)
        self.catalogue = Catalogue(self._path)
        undo.callback(self.catalogue.close)
        with self.checkpoint_lock():
            self.catalogue.suspect = mend
            self._mend_catalogue()
            self.catalogue.open()
            self._index_unknown()
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
            # Until the marks name this incarnation, compaction takes what it writes for a dead process's.
            self.segments.close()
        self.lane.marks.begin(self.lane.incarnation)
        self.lane.advance(max(highest, self.adopt_dead_lanes()))
        self._wait_for_void_lanes()

    def _share_store(self) -> Lock:
        """Return the lock that every open store shares; an interrupted restore is finished first."""
        path = self.root / "store.lock"
        patience = time.monotonic() + _SWITCH_S
        while True:
            replacing = is_replacing(self.root)
            lock = self.disk.lock(path, shared=not replacing)
            if lock is None:
                if time.monotonic() > patience:
                    pids = lock_holders(path)
                    raise StoreLockedError(
                        f"{self._path} is being replaced by process {pids}; try again when it is done", pids
                    )
                time.sleep(_WAIT_S)
            elif not replacing and not is_replacing(self.root):
                self._remove_waste()
                return lock
            else:
                with lock:
                    if replacing and is_replacing(self.root):
                        logger.warning("%s: a restore was interrupted; it is finished now", self._path)
                        finish_replacing(self.disk, self._path, self.root)

    def _remove_waste(self) -> None:
        try:
            remove_waste(self.disk, self.root)
        except OSError as error:
            logger.warning("what an interrupted restore left in %s cannot be removed: %s", self.root, error)

    def _existing_store_id(self) -> int | None:
        """Return the id that segments and journals name, for a store that lost its registry."""
        if (self.root / "registry.log").exists():
            return None
        disk, root = self.disk, self.root
        files = [(segment_path(root, number), KIND_SEGMENT) for number in segment_numbers(disk, root)]
        files += [
            (journal_path(folder, ordinal), KIND_JOURNAL)
            for _, folder in lane_folders(disk, root)
            for ordinal in journal_ordinals(disk, folder)
        ]
        for path, kind in files:
            fd = disk.open(path)
            try:
                store_id = decode_header(disk.read(fd, HEADER_BYTES, 0), path, kind).store_id
            except DamageError:
                continue
            finally:
                disk.close(fd)
            logger.error("%s lost its registry: sessions are gone, events are not", root)
            return store_id
        return None

    def _refuse_foreign_file(self) -> None:
        """Refuse a file that is not a catalogue, before anything is written beside it."""
        if inspect_file(self._path) == "damaged" and not (self.root / "registry.log").exists():
            # Without a log beside it nothing says that the file was ever ours.
            raise NotAStoreError(f"{self._path} is not a SQLite database, nothing was written; give another path")

    def _mend_catalogue(self) -> None:
        """Make an index that is lost or damaged again from the log; the caller holds the checkpoint lock."""
        found = inspect_file(self._path)
        if found == "damaged" or self.catalogue.suspect:
            self._set_catalogue_aside()
        if found != "ours" or self.catalogue.suspect:
            self.made = self._make_index()

    def _index_unknown(self) -> None:
        """Index what the segments hold and a catalogue that is older than they are does not know."""
        found = reindex(self.disk, self.root, self.catalogue, self.store_id, scanners=self._scanners)
        if found.events:
            logger.warning("%s did not know all of %d events in segments; they are indexed", self._path, found.events)

    def _make_index(self, progress: BytesDone = silent) -> Indexed:
        return make_index(self.disk, self.root, self._path, self.store_id, progress, self._scanners)

    def reindex(self, progress: BytesDone = silent) -> Indexed:
        """Make the whole index again, in the place of the one that is there, also while others use that.

        On return it is on disk. What retention has noted stays, when it can be read.

        Raises:
            OSError, sqlite3.Error: The disk refused; the index is the one that was there, unless that was damaged: then
                there is none, and the next opening makes it.
        """
        with self.checkpoint_lock():
            self._keep_catalogue()
            try:
                # The other one's write-ahead log goes before it does: a crash in between must leave it whole.
                with damage_of(self._path):
                    self.catalogue.fold_wal()
                indexed = self._make_index(progress)
            except DamageError:
                self._set_catalogue_aside()
                indexed = self._make_index(progress)
            self.catalogue.open()
            # It has them sealed, and compaction may remove them.
            self.segments.abandon()
            self.registry.all_changed()
            self.copy_sessions()
        return indexed

    def _set_catalogue_aside(self) -> None:
        """Move a damaged index away, never over another one; who has it open sees that the path has another file."""
        kept = _beside(self._path, f".damaged-{time.time_ns()}")
        for suffix in SQLITE_FILES:
            source = _beside(self._path, suffix)
            if source.exists():
                self.disk.rename(source, _beside(kept, suffix))
        logger.error("the catalogue is damaged: kept as %s, made again from the log", kept)
        self.disk.sync_folder(self._path.parent)

    def checkpoint_lock(self) -> Lock:
        """Wait for the lock that the writer of segments and catalogue holds.

        Raises:
            StoreLockedError: Its holder does not get on.
        """
        path = self.root / "checkpoint.lock"
        patience = time.monotonic() + _LOCK_PATIENCE_S
        while (lock := self.disk.lock(path)) is None:
            if time.monotonic() > patience:
                pids = lock_holders(path)
                raise StoreLockedError(f"process {pids} holds {path} and does not get on: is it stopped?", pids)
            time.sleep(_LOCK_LOOK_S)
        return lock

    def compaction_lock(self) -> Lock | None:
        """Return the lock of whoever drops and moves what sealed segments hold, or None while another has it."""
        return self.disk.lock(self.root / "compaction.lock")

    def removal_lock(self) -> Lock | None:
        """Return the lock of whoever removes segment files; a backup shares it while it copies them."""
        return self.disk.lock(self.root / "removal.lock")

    @contextlib.contextmanager
    def changing_catalogue(self, inode: int) -> Generator[Catalogue]:
        """Give the index for one transaction: on return what was written is on disk, an error undoes all of it.

        Args:
            inode: Of the index that the change was planned from.

        Raises:
            IndexReplacedError: The index was made again since, so that the plan is void.
            OSError, sqlite3.Error: The disk or the catalogue refused.
        """
        with self.checkpoint_lock():
            self._keep_catalogue()
            if self.catalogue.inode != inode:
                raise IndexReplacedError(f"{self._path} was made again by another process; try again")
            with self.catalogue.transaction():
                yield self.catalogue
            # What was changed is changed: from here on nothing is an error.
            try:
                self.catalogue.shrink_wal()
            except (OSError, sqlite3.Error) as error:
                logger.warning("SQLite's log is folded into %s later: %s", self._path, error)

    def keep_reserve(self) -> None:
        """Keep some room that `give_reserve` can give back, when the disk is full and retention needs it to make more.

        Not in a store so small that there is nothing to gain.
        """
        path = reserve_path(self.root)
        if path.exists() and path.stat().st_size < _RESERVE_BYTES:
            # Whoever made it died over it.
            self.disk.unlink(path)
        if path.exists() or self.catalogue.totals()[2] < _RESERVE_FROM_BYTES:
            return
        try:
            fd = self.disk.create(path)
            try:
                self.disk.allocate(fd, _RESERVE_BYTES)
            finally:
                self.disk.close(fd)
        except OSError as error:
            logger.warning("no room can be kept in reserve for retention: %s", error)
            self.disk.unlink(path)

    def seal_idle_segments(self, before_us: int) -> None:
        """Seal this process's segments that were last written before a time.

        Raises:
            OSError, sqlite3.Error: The disk or the catalogue refused; they stay open.
        """
        with self.checkpoint_lock():
            self._keep_catalogue()
            self.segments.seal_idle(before_us)

    def checkpoint(self, tail: Tail, generations: list[Generation]) -> None:
        """Bring finished journals of the own lane into segments, and remove them.

        Raises:
            OSError, sqlite3.Error: Not done; the journals are still there.
        """
        lane = self.lane
        journals = [Journal(lane.folder, lane.number, generation.ordinal) for generation in generations]
        with self.checkpoint_lock():
            self._keep_catalogue()
            self.segments.write(tail.unsegmented(generations), journals, time.time_ns() // 1000)
            self.copy_sessions()

    def copy_sessions(self) -> None:
        """Show sessions in the catalogue as the registry has them; what fails here the next checkpoint does."""
        try:
            changes = self.registry.changes()
            if changes:
                with self.catalogue.transaction():
                    self.catalogue.put_sessions(changes)
        except (OSError, DamageError, sqlite3.Error) as error:
            self.registry.all_changed()
            logger.error("sessions cannot be copied to the catalogue: %s", error)

    def _keep_catalogue(self) -> None:
        """See to it that the index at the path is whole and the one that is open; the caller holds its lock."""
        if self.catalogue.suspect and not self.catalogue.replaced and self._is_false_alarm():
            logger.warning("%s was found damaged, and is not: it could not be read for a moment", self._path)
            self.catalogue.open()
        elif self.catalogue.suspect or self.catalogue.replaced:
            logger.error("%s was removed, replaced or damaged while it was open", self._path)
            if self.catalogue.replaced:
                # What was found damaged is not what is there now.
                self.catalogue.suspect = False
            self._mend_catalogue()
            self.catalogue.open()
            self._index_unknown()
            # An index that was made again has them sealed, and compaction may have removed them.
            self.segments.abandon()
            self.registry.all_changed()

    def _is_false_alarm(self) -> bool:
        """Whether the open index is whole, though SQLite called it damaged; of one file that is believed once."""
        if self._acquitted == self.catalogue.inode:
            return False
        self._acquitted = self.catalogue.inode
        return is_whole(self._path)

    def adopt_dead_lanes(self) -> int:
        """Take what dead processes left in their lanes, without waiting for anybody who does the same.

        Returns:
            The highest event id found, 0 for none.
        """
        if self.catalogue.suspect or self.catalogue.replaced:
            with self.checkpoint_lock():
                self._keep_catalogue()
        highest = 0
        for number, folder in lane_folders(self.disk, self.root):
            if number == self.lane.number or not journal_ordinals(self.disk, folder):
                continue
            lock = self.disk.lock(folder / "lock")
            if lock is None:
                continue
            with lock, self.checkpoint_lock():
                self._keep_catalogue()
                highest = max(highest, self._adopt(number, folder))
        return highest

    def _adopt(self, number: int, folder: Path) -> int:
        return adopt_lane(self.disk, self.root, number, folder, self.catalogue, self.segments, self.store_id)

    def _wait_for_void_lanes(self) -> None:
        """Wait while another process recovers lanes of which, since the machine started, nobody can read anything."""
        for _, folder in lane_folders(self.disk, self.root):
            while journal_ordinals(self.disk, folder) and not self._marks_valid(folder):
                time.sleep(_WAIT_S)
                self.adopt_dead_lanes()

    def _marks_valid(self, folder: Path) -> bool:
        marks = Marks(self.disk, folder)
        try:
            return marks.valid
        finally:
            marks.close()

    def is_alive(self, incarnation: int) -> bool:
        """Whether the opening with this incarnation still holds its lane."""
        folder = self.root / "lanes" / f"{lane_of(incarnation):04d}"
        if self._writer_of(folder) != incarnation:
            return False
        if incarnation == self.lane.incarnation:
            return True
        return is_held(self.disk, folder)

    def recover_lane_of(self, dead: int) -> None:
        """Return when everything that a dead opening left is in segments, whoever brings it there.

        Raises:
            StoreLockedError: Somebody else has begun to recover it and does not get on.
        """
        folder = self.root / "lanes" / f"{lane_of(dead):04d}"
        patience = time.monotonic() + _PATIENCE_S
        while True:
            self.adopt_dead_lanes()
            # A later opening of the lane has recovered it before it wrote.
            if not journal_ordinals(self.disk, folder) or self._writer_of(folder) not in (0, dead):
                return
            if time.monotonic() > patience:
                pids = lock_holders(folder / "lock")
                raise StoreLockedError(f"{folder} is being recovered by process {pids}, which does not get on", pids)
            time.sleep(_WAIT_S)

    def _writer_of(self, folder: Path) -> int:
        with contextlib.closing(Marks(self.disk, folder)) as marks:
            return marks.incarnation

    def highest_reserved(self) -> int:
        """Return an id at or above everything that any lane has given out."""
        folders = lane_folders(self.disk, self.root)
        return max(read_reservation(self.disk, folder).event_id for _, folder in folders)

    def close(self, *, empty: bool) -> None:
        """Give everything back.

        Args:
            empty: Whether all events of the lane are in segments, so that its ids may begin at the clock next time.
        """
        with contextlib.ExitStack() as rest:
            # Also when the disk does not even give a lock.
            rest.callback(self._store_lock.release)
            rest.callback(self.registry.close)
            rest.callback(self.lane.end)
            rest.callback(self.catalogue.close)
            with self.checkpoint_lock():
                with contextlib.suppress(OSError, sqlite3.Error):
                    # What cannot be sealed now is taken as it is by the next opening.
                    self.segments.close()
                self.catalogue.close()
            if empty:
                with contextlib.suppress(OSError):
                    self.lane.settle()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
