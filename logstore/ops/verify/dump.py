"""Every record of one file: a journal, a segment, or the registry, of whatever store, damaged or not.

The file is read through a window, so memory stays the same for files of any size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import google_crc32c
import msgspec

from logstore.errors import DamageError
from logstore.storage.checksums import PartChecksums
from logstore.storage.files import Disk
from logstore.storage.header import (
    HEADER_BYTES,
    KIND_JOURNAL,
    KIND_REGISTRY,
    KIND_SEGMENT,
    FileHeader,
    decode_header,
)
from logstore.storage.journal import BATCH_HEADER_BYTES, PAGE_BYTES, BatchHeader, batch_header_at, next_page
from logstore.storage.record import FRAME_HEADER, MAX_BODY_BYTES, decode_stamp, is_event
from logstore.storage.registry import ENDED, OPENED, OWNED, RELEASED, salvage_entries

_WINDOW_BYTES: Final = 1 << 20
_BODY_START: Final = b"\x96"
"""First byte of every event's body: a msgpack array of six."""
_KINDS: Final = {KIND_JOURNAL: "journal", KIND_SEGMENT: "segment", KIND_REGISTRY: "registry"}
_ENTRIES: Final = {
    OPENED: "session opened",
    OWNED: "session taken over",
    ENDED: "session ended",
    RELEASED: "session released",
}


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One thing in a file.

    Attributes:
        what: A file's `header`, a journal's `batch` or `seal`, an `event`, a registry's `entry`; `zeros` written ahead
            in a journal; `damage`: bytes that are none of these, which may be a torn write at the end.
        offset: Where it begins, in bytes.
        size: Its length, in bytes.
        ok: Whether it is whole: its checksum matches.
        checksum: CRC-32C that stands in the file.
        event_id: Of an event.
        prev: The event's predecessor, 0 for none.
        time_us: When an event was appended.
        stream: Of an event.
        flags: `FLAG_…` bits of an event.
        detail: The fields of a header, or what is wrong.
    """

    what: Literal["header", "batch", "seal", "event", "entry", "zeros", "damage"]
    offset: int
    size: int
    ok: bool = True
    checksum: int | None = None
    event_id: int | None = None
    prev: int | None = None
    time_us: int | None = None
    stream: str | None = None
    flags: int | None = None
    detail: str = ""


def dump(path: Path, disk: Disk | None = None) -> Iterator[Record]:
    """Yield every record of a file, in the order in which they lie there.

    Args:
        path: A journal, a segment, or a registry; no store need be around it.
        disk: The file door.

    Raises:
        DamageError: Neither its first bytes nor its name say what the file is.
        FormatVersionError: A newer release wrote it.
        OSError: It cannot be read.
    """
    with contextlib.closing(_Window(disk or Disk(), path)) as window:
        header, record = _header(window, path)
        yield record
        if header.kind == KIND_SEGMENT:
            yield from _events(window, HEADER_BYTES, window.size, header.seed)
        elif header.kind == KIND_REGISTRY:
            yield from _entries(window, header)
        else:
            yield from _batches(window, header)


class _Window:
    """A file's bytes, read a piece at a time."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._fd = disk.open(path)
        self.size = disk.size(self._fd)
        self._base = 0
        self._data = b""

    def get(self, offset: int, length: int) -> bytes:
        """Return bytes of the file, fewer at its end."""
        if offset < self._base or offset + length > self._base + len(self._data):
            self._move(offset, length)
        start = offset - self._base
        return self._data[start : start + length]

    def _move(self, offset: int, length: int) -> None:
        self._data = self._disk.read(self._fd, max(length, _WINDOW_BYTES), offset)
        self._base = offset

    def part(self, start: int, end: int) -> bytes:
        """Return the bytes from a place up to another one, and leave the window where it is."""
        if self._base <= start and end <= self._base + len(self._data):
            return self._data[start - self._base : end - self._base]
        return self._disk.read(self._fd, end - start, start)

    def find(self, needle: bytes, offset: int, end: int) -> int:
        """Return where the next `needle` begins, `end` when there is none before it."""
        while offset + len(needle) <= end:
            if offset < self._base or offset + len(needle) > self._base + len(self._data):
                self._move(offset, len(needle))
            place = self._data.find(needle, offset - self._base, end - self._base)
            if place >= 0:
                return self._base + place
            if not self._data:
                break
            offset = max(offset + 1, self._base + len(self._data) - len(needle) + 1)
        return end

    def is_zero(self, offset: int, end: int) -> bool:
        """Whether there are only zeros in a part of the file."""
        while offset < end:
            piece = self.get(offset, min(_WINDOW_BYTES, end - offset))
            if not piece or piece.strip(b"\0"):
                return not piece
            offset += len(piece)
        return True

    def checksum(self, offset: int, length: int) -> int:
        """Return the CRC-32C of a part of the file."""
        value, end = 0, offset + length
        while offset < end and (piece := self.get(offset, min(_WINDOW_BYTES, end - offset))):
            value = google_crc32c.extend(value, piece)
            offset += len(piece)
        return value

    def close(self) -> None:
        self._disk.close(self._fd)


