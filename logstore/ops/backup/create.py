"""Backups: a manifest over a pool of content-addressed files.

Every backup is complete in itself, and copies only what the pool lacks: sealed segments are named by the SHA-256 that
the catalogue has, so that one which is there already is not even read. The catalogue itself is not copied: a restore
verifies every byte anyway, and indexes in that pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from logstore.errors import DamageError, StoreClosedError
from logstore.ops.backup.cut import Cut, JournalMark, SegmentMark, count_live, count_unknown, dropped_streams, take_cut
from logstore.ops.backup.manifest import BACKUP_VERSION, Kind, Manifest, StoredFile, encode_manifest, manifest_key
from logstore.ops.backup.pool import OtherBytesError, Target, object_key, read_pieces, verified, wait_for_lock
from logstore.ops.pace import Pace
from logstore.ops.progress import Progress, silent
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_JOURNAL, decode_header
from logstore.storage.journal import JournalReader
from logstore.storage.opening import OpenStore
from logstore.storage.record import decode_stamp, iter_frames
from logstore.storage.registry import Registry
from logstore.storage.segment import iter_segment
from logstore.version import __version__

logger = logging.getLogger("logstore")

_DAY_S: Final = 86_400
_WEEK_DAYS: Final = 7
_DAY_DIGITS: Final = 4
"""Digits of a digest that tell on which day of the week the object is read."""
_EMPTY: Final = hashlib.sha256().hexdigest()


class BackupResult(NamedTuple):
    """A backup that was made.

    Attributes:
        path: Where its manifest is: what `restore` takes.
        bytes_copied: Bytes that the pool lacked.
        bytes_reused: Bytes that it had.
        files: Files of the store.
        events: Events that the backup holds.
        damaged: What was damaged in the store, file by file, with the reason.
    """

    path: str
    bytes_copied: int
    bytes_reused: int
    files: int
    events: int
    damaged: tuple[str, ...]


def create_backup(store: OpenStore, target: Target, *, progress: Progress = silent) -> BackupResult:
    """Copy a store as it is now, while it is written. On return the backup is on disk.

    What it copies is verified; of what earlier backups have, a seventh, so that each object is read once a week. In a
    process that has a log open it rests for two thirds of the time, see `Pace`.

    It holds every event that was acknowledged when the call began, none that was never acknowledged, and of each
    stream a prefix. Damaged files are copied as they are; the manifest and the result name them.

    Args:
        store: The open store: that of a running log, or one of `open_existing`.
        target: Where the backup goes.
        progress: Told of the bytes.

    Raises:
        StoreLockedError: Somebody removes files of the store, or old backups, and does not get on.
        StoreClosedError: The store is about to be closed; the next backup uses what was copied.
        DamageError: The catalogue cannot be read.
        OSError: The store cannot be read, or the target refuses.
    """
    try:
        with contextlib.ExitStack() as held:
            held.enter_context(target.adding())
            # Shared: what the catalogue names now stays until it is copied.
            held.enter_context(wait_for_lock(store.disk, store.root / "removal.lock", shared=True))
            store.adopt_dead_lanes()
            return _Copy(store, target, progress).run(take_cut(store, held))
    except sqlite3.Error as error:
        raise DamageError(
            store.catalogue.path, 0, 0, f"SQLite says: {error}; `logstore reindex` makes the catalogue again"
        ) from error


class _UnreadableError(Exception):
    """The store's own disk refuses to give a file."""


