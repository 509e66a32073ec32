"""Moving live events to new segments: frame by frame, nothing encoded again.

A new segment is written and synced beside its place. Then, in one transaction, it is put there, the index points to it
and no longer to where its events were: a reader finds each event in one of the two places, and whoever had just asked
for the old one asks again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from logstore.errors import IndexReplacedError
from logstore.ops.pace import Pace
from logstore.storage.catalogue import Catalogue, Extent, SegmentRow
from logstore.storage.header import frame_seed
from logstore.storage.opening import OpenStore
from logstore.storage.record import Stamp, decode_stamp, iter_frames
from logstore.storage.segment import UNPUBLISHED, SegmentWriter, segment_path

logger = logging.getLogger("logstore")

_MOST_EVENTS: Final = 20_000
"""Events moved in one transaction: some tens of milliseconds in which no checkpoint can commit."""
_WRITE_BYTES: Final = 1 << 20
OWN_FILE_BYTES: Final = 256 << 10
"""Events of one stream that are worth a file of its own."""


class Moving(NamedTuple):
    """A run to move, and how many bytes of its stream move with it."""

    extent: Extent
    stream_bytes: int


class _Moved(NamedTuple):
    """A run and its events at their new place."""

    source: Extent
    target: Extent
    rows: list[tuple[int, int, int, int, int]]


class _Output:
    """One new segment being filled: with one stream that is large, or with many small ones."""

    def __init__(self, writer: SegmentWriter, own_stream: int | None) -> None:
        self.writer = writer
        self.own_stream = own_stream
        self.moved: list[_Moved] = []
        self.events = 0
        self._waiting: list[bytes] = []
        self._end = writer.end

    @property
    def end(self) -> int:
        """Its length in bytes, with what is still to be written."""
        return self._end

    def append(self, extent: Extent, data: bytes, events: list[_Spot]) -> None:
        """Add a run as it is."""
        rows = [
            (spot.stamp.id, extent.stream_id, self.writer.number, self._end + spot.offset, spot.length)
            for spot in events
        ]
        target = extent._replace(segment_id=self.writer.number, offset=self._end)
        self.moved.append(_Moved(extent, target, rows))
        self.events += len(rows)
        self._waiting.append(data)
        self._end += len(data)
        if self._end - self.writer.end >= _WRITE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self.writer.append(b"".join(self._waiting))
        self._waiting.clear()

    def row(self) -> SegmentRow:
        """Return the new segment's row."""
        streams = {moved.target.stream_id for moved in self.moved}
        return SegmentRow(
            segment_id=self.writer.number,
            stream_id=streams.pop() if len(streams) == 1 else None,
            file=f"segments/{segment_path(self.writer.path.parent, self.writer.number).name}",
            bytes=self.writer.end,
            events=self.events,
            first_id=min(moved.target.first_id for moved in self.moved),
            last_id=max(moved.target.last_id for moved in self.moved),
            sealed=True,
            sha256=self.writer.sha256,
        )


class _Spot(NamedTuple):
    """An event in the bytes of a run."""

    stamp: Stamp
    offset: int
    length: int


