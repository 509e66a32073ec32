"""A fast pass over a whole segment: which events it holds, and where, without their payloads.

What `scan_file` is given and returns is small, so that it can run in another process.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import compress, count, islice
from operator import add, ge, ne, or_, sub
from pathlib import Path
from typing import NamedTuple

from logstore.errors import DamageError
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_SEGMENT, decode_header
from logstore.storage.record import CHUNK_EVENTS, Event, decode_events, decode_frame, salvage_frames


class Chunk(NamedTuple):
    """Some events of a segment, in the order in which they lie there; lists of the same length."""

    events: list[Event]
    offsets: list[int]
    lengths: list[int]


class Events(NamedTuple):
    """Events of a segment, in the order in which they lie there; arrays of the same length.

    Attributes:
        ids: Event ids.
        streams: Places of their streams in a list of names.
        offsets: Where their frames begin, in bytes.
        lengths: Bytes of their frames.
        times_us: When they were appended.
        flags: `FLAG_…` bits.
    """

    ids: array[int]
    streams: array[int]
    offsets: array[int]
    lengths: array[int]
    times_us: array[int]
    flags: array[int]

    @classmethod
    def none(cls) -> Events:
        """Return no events."""
        return cls(array("Q"), array("L"), array("Q"), array("L"), array("Q"), array("L"))

    def only(self, wanted: Iterable[bool]) -> Events:
        """Return those that are wanted."""
        chosen = list(wanted)
        return Events(*(array(each.typecode, compress(each, chosen)) for each in self))

    def run_starts(self) -> list[int]:
        """Return where runs begin: events of one stream, ascending ids, no bytes between; and behind the last one."""
        if not self.ids:
            return [0]
        # Without a loop in Python: most events only go on where the one before ends.
        other_stream = map(ne, self.streams, islice(self.streams, 1, None))
        descending = map(ge, self.ids, islice(self.ids, 1, None))
        apart = map(ne, map(add, self.offsets, self.lengths), islice(self.offsets, 1, None))
        return [0, *compress(count(1), map(or_, map(or_, other_stream, descending), apart)), len(self.ids)]


class SegmentScan(NamedTuple):
    """What a segment file holds.

    Attributes:
        number: Of the segment.
        bytes: Length of the file.
        sha256: Of the file.
        damage: What is wrong with its header, None when nothing is.
        names: The streams that it has events of.
        events: Its events.
    """

    number: int
    bytes: int
    sha256: str
    damage: str | None
    names: list[str]
    events: Events


def scan_file(disk: Disk, path: Path, number: int, seed: int) -> SegmentScan | None:
    """Read a segment from the device and return what it holds; None when it is gone, or was never finished.

    Frames that are whole count, wherever damage lies between them.

    Args:
        disk: The file door.
        path: Of the segment.
        number: Of the segment.
        seed: Start value of the store's checksums.

    Raises:
        FormatVersionError: A newer release wrote the file.
        OSError: It cannot be read.
    """
    try:
        data = read_from_device(disk, path)
    except FileNotFoundError:
        # Compaction was done with it.
        return None
    if len(data) < HEADER_BYTES:
        # Only being made when its writer died: nothing was ever in it.
        return None
    damage: str | None = None
    try:
        decode_header(data, path, KIND_SEGMENT)
    except DamageError as error:
        # Frames say for themselves which store they are of.
        damage = str(error)
    names: dict[str, int] = {}
    found = Events.none()
    for events, offsets, lengths in scan_segment(data, seed):
        streams = [event.stream for event in events]
        for name in dict.fromkeys(streams):
            names.setdefault(name, len(names))
        found.ids.extend([event.id for event in events])
        found.streams.extend([names[name] for name in streams])
        found.offsets.extend(offsets)
        found.lengths.extend(lengths)
        found.times_us.extend([event.time_us for event in events])
        found.flags.extend([event.flags for event in events])
    return SegmentScan(number, len(data), hashlib.sha256(data).hexdigest(), damage, list(names), found)


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


def scan_segment(data: bytes, seed: int) -> Iterator[Chunk]:
    """Yield the events of a segment whose frames are whole, wherever damage lies between them; the header is not read.

    Args:
        data: The whole file.
        seed: Start value of the store's checksums.
    """
    offset = HEADER_BYTES
    while (found := decode_events(data, seed, CHUNK_EVENTS, offset))[0]:
        events, ends = found
        offsets = [offset, *ends[:-1]]
        yield Chunk(events, offsets, list(map(sub, ends, offsets)))
        offset = ends[-1]
    # The end, or damage: one search for all that is behind it, or false lengths would be read again and again.
    salvaged = salvage_frames(data, seed, offset)
    while saved := list(islice(salvaged, CHUNK_EVENTS)):
        frames = [frame for _, frame in saved]
        yield Chunk([decode_frame(frame) for frame in frames], [offset for offset, _ in saved], list(map(len, frames)))
