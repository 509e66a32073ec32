"""One pass of retention and compaction over a store that is in use.

Retention drops whole runs and, with the last of them, whole segments. What that leaves half dead is written anew, small
finished segments are gathered in packs, and a stream that has grown in packs gets files of its own. Only one process
does it at a time; readers, writers and checkpoints go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from logstore.errors import DamageError, FormatVersionError, StoreLockedError, WriteFailedError
from logstore.ops.access import open_existing
from logstore.ops.compaction.retention import Dropped, drop, planned
from logstore.ops.compaction.rewrite import OWN_FILE_BYTES, Moving, Rewriter
from logstore.ops.compaction.sweep import Swept, remove_unpublished_segments, sweep
from logstore.ops.pace import Pace
from logstore.ops.progress import Progress, silent
from logstore.storage.catalogue import Extent
from logstore.storage.database import connect
from logstore.storage.files import Disk, is_disk_full, lock_holders
from logstore.storage.header import HEADER_BYTES, KIND_SEGMENT, decode_header
from logstore.storage.opening import OpenStore, log_folder, reserve_path
from logstore.storage.options import MIB, Retention
from logstore.storage.segment import segment_path

logger = logging.getLogger("logstore")

_SEGMENT_BYTES: Final = 8 * MIB
_SMALL_BYTES: Final = 1 * MIB
_MOST_SMALL: Final = 2_000
"""Small segments that are left alone: packing a handful would be work for nothing."""
_KEPT_SMALL: Final = 1_000
_JOINED_FILES: Final = 4
"""Small files of one stream that are worth to be written as one."""
_MOST_TWICE_BYTES: Final = 64 * MIB
_RAGGED: Final = "ragged"
_GROWN_RUNS: Final = 16
_GROWN_BYTES: Final = 1 * MIB
"""A stream with as many runs in packs, and as many bytes, gets a file of its own."""


class Compacted(NamedTuple):
    """What a pass did.

    Attributes:
        dropped: What retention dropped, by rule; with a dry run, what it would drop.
        moved_events: Events that were moved to new segments.
        moved_bytes: Their bytes.
        new_segments: Segments written.
        removed_segments: Segment files removed.
        removed_bytes: Their bytes.
        waiting_segments: Segments without a live event that a backup under way still copies.
        damaged_segments: Segments that cannot be read whole; they stay as they are.
        seconds: Time it took.
    """

    dropped: list[Dropped]
    moved_events: int
    moved_bytes: int
    new_segments: int
    removed_segments: int
    removed_bytes: int
    waiting_segments: int
    damaged_segments: list[int]
    seconds: float


def compact(
    store: OpenStore,
    retention: Retention,
    *,
    dry_run: bool = False,
    segment_bytes: int = _SEGMENT_BYTES,
    progress: Progress = silent,
) -> Compacted:
    """Drop what retention lets go, and compact the segments. Ends early when the store is to be closed.

    On return what was dropped and moved is on disk as such; a crash at any moment leaves each event either dropped, or
    in its old or its new place. In a process that has a log open it rests for two thirds of the time, see `Pace`.

    Args:
        store: The open store.
        retention: What is kept.
        dry_run: Only say what would be dropped.
        segment_bytes: Size of the segments that are written.
        progress: Told how far it is.

    Raises:
        StoreLockedError: Another process does it, with its pid.
        IndexReplacedError: The index was made again meanwhile; what was done is done.
        OSError, sqlite3.Error: The disk or the catalogue refused; likewise.
    """
    started = time.monotonic()
    now_us = time.time_ns() // 1000
    if dry_run:
        with planned(store, retention, now_us) as plan:
            return Compacted(plan.figures(), 0, 0, 0, 0, 0, 0, [], time.monotonic() - started)
    lock = store.compaction_lock()
    if lock is None:
        pids = lock_holders(store.root / "compaction.lock")
        raise StoreLockedError(f"process {pids} compacts {store.root} at this moment; it is done for all", pids)
    with lock:
        try:
            done = _pass(store, retention, now_us, segment_bytes, progress)
        except (OSError, sqlite3.Error) as error:
            if not is_disk_full(error) or not give_reserve(store.disk, store.root):
                raise
            # Dropping needs a little room to make a lot of it.
            done = _pass(store, retention, now_us, segment_bytes, progress)
        store.keep_reserve()
    return done._replace(seconds=time.monotonic() - started)


def compact_at(path: Path, retention: Retention, *, dry_run: bool = False, progress: Progress = silent) -> Compacted:
    """Open the store at a path, `compact` it, and close it. Works on a full disk too, once.

    Raises:
        NotAStoreError: There is no store at the path.
        LogstoreError, OSError, sqlite3.Error: As `OpenStore` and `compact`.
    """
    try:
        store = open_existing(path)
    except WriteFailedError as error:
        full = error.__cause__ is not None and is_disk_full(error.__cause__)
        if not full or not give_reserve(Disk(), log_folder(path)):
            raise
        store = open_existing(path)
    try:
        return compact(store, retention, dry_run=dry_run, progress=progress)
    finally:
        store.close(empty=True)


def give_reserve(disk: Disk, root: Path) -> bool:
    """Give back the room that is kept for retention; False when there is none."""
    path = reserve_path(root)
    there = path.exists()
    disk.unlink(path)
    if there:
        logger.warning("the disk is full: what was kept in reserve is given to retention")
    return there


def _pass(store: OpenStore, retention: Retention, now_us: int, segment_bytes: int, progress: Progress) -> Compacted:
    pace = Pace.of(store)
    remove_unpublished_segments(store)
    dropped, inode = _drop(store, retention, now_us, pace, progress)
    ragged = _close_abandoned(store, inode, pace)
    # Room first: what retention let go makes place for what is written anew.
    swept = [sweep(store, inode, (), pace, progress)]
    rewriter = Rewriter(store, inode, segment_bytes, pace)
    with contextlib.closing(connect(store.catalogue.path, write=False)) as reader:
        _choose(reader, ragged, segment_bytes)
        runs = _runs_to_move(reader, progress)
        # What is moved is there twice until its old place is removed.
        while rewriter.move(runs, _MOST_TWICE_BYTES):
            swept.append(sweep(store, inode, ragged, pace, progress))
    if rewriter.segments or ragged:
        swept.append(sweep(store, inode, ragged, pace, progress))
    return _result(dropped, rewriter, swept)


def _result(dropped: list[Dropped], rewriter: Rewriter, swept: list[Swept]) -> Compacted:
    return Compacted(
        dropped=dropped,
        moved_events=rewriter.events,
        moved_bytes=rewriter.bytes,
        new_segments=rewriter.segments,
        removed_segments=sum(each.segments for each in swept),
        removed_bytes=sum(each.bytes for each in swept),
        waiting_segments=swept[-1].waiting,
        damaged_segments=sorted(rewriter.damaged),
        seconds=0.0,
    )


def _drop(
    store: OpenStore, retention: Retention, now_us: int, pace: Pace, progress: Progress
) -> tuple[list[Dropped], int]:
    """Drop what retention lets go; return what, and the inode of the index that was worked on."""
    with planned(store, retention, now_us) as plan:
        figures = plan.figures()
        done = 0
        for runs in plan.slices():
            if store.stopping.is_set():
                break
            drop(store, runs, plan.inode)
            pace.step()
            done += len(runs)
            progress("runs dropped", done, None)
        return figures, plan.inode


def _close_abandoned(store: OpenStore, inode: int, pace: Pace) -> set[int]:
    """Seal the segments that dead processes left open; return those that hold more than the index knows."""
    with contextlib.closing(connect(store.catalogue.path, write=False)) as reader:
        rows = reader.execute("SELECT segment_id, bytes FROM segments WHERE sealed = 0 AND dropped = 0").fetchall()
    ragged: set[int] = set()
    whole: list[tuple[int, str]] = []
    for segment_id, size in rows:
        try:
            digest = _end_of_abandoned(store, segment_id, size)
            pace.step()
        except (DamageError, FormatVersionError, OSError) as error:
            # For verify to report, and for repair to mend; what is well is compacted all the same.
            logger.error("segment %d stays as it is: %s", segment_id, error)
            continue
        if digest == _RAGGED:
            ragged.add(segment_id)
        elif digest is not None:
            whole.append((segment_id, digest))
    if whole:
        with store.changing_catalogue(inode) as catalogue:
            catalogue.seal_segments(whole)
    return ragged


def _end_of_abandoned(store: OpenStore, segment_id: int, size: int) -> str | None:
    """Return the SHA-256 of a segment that nobody writes any more, `_RAGGED` when more is in it than the index knows.

    None while its writer lives.
    """
    path = segment_path(store.root, segment_id)
    fd = store.disk.open(path)
    try:
        incarnation = decode_header(store.disk.read(fd, HEADER_BYTES, 0), path, KIND_SEGMENT).incarnation
        if incarnation == store.lane.incarnation or store.is_alive(incarnation):
            return None
        if store.disk.size(fd) != size:
            return _RAGGED
        return hashlib.sha256(store.disk.read(fd, size, 0)).hexdigest()
    finally:
        store.disk.close(fd)


def _choose(reader: sqlite3.Connection, ragged: set[int], segment_bytes: int) -> None:
    """Note in a temporary table which segments are to be emptied, and which streams gathered from packs."""
    reader.execute("CREATE TEMP TABLE emptied (segment_id INTEGER PRIMARY KEY)")
    reader.executemany("INSERT INTO emptied VALUES (?)", ((segment_id,) for segment_id in ragged))
    reader.execute(
        """
        INSERT OR IGNORE INTO emptied
        SELECT segment_id FROM segments
        JOIN (SELECT segment_id, sum(length) AS live FROM extents GROUP BY segment_id) USING (segment_id)
        WHERE sealed = 1 AND dropped = 0 AND live * 2 < bytes
        """
    )
    small = min(_SMALL_BYTES, segment_bytes // 2)
    # Written anew, the only file of a stream that is worth one would be the same again.
    reader.execute(
        """
        CREATE TEMP TABLE small AS SELECT segment_id FROM (
            SELECT segment_id, stream_id, bytes, count(*) OVER (PARTITION BY stream_id) AS files
            FROM segments WHERE sealed = 1 AND dropped = 0 AND bytes < ?)
        WHERE stream_id IS NULL OR bytes < ? OR files >= ?
        """,
        (small, OWN_FILE_BYTES, _JOINED_FILES),
    )
    (count,) = reader.execute("SELECT count(*) FROM small").fetchone()
    if count > _MOST_SMALL:
        reader.execute(
            "INSERT OR IGNORE INTO emptied SELECT segment_id FROM small ORDER BY segment_id LIMIT ?",
            (count - _KEPT_SMALL,),
        )
    reader.execute(
        """
        CREATE TEMP TABLE gathered AS
        SELECT extents.stream_id FROM extents JOIN segments USING (segment_id)
        WHERE segments.stream_id IS NULL AND sealed = 1 AND dropped = 0
        GROUP BY extents.stream_id HAVING count(*) >= ? AND sum(length) >= ?
        """,
        (_GROWN_RUNS, _GROWN_BYTES),
    )


def _runs_to_move(reader: sqlite3.Connection, progress: Progress) -> Iterator[Moving]:
    """Yield the runs of the chosen segments and streams, by stream and in order."""
    # In a temporary table: a read of the index that lasts would keep SQLite from starting its own log anew.
    reader.execute(
        """
        CREATE TEMP TABLE moving AS
        SELECT extents.*, sum(length) OVER (PARTITION BY extents.stream_id) AS stream_bytes
        FROM extents JOIN segments USING (segment_id)
        WHERE segment_id IN (SELECT segment_id FROM emptied)
        OR (segments.stream_id IS NULL AND sealed = 1 AND dropped = 0
            AND extents.stream_id IN (SELECT stream_id FROM gathered))
        """
    )
    (total,) = reader.execute("SELECT count(*) FROM moving").fetchone()
    for done, row in enumerate(reader.execute("SELECT * FROM moving ORDER BY stream_id, first_id")):
        progress("runs moved", done, total)
        yield Moving(Extent(*row[:-1]), row[-1])