class Rewriter:
    """Moves runs to new segments; used under the compaction lock.

    Args:
        store: The store.
        inode: Of the catalogue that the runs were found in.
        segment_bytes: Size at which a new segment is finished.
        pace: When to rest.

    Attributes:
        segments: New segments.
        events: Events moved.
        bytes: Bytes moved.
        damaged: Segments with a run that cannot be read whole; they stay as they are.
    """

    def __init__(self, store: OpenStore, inode: int, segment_bytes: int, pace: Pace) -> None:
        self._store = store
        self._inode = inode
        self._segment_bytes = segment_bytes
        self._pace = pace
        self._seed = frame_seed(store.store_id)
        self.segments = 0
        self.events = 0
        self.bytes = 0
        self.damaged: set[int] = set()

    def move(self, runs: Iterator[Moving], most_bytes: int) -> bool:
        """Move runs, which come by stream and in order; on return the index points to their new places.

        Args:
            runs: What to move.
            most_bytes: Stop when so much was moved.

        Returns:
            Whether there may be more.

        Raises:
            IndexReplacedError: The index was made again meanwhile.
            OSError, sqlite3.Error: The disk or the catalogue refused; what is not moved is where it was.
        """
        output: _Output | None = None
        before = self.bytes
        more = False
        try:
            for run in runs:
                extent = run.extent
                if self._store.stopping.is_set():
                    break
                events = self._read(extent)
                if events is None:
                    continue
                own_stream = extent.stream_id if run.stream_bytes >= OWN_FILE_BYTES else None
                if output is not None and (self._is_full(output) or own_stream != output.own_stream):
                    self._finish(output)
                    output = None
                if output is None:
                    writer = self._store.segments.new_segment(time.time_ns() // 1000, UNPUBLISHED)
                    output = _Output(writer, own_stream)
                output.append(extent, *events)
                self._pace.step()
                if self.bytes - before + output.end >= most_bytes:
                    more = True
                    break
            if output is not None:
                self._finish(output)
        except BaseException:
            if output is not None:
                output.writer.discard()
            raise
        return more

    def _is_full(self, output: _Output) -> bool:
        return output.end >= self._segment_bytes or output.events >= _MOST_EVENTS

    def _read(self, extent: Extent) -> tuple[bytes, list[_Spot]] | None:
        """Return the bytes and events of a run; None when they are damaged, which is for repair to mend."""
        path = segment_path(self._store.root, extent.segment_id)
        try:
            data = self._bytes(extent)
        except OSError as error:
            self._leave(extent, str(error))
            return None
        events = list(self._spots(data))
        if sum(spot.length for spot in events) != extent.length or len(events) != extent.events:
            self._leave(extent, f"{path}: events {extent.first_id} to {extent.last_id} are damaged")
            return None
        return data, events

    def _leave(self, extent: Extent, reason: str) -> None:
        """Leave a run where it is."""
        self.damaged.add(extent.segment_id)
        logger.error("compaction leaves a segment as it is: %s", reason)

    def _bytes(self, extent: Extent) -> bytes:
        disk = self._store.disk
        fd = disk.open(segment_path(self._store.root, extent.segment_id))
        try:
            return disk.read(fd, extent.length, extent.offset)
        finally:
            disk.close(fd)

    def _spots(self, data: bytes) -> Iterator[_Spot]:
        for offset, frame in iter_frames(data, self._seed):
            yield _Spot(decode_stamp(frame), offset, len(frame))
            self._pace.step()

    def _finish(self, output: _Output) -> None:
        """Put a filled segment in place and let the index point to it."""
        output.flush()
        output.writer.sync()
        self._pace.step()
        with self._store.changing_catalogue(self._inode) as catalogue:
            output.writer.publish()
            self._index(catalogue, output)
        output.writer.close()
        self.segments += 1
        self.events += output.events
        self.bytes += output.writer.end
        self._pace.step()

    def _index(self, catalogue: Catalogue, output: _Output) -> None:
        connection = catalogue.connection
        catalogue.put_segments([output.row()])
        targets: list[Extent] = []
        for moved in output.moved:
            joined = _joined(catalogue, targets[-1], moved.target) if targets else None
            if joined is not None:
                targets[-1] = joined
            else:
                targets.append(moved.target)
        sources = [moved.source for moved in output.moved]
        deleted = connection.executemany(
            "DELETE FROM extents WHERE stream_id = ? AND last_id = ? AND first_id = ? AND segment_id = ?",
            ((each.stream_id, each.last_id, each.first_id, each.segment_id) for each in sources),
        ).rowcount
        if deleted != len(sources):
            raise IndexReplacedError(f"{catalogue.path} names other runs than before: somebody else compacts the store")
        catalogue.add_extents(targets)
        catalogue.move_events(row for moved in output.moved for row in moved.rows)
        connection.executemany(
            "UPDATE segments SET events = events - ? WHERE segment_id = ?",
            ((each.events, each.segment_id) for each in sources),
        )


def _joined(catalogue: Catalogue, one: Extent, other: Extent) -> Extent | None:
    """Return two neighbouring runs as one, or None when they are of two streams or events lie between them."""
    if one.stream_id != other.stream_id or one.last_id >= other.first_id:
        return None
    between = catalogue.connection.execute(
        "SELECT 1 FROM extents WHERE stream_id = ? AND last_id > ? AND last_id < ? LIMIT 1",
        (one.stream_id, one.last_id, other.last_id),
    ).fetchone()
    if between is not None:
        return None
    return one._replace(
        last_id=other.last_id,
        length=one.length + other.length,
        events=one.events + other.events,
        last_time_us=other.last_time_us,
        last_flags=other.last_flags,
    )