class _Copy:
    """One backup under way."""

    def __init__(self, store: OpenStore, target: Target, progress: Progress) -> None:
        self._store = store
        self._disk = store.disk
        self._target = target
        self._progress = progress
        self._pace = Pace.of(store)
        self._files: list[StoredFile] = []
        self._ids: set[int] = set()
        self._total = 0
        self._copied = 0
        self._reused = 0
        self._day = int(time.time() // _DAY_S) % _WEEK_DAYS

    def run(self, cut: Cut) -> BackupResult:
        # The smallest first: what they count needs the index as it was, and that keeps SQLite from tidying up.
        self._registry(cut.registry)
        for journal in cut.journals:
            self._journal(journal)
        if dropped := dropped_streams(cut.catalogue):
            self._bring_data("dropped", "dropped", dropped, None, "")
        events = count_live(cut.catalogue) + count_unknown(cut.catalogue, self._ids)
        cut.catalogue.close()
        self._total = self._copied + self._reused + sum(segment.bytes for segment in cut.segments)
        for segment in cut.segments:
            if self._store.stopping.is_set():
                raise StoreClosedError(f"{self._store.root} is being closed, its backup was given up")
            if segment.sha256 is None:
                self._open_segment(segment)
            else:
                self._sealed_segment(segment, segment.sha256)
        # The manifest must not be there before everything that it names is.
        self._target.sync()
        key = self._publish(cut, events)
        damaged = tuple(f"{file.path}: {file.reason}" for file in self._files if file.damaged)
        for line in damaged:
            logger.error("copied into the backup %s though it is damaged: %s", key, line)
        path = self._target.locate(key)
        return BackupResult(path, self._copied, self._reused, len(self._files), events, damaged)

    def _publish(self, cut: Cut, events: int) -> str:
        begun = cut.begun
        while self._target.size(manifest_key(begun)) is not None:
            begun += timedelta(microseconds=1)
        manifest = Manifest(
            version=BACKUP_VERSION,
            store_id=self._store.store_id,
            engine=__version__,
            begun=begun.isoformat(),
            finished=datetime.now(UTC).isoformat(),
            files=self._files,
            lanes=cut.lanes,
            events=events,
            bytes=sum(file.bytes for file in self._files),
        )
        self._target.put(manifest_key(begun), [encode_manifest(manifest)])
        self._target.sync()
        return manifest_key(begun)

    def _registry(self, data: bytes) -> None:
        reason = ""
        # Read as an opening reads it, elsewhere: there is one reader of this format.
        with tempfile.TemporaryDirectory(prefix="logstore-") as folder:
            Path(folder, "registry.log").write_bytes(data)
            registry = Registry(Disk(), Path(folder))
            try:
                registry.open(self._store.store_id)
            except DamageError as error:
                reason = str(error)
            finally:
                registry.close()
        self._bring_data("registry", "registry.log", data, None, reason)

    def _journal(self, journal: JournalMark) -> None:
        """Bring what is visible of a journal."""
        path = self._store.root / journal.file
        try:
            size = self._disk.size(journal.fd)
            data = self._disk.read(journal.fd, size if journal.end is None else min(size, journal.end), 0)
        except OSError as error:
            self._bring_unreadable("journal", journal.file, str(error))
            return
        ids: set[int] = set()
        try:
            end = _journal_end(data, path, ids, self._pace)
        except DamageError as error:
            self._bring_data("journal", journal.file, data, None, str(error))
            return
        self._ids |= ids
        if journal.end is None and not data[end:].strip(b"\0"):
            # Zeros written ahead.
            data = data[:end]
        reason = f"{len(data) - end} bytes at offset {end} hold no whole batch" if end < len(data) else ""
        self._bring_data("journal", journal.file, data, len(ids), reason)

    def _open_segment(self, segment: SegmentMark) -> None:
        """Bring what the catalogue knows of a segment that is still being written; its checksums are the frames'."""
        path = self._store.root / segment.file
        try:
            data = b"".join(read_pieces(self._disk, path, segment.bytes))
        except OSError as error:
            self._bring_unreadable("segment", segment.file, str(error))
            return
        reason, end = "", HEADER_BYTES
        try:
            for offset, frame in iter_segment(data, path):
                end = offset + len(frame)
                self._pace.step()
            if end != segment.bytes:
                reason = f"{segment.bytes - end} bytes at offset {end} are not what was written"
        except DamageError as error:
            reason = str(error)
        self._bring_data("segment", segment.file, data, segment.events, reason)

    def _sealed_segment(self, segment: SegmentMark, digest: str) -> None:
        path = self._store.root / segment.file
        reason = ""
        size = segment.bytes
        try:
            try:
                self._bring(digest, size, self._pieces(path, size), segment.file)
            except OtherBytesError as error:
                reason = str(error)
                digest, size = _digest(self._pieces(path, size))
                self._bring(digest, size, self._pieces(path, size), segment.file)
        except _UnreadableError as error:
            self._bring_unreadable("segment", segment.file, str(error))
            return
        self._add("segment", segment.file, size, digest, segment.events, reason)

    def _pieces(self, path: Path, size: int) -> Iterator[bytes]:
        try:
            for piece in read_pieces(self._disk, path, size):
                yield piece
                self._pace.step()
        except OSError as error:
            raise _UnreadableError(str(error)) from error

    def _bring_unreadable(self, kind: Kind, file: str, reason: str) -> None:
        """Say in the backup that a file is lost; the rest of the store is worth having."""
        self._bring(_EMPTY, 0, (), file)
        self._add(kind, file, 0, _EMPTY, None, f"cannot be read: {reason}")

    def _bring_data(self, kind: Kind, file: str, data: bytes, events: int | None, reason: str) -> None:
        digest = hashlib.sha256(data).hexdigest()
        self._bring(digest, len(data), (data,), file)
        self._add(kind, file, len(data), digest, events, reason)

    def _add(self, kind: Kind, file: str, size: int, digest: str, events: int | None, reason: str) -> None:
        self._files.append(
            StoredFile(
                kind=kind, path=file, bytes=size, sha256=digest, events=events, damaged=bool(reason), reason=reason
            )
        )
        if kind == "segment":
            self._progress("copying segments", self._copied + self._reused, self._total)

    def _bring(self, digest: str, size: int, pieces: Iterable[bytes], what: str) -> None:
        """Put an object into the pool, unless it is there."""
        key = object_key(digest)
        if self._target.size(key) == size and self._is_whole(key, digest):
            self._reused += size
        else:
            self._target.put(key, verified(pieces, digest, what))
            self._copied += size
        self._pace.step()

    def _is_whole(self, key: str, digest: str) -> bool:
        """Whether an object of the pool is what it was; each is read on one day of the week, on others believed."""
        if int(digest[:_DAY_DIGITS], 16) % _WEEK_DAYS != self._day:
            return True
        try:
            for _ in verified(self._target.read(key), digest, key):
                self._pace.step()
        except (OtherBytesError, OSError) as error:
            logger.error("an object of the backups is damaged, and copied again: %s", error)
            return False
        return True


def _journal_end(data: bytes, path: Path, ids: set[int], pace: Pace) -> int:
    """Collect the ids of a journal's events, and return where its last whole batch ends."""
    header = decode_header(data, path, KIND_JOURNAL)
    reader = JournalReader(header, data[:HEADER_BYTES])
    for batch in reader.batches(data):
        ids.update(decode_stamp(frame).id for _, frame in iter_frames(batch.body, header.seed))
        pace.step()
    return reader.offset


def _digest(pieces: Iterable[bytes]) -> tuple[str, int]:
    found = hashlib.sha256()
    size = 0
    for piece in pieces:
        found.update(piece)
        size += len(piece)
    return found.hexdigest(), size
