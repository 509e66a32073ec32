"""Recovery: what a dead process left in its lane goes to segments; a lost catalogue is made again.

The caller holds the lock of the lane, and the checkpoint lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from logstore.errors import DamageError
from logstore.storage.catalogue import Catalogue, Extent, SegmentRow
from logstore.storage.checkpoint import Journal, SegmentStore
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_JOURNAL, KIND_SEGMENT, decode_header, frame_seed
from logstore.storage.journal import JournalScan, scan_headless, scan_journal
from logstore.storage.lane import Marks, Place, journal_ordinals, journal_path, remove_unpublished
from logstore.storage.record import Event, decode_frame, salvage_frames
from logstore.storage.segment import segment_numbers, segment_path
from logstore.storage.tail import Run

logger = logging.getLogger("logstore")

_END_OF_FILE: Final = 0xFFFFFFFF
"""An offset behind everything that a mark can name."""


def adopt_lane(
    disk: Disk, root: Path, number: int, folder: Path, catalogue: Catalogue, segments: SegmentStore, store_id: int
) -> int:
    """Bring everything that a dead process acknowledged into segments, and remove its journals.

    Returns:
        The highest event id found, 0 for none.

    Raises:
        FormatVersionError: A newer release wrote the journals.
        OSError, sqlite3.Error: The disk or the catalogue refused; the journals that are left can be adopted again.
    """
    with contextlib.closing(Marks(disk, folder)) as marks:
        marks.disown()
    done = catalogue.checkpointed_journals(number)
    ordinals = journal_ordinals(disk, folder)
    ends = _ends_by_successor(disk, folder, ordinals)
    durable = _durable_mark(disk, folder)
    highest = 0
    for ordinal in ordinals:
        journal = Journal(folder, number, ordinal)
        if ordinal in done:
            # The process died between the commit and the unlink.
            segments.write([], [journal], time.time_ns() // 1000)
            continue
        scan = _recover_journal(disk, root, journal, catalogue, store_id, ends.get(ordinal), durable)
        frames = {decode_frame(frame).id: frame for frame in scan.frames}
        highest = max(highest, max(frames, default=0))
        # Some may be in segments: a checkpoint got them there, and the index, which knew that, was lost.
        for event_id in catalogue.indexed(list(frames)):
            del frames[event_id]
        segments.write(_runs(list(frames.values())), [journal], time.time_ns() // 1000)
    if ordinals:
        logger.info("adopted %d journal files of lane %04d", len(ordinals), number)
        _show_adopted(disk, folder, ordinals[-1])
    remove_unpublished(disk, folder)
    return highest


def _show_adopted(disk: Disk, folder: Path, ordinal: int) -> None:
    """Move the lane's mark, so that who follows looks again: the dead process may have died before it moved it."""
    with contextlib.closing(Marks(disk, folder)) as marks:
        if marks.valid:
            marks.show(ordinal, _END_OF_FILE)


def _durable_mark(disk: Disk, folder: Path) -> Place:
    with contextlib.closing(Marks(disk, folder)) as marks:
        return marks.durable


def _ends_by_successor(disk: Disk, folder: Path, ordinals: list[int]) -> dict[int, int]:
    """Return where files end, as the header of the file that followed each says."""
    ends: dict[int, int] = {}
    for ordinal in ordinals:
        fd = disk.open(journal_path(folder, ordinal))
        try:
            header = decode_header(disk.read(fd, HEADER_BYTES, 0), journal_path(folder, ordinal), KIND_JOURNAL)
        except DamageError:
            continue
        finally:
            disk.close(fd)
        ends[header.follows] = header.follows_end
    return ends


def _recover_journal(
    disk: Disk, root: Path, journal: Journal, catalogue: Catalogue, store_id: int, end: int | None, durable: Place
) -> JournalScan:
    """Read one journal file, keep aside what is torn or damaged, and say what was lost."""
    path = journal_path(journal.folder, journal.ordinal)
    data = read_from_device(disk, path)
    witness = end or 0
    if durable.ordinal == journal.ordinal:
        witness = max(witness, durable.offset)
    try:
        scan = scan_journal(data, path, witness, end)
        if scan.header.store_id != store_id:
            raise DamageError(path, 0, len(data), "the file belongs to another store")
    except DamageError as error:
        scan = scan_headless(data, store_id, witness, end, str(error))
    name = f"lane-{journal.lane:04d}-{path.name}"
    if scan.damage:
        kept = _keep_aside(disk, root, name, data)
        with catalogue.transaction():
            for bad in scan.damage:
                logger.error(
                    "%s: %d damaged bytes at offset %d (%s); %s events lost, the file is kept in %s",
                    path,
                    bad.length,
                    bad.offset,
                    bad.reason,
                    "unknown" if bad.lost_events is None else bad.lost_events,
                    kept,
                )
                catalogue.add_damage(
                    f"lanes/{journal.lane:04d}/{path.name}",
                    bad.offset,
                    bad.length,
                    bad.lost_events,
                    bad.reason,
                    str(kept.relative_to(root)),
                )
    elif scan.torn_bytes:
        kept = _keep_aside(disk, root, f"{name}.torn", data[scan.end :])
        logger.warning("%s ends in a torn write of %d bytes, kept in %s", path, scan.torn_bytes, kept)
    return scan