def _header(window: _Window, path: Path) -> tuple[FileHeader, Record]:
    data = window.get(0, HEADER_BYTES)
    named = {".journal": KIND_JOURNAL, ".segment": KIND_SEGMENT, ".log": KIND_REGISTRY}.get(path.suffix)
    kinds = [data[10]] if len(data) > 10 and data[10] in _KINDS else []
    kinds += [named] if named is not None else []
    problem: DamageError | None = None
    for kind in kinds:
        try:
            header = decode_header(data, path, kind)
        except DamageError as error:
            problem = error
            continue
        detail = (
            f"{_KINDS[kind]} {header.number} of store {header.store_id:016x}, salt {header.salt:016x}, "
            f"incarnation {header.incarnation}, follows {header.follows} which ends at {header.follows_end}"
        )
        return header, Record(what="header", offset=0, size=HEADER_BYTES, detail=detail)
    if named is None:
        raise problem or DamageError(path, 0, len(data), "the file does not begin as a logstore file")
    # Whatever the checksum says, these fields are the best guess there is.
    store_id, salt = (int.from_bytes(data[start : start + 8], "little") for start in (16, 24))
    header = FileHeader(kind=named, store_id=store_id, salt=salt)
    return header, Record(what="header", offset=0, size=len(data), ok=False, detail=str(problem))


def _events(window: _Window, offset: int, end: int, seed: int) -> Iterator[Record]:
    """Yield the events between two places, and what lies between them."""
    frames = _Frames(window, offset, end, seed)
    while offset < end:
        frame = frames.at(offset)
        if frame is None:
            following = frames.find(offset + 1)
            yield Record(what="damage", offset=offset, size=following - offset, ok=False, detail="no whole event")
            offset = following
            continue
        stamp = decode_stamp(frame)
        yield Record(
            what="event",
            offset=offset,
            size=len(frame),
            checksum=FRAME_HEADER.unpack_from(frame)[1],
            event_id=stamp.id,
            prev=stamp.prev,
            time_us=stamp.time_us,
            stream=stamp.stream,
            flags=stamp.flags,
        )
        offset += len(frame)


class _Frames:
    """The frames between two places of a file; what only claims to be one is not read to where it says it ends."""

    def __init__(self, window: _Window, start: int, end: int, seed: int) -> None:
        self._window = window
        self._start = start
        self._end = end
        self._seed = seed
        self._checksums = PartChecksums(lambda first, last: window.part(start + first, start + last), end - start)

    def at(self, offset: int) -> bytes | None:
        """Return the frame at a place, None when there is none."""
        body = offset + FRAME_HEADER.size
        head = self._window.get(offset, FRAME_HEADER.size)
        if body > self._end or len(head) < FRAME_HEADER.size:
            return None
        length, checksum = FRAME_HEADER.unpack(head)
        end = body + length
        if not 0 < length <= MAX_BODY_BYTES or end > self._end:
            return None
        if self._checksums.extend(self._seed, body - self._start, end - self._start) != checksum:
            return None
        frame = self._window.get(offset, end - offset)
        return frame if is_event(memoryview(frame)[FRAME_HEADER.size :]) else None

    def find(self, offset: int) -> int:
        """Return where the next frame begins, the end when there is none."""
        while (place := self._window.find(_BODY_START, offset + FRAME_HEADER.size, self._end)) < self._end:
            offset = place - FRAME_HEADER.size
            if self.at(offset) is not None:
                return offset
            offset += 1
        return self._end


def _entries(window: _Window, header: FileHeader) -> Iterator[Record]:
    end = HEADER_BYTES
    # Every process that has the store open has the registry in memory, too.
    data = window.get(0, window.size)
    for found in salvage_entries(data, header.salt):
        if found.offset > end:
            yield Record(what="damage", offset=end, size=found.offset - end, ok=False, detail="no whole entry")
        entry = found.entry
        yield Record(
            what="entry",
            offset=found.offset,
            size=found.end - found.offset,
            checksum=FRAME_HEADER.unpack_from(data, found.offset)[1],
            time_us=entry.time_us,
            detail=f"{_ENTRIES.get(entry.kind, f'kind {entry.kind}')}: {entry.key}, incarnation {entry.incarnation}",
        )
        end = found.end
    if end < len(data):
        yield Record(what="damage", offset=end, size=len(data) - end, ok=False, detail="no whole entry, or a torn one")


def _batches(window: _Window, header: FileHeader) -> Iterator[Record]:
    offset = PAGE_BYTES
    while offset < window.size:
        start, batch = _batch(window, offset, header.salt)
        if start > offset:
            if window.is_zero(offset, start):
                yield Record(what="zeros", offset=offset, size=start - offset)
            else:
                yield from _events(window, offset, start, header.seed)
        if batch is None:
            return
        body = start + BATCH_HEADER_BYTES
        end = min(body + batch.length, window.size)
        ok = end == body + batch.length and window.checksum(body, batch.length) == batch.checksum
        yield Record(
            what="batch" if batch.count else "seal",
            offset=start,
            size=BATCH_HEADER_BYTES + batch.length,
            ok=ok,
            checksum=batch.checksum,
            detail=f"batch {batch.number}, {batch.count} events, on disk up to {batch.durable} when it was written, "
            f"header checksum {batch.chain:08x}, follows {batch.previous:08x}",
        )
        yield from _events(window, body, end, header.seed)
        offset = end


def _batch(window: _Window, offset: int, salt: int) -> tuple[int, BatchHeader | None]:
    """Return the next batch at or behind an offset, and where it begins; the end of the file for none."""
    for place in dict.fromkeys((offset, next_page(offset))):
        if (batch := batch_header_at(window.get(place, BATCH_HEADER_BYTES), 0, salt)) is not None:
            return place, batch
    needle = salt.to_bytes(8, "little")
    while salt and (place := window.find(needle, offset, window.size)) < window.size:
        if (batch := batch_header_at(window.get(place, BATCH_HEADER_BYTES), 0, salt)) is not None:
            return place, batch
        offset = place + 1
    return window.size, None
