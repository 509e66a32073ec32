"""Making the index from segments: of those that the catalogue does not know, or of all when it is lost.

The caller holds the checkpoint lock.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice, pairwise, repeat
from operator import eq, gt
from pathlib import Path
from typing import Final, NamedTuple

from logstore.storage.catalogue import Catalogue, Extent, SegmentRow
from logstore.storage.database import damage_of, inspect_file
from logstore.storage.files import Disk
from logstore.storage.header import frame_seed
from logstore.storage.scan import Events, SegmentScan, scan_file
from logstore.storage.segment import segment_numbers, segment_path

logger = logging.getLogger("logstore")

_SCANS_AHEAD: Final = 2
SQLITE_FILES: Final = ("", "-wal", "-shm")
"""What SQLite keeps a database in: what these add to its name."""

BytesDone = Callable[[int, int], None]
"""Called after each segment with the bytes that were indexed and those to index in all."""


class Indexed(NamedTuple):
    """What was indexed: events, and the segments that hold them."""

    events: int
    segments: int


def silent(done: int, total: int) -> None:
    """Say nothing."""


def make_index(
    disk: Disk,
    root: Path,
    path: Path,
    store_id: int,
    progress: BytesDone = silent,
    scanners: Executor | None = None,
) -> Indexed:
    """Put an index in place that is made of all segments; what retention has noted in the one that is there stays.

    Made beside its place: one that a crash left half made would pass for whole, and other processes read it meanwhile.
    On return it is on disk.

    Args:
        disk: The file door.
        root: The log folder.
        path: The catalogue.
        store_id: Of the store.
        progress: Told after each segment.
        scanners: Who reads the segments: with a process half the work is done beside the other half.

    Raises:
        FormatVersionError: A newer release wrote a segment.
        DamageError: The index that is there is damaged; it is still there.
        OSError, sqlite3.Error: The disk refused; likewise.
    """
    started = time.monotonic()
    fresh = Catalogue(path.with_name(f"{path.name}.new"))
    _remove(disk, fresh.path, SQLITE_FILES)
    try:
        disk.close(disk.create(fresh.path))
        with _filling(disk, fresh):
            before = None
            if inspect_file(path) == "ours":
                with damage_of(path):
                    before = fresh.copy_notes(path)
            done = reindex(disk, root, fresh, store_id, progress, scanners, before=before)
        # The write-ahead log of the file that was here would pass for the new one's.
        _remove(disk, path, SQLITE_FILES[1:])
        disk.rename(fresh.path, path)
    except BaseException:
        # On a full disk half an index would be in the way of everything else.
        with contextlib.suppress(OSError):
            _remove(disk, fresh.path, SQLITE_FILES)
        raise
    disk.sync_folder(path.parent)
    if done.events:
        logger.warning("indexed %d events again in %.1f s", done.events, time.monotonic() - started)
    return done


def _remove(disk: Disk, path: Path, suffixes: Iterable[str]) -> None:
    for suffix in suffixes:
        disk.unlink(path.with_name(path.name + suffix))


@contextlib.contextmanager
def _filling(disk: Disk, fresh: Catalogue) -> Generator[None]:
    """Open a new catalogue for the block; after it the file is closed, and on disk."""
    try:
        fresh.open()
        with fresh.filling():
            yield
    finally:
        fresh.close()
    if fresh.path.with_name(f"{fresh.path.name}-wal").exists():
        raise OSError(f"SQLite left {fresh.path} unfinished")
    fd = disk.open(fresh.path, write=True)
    try:
        # SQLite has synced nothing of it.
        disk.sync(fd)
    finally:
        disk.close(fd)


def reindex(
    disk: Disk,
    root: Path,
    catalogue: Catalogue,
    store_id: int,
    progress: BytesDone = silent,
    scanners: Executor | None = None,
    *,
    before: Collection[int] | None = (),
) -> Indexed:
    """Index what segments hold and the catalogue does not know: it is new, or older than they are.

    Events that retention has dropped are left out, as far as the catalogue knows of them. So is a segment with a bad
    header that no index knows: a power cut came before its checkpoint committed, and the journal has its events.

    Args:
        disk: The file door.
        root: The log folder.
        catalogue: Open for writing.
        store_id: Of the store.
        progress: Told after each segment.
        scanners: Who reads the segments.
        before: Segments that the index knew which this one replaces; None when there was none that could be asked.

    Returns:
        What the segments hold that were not known whole.

    Raises:
        FormatVersionError: A newer release wrote a segment.
        OSError, sqlite3.Error: The disk or the catalogue refused; segments that were done by then are indexed.
    """
    known = catalogue.segment_sizes()
    # The index must not name a file whose entry in the folder a power cut can still take.
    disk.sync_folder(root / "segments")
    numbers, dropped = segment_numbers(disk, root), catalogue.dropped_segments()
    gone = known.keys() - dropped - set(numbers)
    if gone:
        with catalogue.transaction():
            catalogue.drop_empty(gone)
    unknown = _unknown(root, numbers, known, dropped)
    if not unknown:
        return Indexed(0, 0)
    highest_dropped = catalogue.highest_dropped()
    total, done = sum(unknown.values()), 0
    events = segments = 0
    jobs = ((disk, segment_path(root, number), number, frame_seed(store_id)) for number in unknown)
    for scan in _headless_last(_scan_ahead(jobs, scanners)):
        if scan.damage is not None and before is not None and scan.number not in {*known, *before}:
            continue
        with catalogue.transaction():
            if scan.number in known:
                # Indexed whole in the place of what is known of it.
                catalogue.forget_segment(scan.number)
            events += _index_segment(catalogue, scan, highest_dropped, gone)
        segments += 1
        done += unknown[scan.number]
        progress(done, total)
    return Indexed(events, segments)


def _unknown(root: Path, numbers: Iterable[int], known: dict[int, int], dropped: set[int]) -> dict[int, int]:
    """Return the size of each segment that is not known whole, oldest first."""
    sizes: dict[int, int] = {}
    for number in numbers:
        try:
            size = segment_path(root, number).stat().st_size
        except FileNotFoundError:
            # Compaction was done with it.
            continue
        if number not in dropped and size > known.get(number, 0):
            sizes[number] = size
    return sizes


def _scan_ahead(jobs: Iterator[tuple[Disk, Path, int, int]], scanners: Executor | None) -> Iterator[SegmentScan]:
    """Yield segments in their order, the next ones scanned while one is indexed."""
    with contextlib.ExitStack() as stack:
        if scanners is None:
            scanners = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="logstore-index"))
        coming = deque(scanners.submit(scan_file, *job) for job in islice(jobs, _SCANS_AHEAD))
        while coming:
            scan = coming.popleft().result()
            coming.extend(scanners.submit(scan_file, *job) for job in islice(jobs, 1))
            if scan is not None:
                yield scan


def _headless_last(scans: Iterator[SegmentScan]) -> Iterator[SegmentScan]:
    """Yield segments whose header is bad behind the others: then it is known whether anybody needs what they hold."""
    headless: list[SegmentScan] = []
    for scan in scans:
        if scan.damage is None:
            yield scan
        else:
            headless.append(scan)
    yield from headless


def _index_segment(catalogue: Catalogue, scan: SegmentScan, highest_dropped: int, gone: set[int]) -> int:
    """Add a segment and its events; those that another one has stay there, unless its file is gone.

    Returns how many were added.
    """
    file = f"segments/{scan.number}.segment"
    # Of all that it holds: as long as it is there, streams of which it has dropped events stay on record.
    first_id, last_id = min(scan.events.ids, default=0), max(scan.events.ids, default=0)
    known = catalogue.add_streams(scan.names)
    streams = [known[name] for name in scan.names]
    events = scan.events
    if highest_dropped and min(events.ids, default=0) <= highest_dropped:
        dropped = catalogue.dropped_ids(scan.names)
        last = [dropped.get(name, 0) for name in scan.names]
        events = events.only(map(gt, events.ids, map(last.__getitem__, events.streams)))
    if gone:
        # Compaction has moved them since this index was current.
        catalogue.forget_places(events.ids, gone)
        catalogue.drop_empty(gone)
    numbers = [streams[place] for place in events.streams]
    if catalogue.add_columns(events.ids, numbers, scan.number, events.offsets, events.lengths) < len(events.ids):
        # A crash leaves events in a segment that its checkpoint did not index and a later one wrote again, and
        # compaction moves them: one is where it was found first.
        places = catalogue.places(events.ids)
        found = zip(repeat(scan.number), events.offsets, strict=False)
        events = events.only(map(eq, map(places.__getitem__, events.ids), found))
    if scan.damage is not None:
        if scan.events.ids and not events.ids:
            # What a power cut left of a checkpoint that did not commit; a later one has written it again.
            return 0
        logger.error("%s", scan.damage)
        catalogue.add_damage(file, 0, scan.bytes, None, scan.damage, file)
    extents = list(_extents(scan.number, streams, events))
    catalogue.add_extents(extents)
    owners = {extent.stream_id for extent in extents}
    row = SegmentRow(
        segment_id=scan.number,
        stream_id=min(owners) if len(owners) == 1 else None,
        file=file,
        bytes=scan.bytes,
        events=len(events.ids),
        first_id=first_id,
        last_id=last_id,
        sealed=True,
        sha256=scan.sha256,
    )
    catalogue.put_segments([row])
    return len(events.ids)


def _extents(segment: int, streams: list[int], events: Events) -> Iterator[Extent]:
    ids, places, offsets, lengths, times_us, flags = events
    for first, behind in pairwise(events.run_starts()):
        last = behind - 1
        yield Extent(
            stream_id=streams[places[first]],
            first_id=ids[first],
            last_id=ids[last],
            segment_id=segment,
            offset=offsets[first],
            length=offsets[last] + lengths[last] - offsets[first],
            events=behind - first,
            first_time_us=times_us[first],
            last_time_us=times_us[last],
            last_flags=flags[last],
        )
