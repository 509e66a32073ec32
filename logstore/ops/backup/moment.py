"""Taking a store back to a moment: of each stream a prefix, in the files of a store that is not open."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_JOURNAL, FileHeader, frame_seed, new_salt
from logstore.storage.journal import PAGE_BYTES, JournalWriter
from logstore.storage.lane import journal_ordinals, journal_path, lane_folders
from logstore.storage.record import decode_stamp, salvage_frames
from logstore.storage.segment import segment_numbers, segment_path


def cut_off(disk: Disk, root: Path, store_id: int, until: datetime) -> int:
    """Remove each stream's first event that was recorded after a moment, and all behind it.

    A stream's events may lie in any order of files, and clocks step back: so the first late event is looked for in all
    files, and then everything from its id on is left out. One file is in memory at a time. Segments without such
    events stay as they are, and with them their digest.

    Args:
        disk: The file door.
        root: The log folder.
        store_id: Of the store.
        until: With its zone.

    Returns:
        How many events were removed.
    """
    seed = frame_seed(store_id)
    until_us = int(until.timestamp() * 1_000_000)
    journals = {
        journal_path(folder, ordinal): ordinal
        for _, folder in lane_folders(disk, root)
        for ordinal in journal_ordinals(disk, folder)
    }
    segments = [segment_path(root, number) for number in segment_numbers(disk, root)]
    first_late: dict[str, int] = {}
    newest: dict[Path, int] = {}
    for path in (*segments, *journals):
        for frame in _frames(disk.read_file(path), path, journals, seed):
            stamp = decode_stamp(frame)
            newest[path] = max(newest.get(path, 0), stamp.id)
            if stamp.time_us > until_us:
                first_late[stamp.stream] = min(first_late.get(stamp.stream, stamp.id), stamp.id)
    if not first_late:
        return 0
    removed = 0
    earliest = min(first_late.values())
    # A journal says where the one before it ends: all of a lane are written anew, or none is.
    changed = {path.parent for path in journals if newest.get(path, 0) >= earliest}
    for path in (*segments, *journals):
        if newest.get(path, 0) < earliest and path.parent not in changed:
            continue
        data = disk.read_file(path)
        frames = list(_frames(data, path, journals, seed))
        kept = [frame for frame in frames if _is_kept(frame, first_late)]
        removed += len(frames) - len(kept)
        if path in journals:
            _write_journal(
                disk,
                path,
                FileHeader(kind=KIND_JOURNAL, store_id=store_id, salt=new_salt(), number=journals[path]),
                kept,
            )
        elif not kept:
            disk.unlink(path)
        elif len(kept) < len(frames):
            disk.publish(path, data[:HEADER_BYTES] + b"".join(kept))
    return removed


def _is_kept(frame: bytes, first_late: dict[str, int]) -> bool:
    stamp = decode_stamp(frame)
    late = first_late.get(stamp.stream)
    return late is None or stamp.id < late


def _frames(data: bytes, path: Path, journals: dict[Path, int], seed: int) -> Iterator[bytes]:
    for _, frame in salvage_frames(data, seed, PAGE_BYTES if path in journals else HEADER_BYTES):
        yield frame


def _write_journal(disk: Disk, path: Path, header: FileHeader, frames: list[bytes]) -> None:
    """Put a journal in the place of another one; it follows none, so that none is said to end somewhere."""
    disk.unlink(path)
    if frames:
        writer = JournalWriter(disk, path, header)
        try:
            writer.write(frames)
            writer.seal()
        finally:
            writer.close()