def read_from_device(disk: Disk, path: Path) -> bytes:
    """Return a whole file as the device has it.

    After a failed sync the page cache shows what the disk may not hold: it is written out, then forgotten, then read.
    """
    fd = disk.open(path, write=True)
    try:
        disk.sync(fd)
        disk.forget_cache(fd)
        return disk.read(fd, disk.size(fd), 0)
    finally:
        disk.close(fd)


def _keep_aside(disk: Disk, root: Path, name: str, data: bytes) -> Path:
    path = root / "damaged" / name
    disk.make_folder(path.parent)
    disk.publish(path, data)
    return path


def _runs(frames: list[bytes]) -> list[Run]:
    """Group frames by stream, ascending by id; the same event twice is one."""
    grouped: dict[str, dict[int, bytes]] = {}
    for frame in frames:
        event = decode_frame(frame)
        grouped.setdefault(event.stream, {})[event.id] = frame
    return [Run(stream, ids := sorted(events), [events[i] for i in ids]) for stream, events in grouped.items()]


class _Found(NamedTuple):
    """An event in a segment."""

    event: Event
    offset: int
    length: int


def reindex(disk: Disk, root: Path, catalogue: Catalogue, store_id: int) -> int:
    """Index what segments hold and the catalogue does not know: it is new, or older than they are.

    Returns:
        The number of events in the segments that were not known whole.

    Raises:
        FormatVersionError: A newer release wrote a segment.
    """
    total = 0
    known = catalogue.segment_sizes()
    # The index must not name a file whose entry in the folder a power cut can still take.
    disk.sync_folder(root / "segments")
    for number in segment_numbers(disk, root):
        path = segment_path(root, number)
        if path.stat().st_size <= known.get(number, 0):
            continue
        data = read_from_device(disk, path)
        if len(data) < HEADER_BYTES:
            # Only being made when its writer died: nothing was ever in it.
            continue
        try:
            decode_header(data, path, KIND_SEGMENT)
        except DamageError as error:
            logger.error("%s", error)
            with catalogue.transaction():
                catalogue.add_damage(f"segments/{path.name}", 0, len(data), None, str(error), f"segments/{path.name}")
        total += _index_segment(catalogue, number, path, data, store_id)
    return total


def _index_segment(catalogue: Catalogue, number: int, path: Path, data: bytes, store_id: int) -> int:
    """Index a whole segment in the place of what is known of it; events that another one has stay there."""
    found = [
        _Found(decode_frame(frame), offset, len(frame)) for offset, frame in salvage_frames(data, frame_seed(store_id))
    ]
    # A crash leaves events in a segment that its checkpoint did not index and a later one wrote again.
    homes = catalogue.indexed([each.event.id for each in found])
    found = [each for each in found if homes.get(each.event.id, number) == number]
    runs = list(_contiguous(found))
    with catalogue.transaction():
        catalogue.forget_segment(number)
        numbers = catalogue.add_streams(list(dict.fromkeys(run[0].event.stream for run in runs)))
        ids = [numbers[run[0].event.stream] for run in runs]
        catalogue.put_segments(
            [
                SegmentRow(
                    segment_id=number,
                    stream_id=ids[0] if len(set(ids)) == 1 else None,
                    file=f"segments/{path.name}",
                    bytes=len(data),
                    events=len(found),
                    first_id=min((each.event.id for each in found), default=0),
                    last_id=max((each.event.id for each in found), default=0),
                    sealed=True,
                    sha256=hashlib.sha256(data).hexdigest(),
                )
            ]
        )
        for run, stream_id in zip(runs, ids, strict=True):
            catalogue.add_events((each.event.id, stream_id, number, each.offset, each.length) for each in run)
        catalogue.add_extents(_extent(run, stream_id, number) for run, stream_id in zip(runs, ids, strict=True))
    return len(found)


def _contiguous(found: list[_Found]) -> Iterator[list[_Found]]:
    """Split the events of a segment into runs of one stream without bytes between."""
    run: list[_Found] = []
    for each in found:
        if run:
            last = run[-1]
            follows = last.offset + last.length == each.offset and last.event.id < each.event.id
            if last.event.stream != each.event.stream or not follows:
                yield run
                run = []
        run.append(each)
    if run:
        yield run


def _extent(run: list[_Found], stream_id: int, number: int) -> Extent:
    first, last = run[0], run[-1]
    return Extent(
        stream_id=stream_id,
        first_id=first.event.id,
        last_id=last.event.id,
        segment_id=number,
        offset=first.offset,
        length=last.offset + last.length - first.offset,
        events=len(run),
        first_time_us=first.event.time_us,
        last_time_us=last.event.time_us,
        last_flags=last.event.flags,
    )
