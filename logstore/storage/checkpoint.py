"""The checkpoint: journalled events go to per-stream segments and into the catalogue, then the journals go.

In that order, each on disk before the next is: segment bytes, their folder, the catalogue's commit, the unlink. A crash
in between leaves either journals whose events are not indexed, which are taken again, or journals that the catalogue
knows to be done with, which are only removed.

A file for every stream would cost a sync each, and an inode for each of a million three-event streams: the largest
runs go to files of their own stream, the rest to one pack, each stream contiguous in it.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import compress
from pathlib import Path
from typing import Final, NamedTuple

from logstore.storage.catalogue import Catalogue, Extent, SegmentRow
from logstore.storage.files import Disk
from logstore.storage.header import KIND_SEGMENT, FileHeader, new_salt
from logstore.storage.ids import IdGenerator
from logstore.storage.lane import journal_path
from logstore.storage.record import decode_stamp
from logstore.storage.segment import SegmentWriter
from logstore.storage.tail import Unsegmented

logger = logging.getLogger("logstore")

_STREAM_FILES: Final = 32
"""Most streams that get a file of their own in one checkpoint: each is a sync."""
_WRITE_BYTES: Final = 1 << 20
_OWN_FILE_BYTES: Final = 256 << 10
"""Smallest run that begins a file of its own."""
_SLICE_EVENTS: Final = 1_000
_PAUSE_S: Final = 0.000_05


class Journal(NamedTuple):
    """A journal file that a checkpoint empties."""

    folder: Path
    lane: int
    ordinal: int


class _Run(NamedTuple):
    """The events of one stream that go to segments together."""

    stream: str
    ids: list[int]
    frames: list[bytes]


class _Segment:
    """A segment being written, and its totals."""

    def __init__(self, writer: SegmentWriter, stream: str | None) -> None:
        self.writer = writer
        self.stream = stream
        self.written_us = 0
        self.events = 0
        self.first_id = 0
        self.last_id = 0

    def append(self, runs: Sequence[_Run]) -> list[_Placed]:
        """Write runs one after another, many of them with one call."""
        placed: list[_Placed] = []
        waiting: list[bytes] = []
        offset = self.writer.end
        for run in runs:
            data = b"".join(run.frames)
            placed.append(_Placed(run, self.writer.number, offset, len(data)))
            waiting.append(data)
            offset += len(data)
            self.events += len(run.ids)
            self.first_id = min(self.first_id or run.ids[0], run.ids[0])
            self.last_id = max(self.last_id, run.ids[-1])
            if offset - self.writer.end >= _WRITE_BYTES:
                self.writer.append(b"".join(waiting))
                waiting.clear()
        self.writer.append(b"".join(waiting))
        return placed

    def row(self, stream_id: int | None, sealed: bool) -> SegmentRow:
        return SegmentRow(
            segment_id=self.writer.number,
            stream_id=stream_id,
            file=f"segments/{self.writer.path.name}",
            bytes=self.writer.end,
            events=self.events,
            first_id=self.first_id,
            last_id=self.last_id,
            sealed=sealed,
            sha256=self.writer.sha256 if sealed else None,
        )


class _Placed(NamedTuple):
    """Where a run lies now."""

    run: _Run
    segment: int
    offset: int
    length: int

    def extent(self, stream_id: int) -> Extent:
        ids, frames = self.run.ids, self.run.frames
        last = decode_stamp(frames[-1])
        return Extent(
            stream_id=stream_id,
            first_id=ids[0],
            last_id=ids[-1],
            segment_id=self.segment,
            offset=self.offset,
            length=self.length,
            events=len(ids),
            first_time_us=decode_stamp(frames[0]).time_us,
            last_time_us=last.time_us,
            last_flags=last.flags,
        )


class SegmentStore:
    """Writes events to segments and the catalogue, one checkpoint at a time, under the checkpoint lock.

    It goes on only in segments that it began itself: what an earlier process left behind, perhaps with bytes that no
    catalogue knows of, stays as it is.

    Args:
        disk: The file door.
        root: The log folder.
        catalogue: The open catalogue.
        store_id: Of the store.
        incarnation: Of the lane that this process writes.
        numbers: Where segment numbers come from.
        segment_bytes: Size at which a segment is sealed.

    Attributes:
        beside_appends: Whether appends to this store may wait for the interpreter; set once it is open.
    """

    def __init__(
        self,
        disk: Disk,
        root: Path,
        catalogue: Catalogue,
        *,
        store_id: int,
        incarnation: int,
        numbers: IdGenerator,
        segment_bytes: int,
    ) -> None:
        self._disk = disk
        self._root = root
        self._catalogue = catalogue
        self._store_id = store_id
        self._incarnation = incarnation
        self._numbers = numbers
        self._numbering = threading.Lock()
        self._segment_bytes = segment_bytes
        self.beside_appends = False
        self._open: dict[str, _Segment] = {}
        # Begun by the checkpoint that runs, and not in the index yet.
        self._begun: list[SegmentWriter] = []
        # Whether the last checkpoint failed, so that nobody knows what of it is indexed.
        self._in_doubt = False
        self._done: list[Journal] = []
        self._unlinked: list[tuple[int, int]] = []

    def write(self, events: Unsegmented, journals: Sequence[Journal], now_us: int) -> None:
        """Store events durably, index them, and remove the journals that they came from.

        Args:
            events: What to store.
            journals: Files that hold these events and no others.
            now_us: The time.

        Raises:
            OSError: The disk refused; nothing is indexed and the journals are still there.
            sqlite3.Error: The catalogue refused; likewise, unless it was the commit that failed: that may be done.
        """
        try:
            left = self._not_indexed(events) if self._in_doubt else events
            self._store(_runs(left, pause=self.beside_appends), left, journals, now_us)
        except BaseException:
            # What the open segments hold past their indexed length is not known: they end here.
            self.abandon()
            self._remove_begun()
            self._in_doubt = True
            raise
        self._in_doubt = False
        # From here on nothing is an error: whoever tried again would index the events twice.
        self._done += journals
        try:
            self._remove_done()
            self._catalogue.shrink_wal()
        except (OSError, sqlite3.Error) as error:
            logger.warning("what a checkpoint is done with is removed after the next one: %s", error)

    def _not_indexed(self, events: Unsegmented) -> Unsegmented:
        """Return what is left to store after a try that failed.

        It may be on disk all the same, and whoever opened the store since has indexed what that try had written.
        """
        known = self._catalogue.indexed(events.ids)
        fresh = [event_id not in known for event_id in events.ids]
        return Unsegmented(
            list(compress(events.ids, fresh)),
            list(compress(events.streams, fresh)),
            list(compress(events.frames, fresh)),
        )

    def _remove_done(self) -> None:
        """Remove the journals whose events are in segments."""
        for journal in self._done:
            self._disk.unlink(journal_path(journal.folder, journal.ordinal))
        for folder in {journal.folder for journal in self._done}:
            self._disk.sync_folder(folder)
        self._unlinked += [(journal.lane, journal.ordinal) for journal in self._done]
        self._done.clear()

    def _remove_begun(self) -> None:
        """Remove the segments of a checkpoint that failed, or a full disk would fill up with them."""
        for writer in self._begun:
            writer.close()
            with contextlib.suppress(OSError):
                self._disk.unlink(writer.path)
        self._begun.clear()

    def _store(self, runs: Sequence[_Run], events: Unsegmented, journals: Sequence[Journal], now_us: int) -> None:
        by_size = sorted(runs, key=lambda run: -sum(map(len, run.frames)))
        placed: list[_Placed] = []
        touched: list[_Segment] = []
        before = len(self._open)
        for run in by_size[:_STREAM_FILES]:
            segment = self._segment_of(run, now_us)
            if segment is not None:
                touched.append(segment)
                placed += segment.append([run])
        pack: _Segment | None = None
        if len(placed) < len(by_size):
            own = {segment.stream for segment in touched}
            pack = self._begin_segment(None, now_us)
            touched.append(pack)
            placed += pack.append([run for run in by_size if run.stream not in own])
        is_new = pack is not None or len(self._open) > before
        finished = [segment for segment in self._open.values() if segment.writer.end >= self._segment_bytes]
        # Streams that have not written for longest make room: few files stay open however many streams there are.
        idle = [segment for segment in self._open.values() if segment not in touched]
        finished += idle[: max(0, len(self._open) - 2 * _STREAM_FILES)]
        try:
            # A thread of its own: a tenth of an opening with a full journal, in which nobody else waits for the disk.
            with ThreadPoolExecutor(1, thread_name_prefix="logstore-sync") as beside:
                synced = beside.submit(self._sync, touched, is_new=is_new) if touched else None
                self._index(events, placed, touched, finished, journals, synced)
        finally:
            if pack is not None:
                pack.writer.close()
        for segment in finished:
            segment.writer.close()
            assert segment.stream is not None
            del self._open[segment.stream]

    def _sync(self, touched: Sequence[_Segment], *, is_new: bool) -> None:
        """Return when segments are on disk whole, with their names if some are new."""
        for segment in touched:
            segment.writer.sync()
        if is_new:
            self._disk.sync_folder(self._root / "segments")

    def _segment_of(self, run: _Run, now_us: int) -> _Segment | None:
        """Return the stream's own segment, begun when the run is worth one, or None for the pack."""
        segment = self._open.pop(run.stream, None)
        if segment is None:
            if sum(map(len, run.frames)) < _OWN_FILE_BYTES:
                return None
            segment = self._begin_segment(run.stream, now_us)
        # The order of this dictionary is that of the last use.
        self._open[run.stream] = segment
        segment.written_us = now_us
        return segment

    def _begin_segment(self, stream: str | None, now_us: int) -> _Segment:
        writer = self.new_segment(now_us)
        self._begun.append(writer)
        return _Segment(writer, stream)

    def new_segment(self, now_us: int, suffix: str = "") -> SegmentWriter:
        """Begin a segment that nothing knows of yet. Safe to call from any thread.

        Without the checkpoint lock it is to be begun as `UNPUBLISHED`: who finds a whole segment that the index does
        not know takes what it holds.

        Raises:
            OSError: The disk refused.
        """
        while True:
            with self._numbering:
                number = self._numbers.next(now_us)
            header = FileHeader(
                kind=KIND_SEGMENT,
                store_id=self._store_id,
                salt=new_salt(),
                number=number,
                incarnation=self._incarnation,
            )
            try:
                return SegmentWriter(self._disk, self._root, header, suffix)
            except FileExistsError:
                # Left by a process that died before it was indexed, on a clock that was ahead.
                continue

    def _index(
        self,
        events: Unsegmented,
        placed: Sequence[_Placed],
        touched: Sequence[_Segment],
        finished: Sequence[_Segment],
        journals: Sequence[Journal],
        synced: Future[None] | None,
    ) -> None:
        """Make the events findable and the journals superfluous, in one commit, which waits for `synced`."""
        catalogue = self._catalogue
        with catalogue.transaction():
            stream_ids = catalogue.add_streams([place.run.stream for place in placed])
            streams = [stream_ids[place.run.stream] for place in placed]
            catalogue.put_segments(
                segment.row(
                    stream_ids[segment.stream] if segment.stream is not None else None,
                    sealed=segment.stream is None or segment in finished,
                )
                for segment in touched
            )
            catalogue.seal_segments(
                (segment.writer.number, segment.writer.sha256) for segment in finished if segment not in touched
            )
            catalogue.add_events(_rows(events, placed, stream_ids))
            catalogue.add_extents(map(_Placed.extent, placed, streams))
            catalogue.add_journals((journal.lane, journal.ordinal) for journal in journals)
            # What the index names is on disk before the index is.
            if synced is not None:
                synced.result()
            forgotten, self._unlinked = self._unlinked, []
            catalogue.forget_journals(forgotten)
            # A commit that fails may be on disk all the same.
            self._begun.clear()

    def seal_idle(self, before_us: int) -> None:
        """Seal the segments that were last written before a time; the caller holds the checkpoint lock.

        Retention and compaction leave open ones alone: a stream that fell silent would keep its file for ever.

        Raises:
            sqlite3.Error: The catalogue refused; they stay open.
        """
        idle = [segment for segment in self._open.values() if segment.written_us < before_us]
        if idle:
            with self._catalogue.transaction():
                self._catalogue.seal_segments((segment.writer.number, segment.writer.sha256) for segment in idle)
        for segment in idle:
            segment.writer.close()
            assert segment.stream is not None
            del self._open[segment.stream]

    def close(self) -> None:
        """Seal the segments that are open; the caller holds the checkpoint lock."""
        if self._open or self._unlinked:
            with self._catalogue.transaction():
                self._catalogue.seal_segments(
                    (segment.writer.number, segment.writer.sha256) for segment in self._open.values()
                )
                self._catalogue.forget_journals(self._unlinked)
        self.abandon()

    def abandon(self) -> None:
        """Write the open segments no further; they stay as they are."""
        for segment in self._open.values():
            segment.writer.close()
        self._open.clear()


