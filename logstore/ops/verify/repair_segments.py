"""A damaged segment: its bytes are kept aside, its whole events go to a new one, what is lost is put on record."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from logstore.errors import StoreLockedError
from logstore.ops.verify.index import Index, places, rows_of, segment_row, streams
from logstore.ops.verify.losses import Losses, iso_moment, lost_runs, record_losses
from logstore.ops.verify.report import Finding
from logstore.ops.verify.segments import check_segment
from logstore.storage.catalogue import Catalogue, Extent, SegmentRow
from logstore.storage.files import Disk, lock_holders
from logstore.storage.header import HEADER_BYTES, frame_seed
from logstore.storage.ids import lane_of
from logstore.storage.lane import Marks
from logstore.storage.opening import OpenStore
from logstore.storage.record import Stamp, decode_stamp, salvage_frames
from logstore.storage.segment import UNPUBLISHED, SegmentWriter, segment_path

_WRITE_BYTES: Final = 1 << 20
_PAGE_BYTES: Final = 4096


class Mended(NamedTuple):
    """A segment that was repaired.

    Attributes:
        file: The damaged file.
        kept_in: Where its bytes are; None when there was no file.
        reason: What was wrong.
        kept_events: Events that are in a new segment now.
        lost: Events that are gone, `(id, stream)`.
    """

    file: Path
    kept_in: Path | None
    reason: str
    kept_events: int
    lost: list[tuple[int, str]]


class _Kept(NamedTuple):
    stamp: Stamp
    frame: bytes


def mend_segment(store: OpenStore, index: Index, number: int) -> Mended | None:
    """Repair a segment; the caller holds the compaction lock.

    On return a new segment with the whole events is on disk, and the index points to it. A crash before that leaves the
    damaged one as it was; the copy of its bytes and the record of what is lost are there first.

    Returns:
        None when the segment is not damaged, or is gone.

    Raises:
        StoreLockedError: A process still writes this segment.
        IndexReplacedError: The index was made again meanwhile.
        OSError, sqlite3.Error: The disk or the catalogue refused; the segment is as it was.
    """
    inode = store.catalogue.inode
    seed = frame_seed(store.store_id)
    check = index.ask(
        lambda connection: check_segment(store.disk, store.root, number, store.store_id, seed, connection, full=True)
    )
    damage = [] if check is None else [each for each in check.findings if each.kind in ("damage", "version")]
    row = index.ask(lambda connection: segment_row(connection, number))
    if not damage or row is None:
        return None
    if row.sealed != 1:
        _refuse_while_written(store, number)
    path = segment_path(store.root, number)
    data = _bytes_left(store, path)
    rows = index.ask(lambda connection: list(rows_of(connection, number)))
    kept = index.ask(lambda connection: _wanted(connection, {each.event_id for each in rows}, data, seed))
    lost = [(each.event_id, each.stream) for each in rows if each.event_id not in kept]
    reason = "; ".join(dict.fromkeys(each.reason for each in damage))
    aside = _keep_aside(store, path, data)
    losses = Losses(
        file=str(path.relative_to(store.root)),
        reason=reason,
        kept_in=str(aside.relative_to(store.root)) if aside else "",
        found_at=iso_moment(),
        lost=lost_runs(lost),
    )
    record_losses(store.disk, store.root, f"segment-{number}", losses)
    writer = _write(store, kept) if kept else None
    try:
        with store.changing_catalogue(inode) as catalogue:
            if writer is not None:
                writer.publish()
            _point_to(catalogue, number, writer, list(kept.values()), lost)
            _note(catalogue, losses, damage, len(lost))
    except BaseException:
        if writer is not None and writer.path.name.endswith(UNPUBLISHED):
            with contextlib.suppress(OSError):
                store.disk.unlink(writer.path)
        raise
    finally:
        if writer is not None:
            writer.close()
    _remove(store, path)
    return Mended(path, aside, reason, len(kept), lost)


def _refuse_while_written(store: OpenStore, number: int) -> None:
    """Refuse a segment that a living process goes on writing: its next events would go to a file that is gone."""
    folder = store.root / "lanes" / f"{lane_of(number):04d}"
    with contextlib.closing(Marks(store.disk, folder)) as marks:
        writer = marks.incarnation
    # Numbers are drawn above the incarnation that draws them, and below the next one's.
    if writer != store.lane.incarnation and number > writer and store.is_alive(writer):
        pids = lock_holders(folder / "lock")
        raise StoreLockedError(
            f"segment {number} is damaged and process {pids} still writes it; close that, then repair again", pids
        )


def _bytes_left(store: OpenStore, path: Path) -> bytes:
    """Return what can be read of a file, with zeros in the place of what the disk does not give."""
    try:
        return store.disk.read_file(path)
    except FileNotFoundError:
        return b""
    except OSError:
        return b"".join(_pages(store.disk, path))


def _pages(disk: Disk, path: Path) -> Iterator[bytes]:
    fd = disk.open(path)
    try:
        size = disk.size(fd)
        for offset in range(0, size, _PAGE_BYTES):
            try:
                yield disk.read(fd, _PAGE_BYTES, offset)
            except OSError:
                yield bytes(min(_PAGE_BYTES, size - offset))
    finally:
        disk.close(fd)


def _keep_aside(store: OpenStore, path: Path, data: bytes) -> Path | None:
    if not data:
        return None
    aside = store.root / "damaged" / path.name
    store.disk.make_folder(aside.parent)
    store.disk.publish(aside, data)
    return aside


def _wanted(connection: sqlite3.Connection, here: set[int], data: bytes, seed: int) -> dict[int, _Kept]:
    """Return the whole events that the index has in a segment, and those that it has nowhere; not what was dropped."""
    found = [_Kept(decode_stamp(frame), frame) for _, frame in salvage_frames(data, seed)]
    elsewhere = places(connection, (each.stamp.id for each in found if each.stamp.id not in here))
    dropped = streams(connection, {each.stamp.stream for each in found})
    return {
        each.stamp.id: each
        for each in found
        if each.stamp.id not in elsewhere and each.stamp.id > dropped.get(each.stamp.stream, (0, 0))[1]
    }


def _write(store: OpenStore, kept: dict[int, _Kept]) -> SegmentWriter:
    """Write a new segment beside its place; on return its bytes are on disk."""
    writer = store.segments.new_segment(time.time_ns() // 1000, UNPUBLISHED)
    try:
        waiting: list[bytes] = []
        size = 0
        for each in kept.values():
            waiting.append(each.frame)
            size += len(each.frame)
            if size >= _WRITE_BYTES:
                writer.append(b"".join(waiting))
                waiting.clear()
                size = 0
        writer.append(b"".join(waiting))
        writer.sync()
    except BaseException:
        writer.close()
        with contextlib.suppress(OSError):
            store.disk.unlink(writer.path)
        raise
    return writer


def _point_to(
    catalogue: Catalogue, old: int, writer: SegmentWriter | None, kept: list[_Kept], lost: list[tuple[int, str]]
) -> None:
    """Let the index point to the new segment, and forget what is lost."""
    connection = catalogue.connection
    connection.execute("DELETE FROM extents WHERE segment_id = ?", (old,))
    connection.execute("UPDATE segments SET dropped = 1, sealed = 1 WHERE segment_id = ?", (old,))
    connection.executemany(
        "DELETE FROM events WHERE event_id = ? AND segment_id = ?", ((event_id, old) for event_id, _ in lost)
    )
    if writer is None:
        return
    names = list(dict.fromkeys(each.stamp.stream for each in kept))
    numbers = catalogue.add_streams(names)
    catalogue.put_segments(
        [
            SegmentRow(
                segment_id=writer.number,
                stream_id=numbers[names[0]] if len(names) == 1 else None,
                file=f"segments/{writer.path.name}",
                bytes=writer.end,
                events=len(kept),
                first_id=min(each.stamp.id for each in kept),
                last_id=max(each.stamp.id for each in kept),
                sealed=True,
                sha256=writer.sha256,
            )
        ]
    )
    offset = HEADER_BYTES
    moved: list[tuple[int, int, int, int, int]] = []
    runs: list[Extent] = []
    for each in kept:
        stamp, length = each.stamp, len(each.frame)
        moved.append((stamp.id, numbers[stamp.stream], writer.number, offset, length))
        event = Extent(
            stream_id=numbers[stamp.stream],
            first_id=stamp.id,
            last_id=stamp.id,
            segment_id=writer.number,
            offset=offset,
            length=length,
            events=1,
            first_time_us=stamp.time_us,
            last_time_us=stamp.time_us,
            last_flags=stamp.flags,
        )
        if runs and runs[-1].stream_id == event.stream_id and runs[-1].last_id < event.first_id:
            runs[-1] = _longer(runs[-1], event)
        else:
            runs.append(event)
        offset += length
    catalogue.move_events(moved)
    catalogue.add_extents(runs)


def _longer(run: Extent, event: Extent) -> Extent:
    return run._replace(
        last_id=event.last_id,
        length=run.length + event.length,
        events=run.events + 1,
        last_time_us=event.last_time_us,
        last_flags=event.last_flags,
    )


def _note(catalogue: Catalogue, losses: Losses, damage: list[Finding], lost: int) -> None:
    first = damage[0]
    catalogue.add_damage(losses.file, first.offset or 0, first.length or 0, lost, losses.reason, losses.kept_in)


def _remove(store: OpenStore, path: Path) -> None:
    """Remove the damaged file; while a backup copies it, that is left to the next sweep."""
    lock = store.removal_lock()
    if lock is not None:
        with lock:
            store.disk.unlink(path)
            store.disk.sync_folder(path.parent)
