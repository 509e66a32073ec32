"""Ways into a store from outside the process that serves it.

`StoreView` looks and changes nothing, whoever else has the store open and whatever is damaged. `open_existing` opens a
store for work on it, as one more process beside those that serve it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from logstore.config import DEFAULT_DB_PATH
from logstore.errors import DamageError, GapError, NotAStoreError, StoreLockedError
from logstore.ops.index_errors import index_errors
from logstore.storage.catalogue import Catalogue, StreamSummary
from logstore.storage.database import inspect_file
from logstore.storage.files import Disk, Lock, lock_holders
from logstore.storage.foreign import Foreign
from logstore.storage.header import HEADER_BYTES, KIND_JOURNAL, KIND_REGISTRY, KIND_SEGMENT, decode_header, frame_seed
from logstore.storage.lane import journal_ordinals, journal_path, lane_folders
from logstore.storage.opening import OpenStore, log_folder
from logstore.storage.options import LogOptions, Retention
from logstore.storage.reader import Reader, contiguous
from logstore.storage.record import FIRST_PAGE_EVENTS, Event, next_page_events
from logstore.storage.replacement import is_replacing
from logstore.storage.segment import segment_numbers, segment_path


def find_store(path: Path) -> Path:
    """Return the log folder of the store at a path.

    Raises:
        NotAStoreError: There is no store, or the path is something else.
    """
    root = log_folder(path)
    if is_replacing(root):
        # Between the old store and the new one; both are there.
        return root
    try:
        found = inspect_file(path, look_only=True)
    except sqlite3.Error:
        # Something is there. Why it cannot be read is for whoever opens it to tell.
        return root
    if found == "absent" and not (root / "registry.log").exists() and not (root / "segments").is_dir():
        example = path / "events.db" if path.is_dir() else DEFAULT_DB_PATH
        raise NotAStoreError(f"there is no store at {path}: give the path of its catalogue, such as {example}")
    return root


def open_existing(path: Path, disk: Disk | None = None) -> OpenStore:
    """Open a store for work on it; what dead processes left is recovered first. Close it with `close(empty=True)`.

    Raises:
        NotAStoreError: There is no store at the path.
        LogstoreError: As `OpenStore`.
    """
    find_store(path)
    return OpenStore(disk or Disk(), path, LogOptions().segment_bytes)


class StoreView:
    """A look at a store that changes nothing, also while other processes write it.

    Args:
        path: The catalogue.
        disk: The file door.

    Attributes:
        path: The catalogue.
        root: The log folder.
        store_id: Of the store; None when no file says.
        catalogue: The index, open for reading when `catalogue_error` is None.
        catalogue_error: Why the index cannot be read.
    """

    def __init__(self, path: Path, disk: Disk | None = None) -> None:
        self.path = path
        self.disk = disk or Disk()
        self.root = find_store(path)
        self.catalogue = Catalogue(path)
        self.catalogue_error: str | None = None
        self.store_id: int | None = None
        self._lock: Lock | None = None
        self._foreign = Foreign(self.disk, self.root, own=None)

    def __enter__(self) -> Self:
        """Open what there is to look at.

        Raises:
            StoreLockedError: A restore is under way.
            FormatVersionError: A newer release wrote the store.
        """
        self._lock = self._share_store()
        self.store_id = self._find_store_id()
        try:
            if inspect_file(self.path, look_only=True) == "ours":
                self.catalogue.look()
            else:
                self.catalogue_error = f"{self.path} is missing, or no database any more"
        except (sqlite3.Error, OSError) as error:
            self.catalogue_error = f"{self.path} cannot be read: {error}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close everything."""
        self._foreign.close()
        self.catalogue.close()
        if self._lock is not None:
            self._lock.release()

    def _share_store(self) -> Lock | None:
        path = self.root / "store.lock"
        try:
            lock = self.disk.lock(path, shared=True, create=False)
        except FileNotFoundError:
            # Nobody has it open, nor had: a folder that was copied, say.
            return None
        if lock is None:
            pids = lock_holders(path)
            raise StoreLockedError(f"{self.path} is being replaced by process {pids}; try again when it is done", pids)
        if is_replacing(self.root):
            lock.release()
            raise StoreLockedError(
                f"a restore of {self.path} was interrupted; the next server that opens it, or another "
                "restore, finishes it"
            )
        return lock

    def _find_store_id(self) -> int | None:
        files = [(self.root / "registry.log", KIND_REGISTRY)]
        files += [(segment_path(self.root, number), KIND_SEGMENT) for number in segment_numbers(self.disk, self.root)]
        files += [
            (journal_path(folder, ordinal), KIND_JOURNAL)
            for _, folder in lane_folders(self.disk, self.root)
            for ordinal in journal_ordinals(self.disk, folder)
        ]
        for path, kind in files:
            try:
                fd = self.disk.open(path)
            except FileNotFoundError:
                continue
            with contextlib.ExitStack() as undo:
                undo.callback(self.disk.close, fd)
                with contextlib.suppress(DamageError, OSError):
                    return decode_header(self.disk.read(fd, HEADER_BYTES, 0), path, kind).store_id
        return None

    @property
    def seed(self) -> int:
        """Start value of the checksums of the store's frames.

        Raises:
            DamageError: No file says which store this is.
        """
        if self.store_id is None:
            raise DamageError(self.root, 0, 0, "neither the registry nor a segment has a header that can be read")
        return frame_seed(self.store_id)

    def indexed(self) -> Catalogue:
        """Return the index.

        Raises:
            DamageError: It cannot be read.
        """
        if self.catalogue_error is not None:
            raise DamageError(self.path, 0, 0, f"{self.catalogue_error}. `logstore reindex {self.path}` makes it again")
        return self.catalogue

    @property
    def reader(self) -> Reader:
        """What reads streams, from segments and from the journals of all lanes."""
        return Reader(self.disk, self.root, self.indexed(), self._foreign, self.seed, Retention())

    def moves(self) -> int:
        """Return a number that grows whenever something was appended."""
        return self._foreign.moves()

    def read(self, stream: str, after: int, limit: int) -> list[Event]:
        """Return a stream's first events after an id, 0 for none, in order.

        Raises:
            GapError: The next event existed and is gone.
            DamageError: The catalogue cannot be read.
        """
        return contiguous(stream, after, self.reader.read(stream, after, limit, ()).events)

    def events(self, stream: str, after: int = 0) -> Iterator[Event]:
        """Yield all events of a stream after an id, page by page.

        Raises:
            GapError, DamageError: As `read`.
        """
        limit = FIRST_PAGE_EVENTS
        while events := self.read(stream, after, limit):
            yield from events
            after, limit = events[-1].id, next_page_events(events)

    def streams_in_journals(self) -> dict[str, list[int]]:
        """Return the ids of the events in journals, ascending, by stream; they may be in segments by now."""
        self._foreign.read_on()
        return self._foreign.ids_by_stream()

    def summaries(self) -> list[StreamSummary]:
        """Return the totals of every stream, those events included that are not in segments yet.

        Raises:
            DamageError: The catalogue cannot be read.
        """
        fresh = self.streams_in_journals()
        # Asked after the journals: what is checkpointed in between is in both, and told apart by its id.
        with index_errors(self.path):
            totals = {summary.stream: summary for summary in self.indexed().summaries()}
        for stream, ids in fresh.items():
            known = totals.get(stream)
            after = int(known.last_id) if known else 0
            new = self._read_new(stream, after) if ids[-1] > after else []
            if new:
                totals[stream] = _extended(known, stream, new)
        return list(totals.values())

    def _read_new(self, stream: str, after: int) -> list[Event]:
        try:
            return list(self.events(stream, after))
        except GapError:
            # Retention was faster.
            return []


def _extended(known: StreamSummary | None, stream: str, new: list[Event]) -> StreamSummary:
    size = sum(len(event.payload) for event in new)
    return StreamSummary(
        stream=stream,
        events=(known.events if known else 0) + len(new),
        first_id=known.first_id if known else new[0].event_id,
        last_id=new[-1].event_id,
        first_time_us=known.first_time_us if known else new[0].time_us,
        last_time_us=new[-1].time_us,
        bytes=(known.bytes if known else 0) + size,
    )
