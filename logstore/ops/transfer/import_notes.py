"""Where imported events came from, as the catalogue's table `imports` has it.

It is derived like the rest of the catalogue: the events themselves say it too.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from typing import Final

from logstore.storage.database import connect
from logstore.storage.files import Disk
from logstore.storage.header import frame_seed
from logstore.storage.opening import OpenStore
from logstore.storage.origin import split_origin
from logstore.storage.record import FLAG_IMPORTED, Event, decode_frame, decode_stamp, salvage_frames
from logstore.storage.segment import segment_numbers, segment_path

BEFORE: Final = "(before)"
"""The source under which it is noted that an event's predecessor was not imported: its absence is no damage."""
Origin = tuple[str, str]
"""Source and source id of an event; see `logstore.storage.origin`."""


def origin_of(event: Event) -> Origin | None:
    """Return where an event came from, None when it was not imported from another kind of store."""
    if not event.flags & FLAG_IMPORTED:
        return None
    try:
        source, source_id, _ = split_origin(event.payload)
    except ValueError:
        return None
    return source, source_id


def remake_imports(store: OpenStore, disk: Disk) -> int:
    """Note again, from the events themselves, which foreign event became which, and return how many there are.

    For a catalogue that was lost and made again from the log. Reads every segment.

    Raises:
        OSError, sqlite3.Error: The disk or the catalogue refused.
    """
    total = 0
    seed = frame_seed(store.store_id)
    for number in segment_numbers(disk, store.root):
        try:
            data = disk.read_file(segment_path(store.root, number))
        except FileNotFoundError:
            # Retention was faster.
            continue
        frames = (frame for _, frame in salvage_frames(data, seed) if decode_stamp(frame).flags & FLAG_IMPORTED)
        events = [(origin_of(event), event.id) for event in map(decode_frame, frames)]
        rows = [(*origin, event_id) for origin, event_id in events if origin is not None]
        if rows:
            with store.checkpoint_lock(), closing(connect(store.catalogue.path, write=True)) as database:
                note_origins(database, rows)
        total += len(rows)
    return total


def note_origins(database: sqlite3.Connection, rows: Iterable[tuple[str, str, int]]) -> None:
    """Write where events came from; on return it is on disk. The caller holds the checkpoint lock."""
    database.execute("BEGIN IMMEDIATE")
    try:
        database.executemany("INSERT OR REPLACE INTO imports VALUES (?, ?, ?)", rows)
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
