"""What nobody needs any more goes: segments without a live event, their rows in the index, streams without events.

A segment is marked as dropped before its file goes, and its row goes last: whoever opens the store after a crash in
between does not take the file for one that the index forgot.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Collection
from typing import Final, NamedTuple

from logstore.ops.pace import Pace
from logstore.ops.progress import Progress
from logstore.storage.database import connect
from logstore.storage.ids import MAX_ID
from logstore.storage.opening import OpenStore
from logstore.storage.segment import UNPUBLISHED, segment_path

_SLICE_ROWS: Final = 20_000
"""Index rows looked at in one transaction: some ten milliseconds in which no checkpoint can commit."""
_SLICE_FILES: Final = 100
"""Files removed while no checkpoint can commit: each takes up to a millisecond."""
_FORGET: Final = "-1 day"
"""How long it is remembered what retention dropped of a stream without events: a follower may hold its last id."""


class Swept(NamedTuple):
    """What was given back.

    Attributes:
        segments: Segment files removed.
        bytes: Their bytes.
        waiting: Segments without a live event whose files a backup under way still copies.
    """

    segments: int
    bytes: int
    waiting: int


class _Dead(NamedTuple):
    segment_id: int
    bytes: int


def sweep(store: OpenStore, inode: int, ragged: Collection[int], pace: Pace, progress: Progress) -> Swept:
    """Remove the segments without a live event; the caller holds the compaction lock.

    Args:
        store: The store.
        inode: Of the catalogue that the caller works on.
        ragged: Segments of dead processes that were never sealed; they go like sealed ones.
        pace: When to rest.
        progress: Told how far it is.

    Raises:
        IndexReplacedError: The index was made again meanwhile.
        OSError, sqlite3.Error: The disk or the catalogue refused; what is left goes the next time.
    """
    with contextlib.closing(connect(store.catalogue.path, write=False)) as reader:
        _mark_empty(store, reader, inode, ragged)
        # Not on the word of one bit, which a damaged page may have turned.
        rows = reader.execute(
            """
            SELECT segment_id, bytes FROM segments
            WHERE dropped = 1 AND segment_id NOT IN (SELECT segment_id FROM extents)
            """
        )
        dead = [_Dead(*row) for row in rows]
        # Files first: on a full disk they are what makes room for the rest.
        removed = dead[: _remove_files(store, inode, dead, pace)]
        _sweep_rows(store, reader, inode, pace, progress)
        _forget(store, reader, inode, removed)
        pace.step()
    return Swept(len(removed), sum(each.bytes for each in removed), len(dead) - len(removed))


def _mark_empty(store: OpenStore, reader: sqlite3.Connection, inode: int, ragged: Collection[int]) -> None:
    rows = reader.execute(
        """
        SELECT segment_id, sealed FROM segments
        WHERE dropped = 0 AND segment_id NOT IN (SELECT segment_id FROM extents)
        """
    ).fetchall()
    empty = [(segment_id,) for segment_id, sealed in rows if sealed or segment_id in ragged]
    if empty:
        with store.changing_catalogue(inode) as catalogue:
            catalogue.connection.executemany("UPDATE segments SET dropped = 1 WHERE segment_id = ?", empty)


def _remove_files(store: OpenStore, inode: int, dead: list[_Dead], pace: Pace) -> int:
    """Remove files until a backup needs them, and return how many of them went, the first ones."""
    for start in range(0, len(dead), _SLICE_FILES):
        # For a slice only: a backup that wants to begin waits no longer.
        lock = store.removal_lock()
        if lock is None:
            return start
        with lock:
            # An index that was made again from these very files would name them.
            with store.changing_catalogue(inode):
                for each in dead[start : start + _SLICE_FILES]:
                    store.disk.unlink(segment_path(store.root, each.segment_id))
            store.disk.sync_folder(store.root / "segments")
        pace.step()
    return len(dead)


def _sweep_rows(store: OpenStore, reader: sqlite3.Connection, inode: int, pace: Pace, progress: Progress) -> None:
    """Delete the rows of events that only dropped segments held."""
    first, last = reader.execute(
        "SELECT coalesce(min(first_id), 0), coalesce(max(last_id), 0) FROM segments WHERE dropped = 1 AND events != 0"
    ).fetchone()
    done, looked = first - 1, 0
    while last and done < last and not store.stopping.is_set():
        step = reader.execute(
            "SELECT event_id FROM events WHERE event_id > ? ORDER BY event_id LIMIT 1 OFFSET ?", (done, _SLICE_ROWS)
        ).fetchone()
        upto = min(step[0], last) if step else last
        with store.changing_catalogue(inode) as catalogue:
            catalogue.connection.execute(
                """
                DELETE FROM events WHERE event_id > ? AND event_id <= ?
                AND segment_id IN (SELECT segment_id FROM segments WHERE dropped = 1)
                """,
                (done, upto),
            )
        done = upto
        looked += _SLICE_ROWS
        pace.step()
        progress("index rows looked at", looked, None)
    if last and done >= last:
        with store.changing_catalogue(inode) as catalogue:
            catalogue.connection.execute(
                "UPDATE segments SET events = 0 WHERE dropped = 1 AND first_id >= ? AND last_id <= ?", (first, last)
            )


def _forget(store: OpenStore, reader: sqlite3.Connection, inode: int, removed: list[_Dead]) -> None:
    """Delete the rows of removed segments, and of streams and sessions that nobody can ask for.

    A stream stays on record as long as a segment may hold frames of it, or rows point to it.
    """
    streams = reader.execute(
        """
        SELECT stream_id FROM streams WHERE dropped_at < datetime('now', ?)
        AND dropped_id < (SELECT coalesce(min(first_id), ?) FROM segments WHERE events != 0)
        AND NOT EXISTS (SELECT 1 FROM extents WHERE extents.stream_id = streams.stream_id) LIMIT ?
        """,
        (_FORGET, MAX_ID, _SLICE_ROWS),
    ).fetchall()
    sessions = reader.execute(
        "SELECT session_hash FROM sessions WHERE ended_at < datetime('now', ?) LIMIT ?", (_FORGET, _SLICE_ROWS)
    ).fetchall()
    if not (removed or streams or sessions):
        return
    with store.changing_catalogue(inode) as catalogue:
        connection = catalogue.connection
        connection.executemany(
            "DELETE FROM segments WHERE segment_id = ? AND dropped = 1 AND events = 0",
            ((each.segment_id,) for each in removed),
        )
        connection.executemany(
            """
            DELETE FROM streams WHERE stream_id = ?
            AND NOT EXISTS (SELECT 1 FROM extents WHERE extents.stream_id = streams.stream_id)
            """,
            streams,
        )
        connection.executemany("DELETE FROM sessions WHERE session_hash = ?", sessions)


def remove_unpublished_segments(store: OpenStore) -> None:
    """Remove segments that somebody began to write and died over; the caller holds the compaction lock."""
    folder = store.root / "segments"
    for name in store.disk.list(folder):
        if name.endswith(UNPUBLISHED):
            store.disk.unlink(folder / name)
