"""Import: events from an export of ours, from the original event store, and from mcp-persist.

Events of ours keep their ids. A foreign event gets an id of this store, keeps its time, and says in its record where it
came from, so that importing twice adds nothing twice. Events do not go through the journal: they are written as a
checkpoint writes, batch by batch, each batch durable and indexed before the next one begins. After a crash at any
moment importing once more adds the rest.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Final

from logstore.errors import WriteFailedError
from logstore.ops.progress import Progress, silent
from logstore.ops.transfer.import_sources import Found, ImportSource, LeftOut
from logstore.ops.transfer.imported_batch import BatchResult, BatchWriter, announce
from logstore.storage.files import Disk
from logstore.storage.opening import OpenStore
from logstore.storage.options import LogOptions

_BATCH_EVENTS: Final = 5_000
_BATCH_BYTES: Final = 4 << 20
_LISTED: Final = 1_000


@dataclass
class ImportResult:
    """What an import did.

    Attributes:
        added: Events that were added; they are on disk.
        already_there: Events that the store had, the same.
        dropped: Events that this store's retention has dropped; they stay away.
        conflicts: Events of which the store has another under the same id; the first thousand.
        conflict_count: How many.
        invalid: Events that cannot be stored; the first thousand.
        invalid_count: How many.
        ended: Why reading ended early; what comes before that place was imported.
    """

    added: int = 0
    already_there: int = 0
    dropped: int = 0
    conflicts: list[LeftOut] = field(default_factory=list[LeftOut])
    conflict_count: int = 0
    invalid: list[LeftOut] = field(default_factory=list[LeftOut])
    invalid_count: int = 0
    ended: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the store now has everything that the source holds, but for what retention dropped."""
        return not (self.conflict_count or self.invalid_count or self.ended)

    def leave_out(self, invalid: LeftOut) -> None:
        """Note an event that cannot be stored."""
        self.invalid_count += 1
        if len(self.invalid) < _LISTED:
            self.invalid.append(invalid)

    def count(self, batch: BatchResult) -> None:
        """Add what became of a batch."""
        self.added += batch.added
        self.already_there += batch.already_there
        self.dropped += batch.dropped
        self.conflict_count += len(batch.conflicts)
        self.conflicts += batch.conflicts[: _LISTED - len(self.conflicts)]
        for invalid in batch.invalid:
            self.leave_out(invalid)


def import_events(
    path: Path, source: Path | IO[bytes], *, progress: Progress = silent, disk: Disk | None = None
) -> ImportResult:
    """Import events into a store, which is made when there is none; others may have it open.

    A stream has one writer at a time: foreign events that come into a stream which a running server writes are behind
    what that server writes to it in the next two seconds.

    Args:
        path: The catalogue of the store.
        source: A file or a stream of JSON, or the path of a SQLite database; what it is, its content tells.
        progress: Told how many events are read.
        disk: The file door.

    Raises:
        BrokenJsonError: The source does not even begin as JSON; no store was made.
        NotAStoreError: The source is a database that is not known; or the path cannot hold a store.
        FormatVersionError: A newer release wrote the source, or the store.
        DamageError: SQLite cannot read the source.
        WriteFailedError: The disk refuses; what was added stays, and importing again adds the rest.
        OSError: The source cannot be read.
    """
    disk = disk or Disk()
    opened = ImportSource(source)
    with closing(opened):
        events = opened.events()
        # Before a store is made: a source that is none leaves nothing behind.
        first = next(events, None)
        result = ImportResult()
        store = OpenStore(disk, path, LogOptions().segment_bytes)
        try:
            try:
                _import(store, disk, chain([] if first is None else [first], events), result, progress)
            finally:
                _close(store, disk, result)
        except (OSError, sqlite3.Error) as error:
            raise WriteFailedError(
                f"the import stopped after {result.added} events were added: {error}. They stay; import again for the "
                "rest"
            ) from error
        result.ended = opened.ended
    return result


def _import(
    store: OpenStore, disk: Disk, events: Iterable[Found | LeftOut], result: ImportResult, progress: Progress
) -> None:
    with closing(BatchWriter(store, disk)) as writer:
        batch: list[Found] = []
        size = 0
        for seen, each in enumerate(events, 1):
            if isinstance(each, LeftOut):
                result.leave_out(each)
                continue
            batch.append(each)
            size += len(each.event.payload)
            if len(batch) >= _BATCH_EVENTS or size >= _BATCH_BYTES:
                result.count(writer.write(batch))
                batch, size = [], 0
                progress("events read", seen, None)
        result.count(writer.write(batch))


def _close(store: OpenStore, disk: Disk, result: ImportResult) -> None:
    announced = True
    try:
        announced = result.added > 0 and announce(store, disk)
    finally:
        # A lane that showed something keeps what it has reserved: see `announce`.
        store.close(empty=not announced)