def _rows(
    events: Unsegmented, placed: Sequence[_Placed], stream_ids: dict[str, int]
) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield the row of each event in the order of the ids, in which SQLite only appends.

    Stream by stream it would look for the place of each row, and write most of its pages again and again.
    """
    segments = {place.run.stream: place.segment for place in placed}
    offsets = {place.run.stream: place.offset for place in placed}
    for event_id, stream, frame in zip(events.ids, events.streams, events.frames, strict=True):
        offset = offsets[stream]
        offsets[stream] = offset + len(frame)
        yield event_id, stream_ids[stream], segments[stream], offset, len(frame)


def _runs(events: Unsegmented, *, pause: bool) -> list[_Run]:
    """Group events by stream."""
    runs: dict[str, _Run] = {}
    for start in range(0, len(events.ids), _SLICE_EVENTS):
        part = slice(start, start + _SLICE_EVENTS)
        for event_id, stream, frame in zip(events.ids[part], events.streams[part], events.frames[part], strict=True):
            run = runs.get(stream)
            if run is None:
                run = runs[stream] = _Run(stream, [], [])
            run.ids.append(event_id)
            run.frames.append(frame)
        if pause:
            # A commit that is done needs the interpreter, and would wait for 5 ms.
            time.sleep(_PAUSE_S)
    return list(runs.values())
