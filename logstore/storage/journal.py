"""Journal files: the write-ahead log of one lane, all its streams interleaved.

A file begins with a header on a page of its own. One group commit is one batch:

| offset | size | field |
| --- | --- | --- |
| 0 | 8 | salt of the file |
| 8 | 4 | batch number in the file, from 0 |
| 12 | 4 | count of frames; 0 in the seal that a finished file ends with |
| 16 | 4 | length of the body in bytes |
| 20 | 4 | checksum of the previous batch's header, of the file header for the first |
| 24 | 8 | durable: up to where the file was known to be on disk when this batch was written |
| 32 | 4 | CRC-32C of the body |
| 36 | 4 | CRC-32C of the bytes before: the length can be trusted |
| 40 | body length | frames, see `record` |

After a sync the next batch starts on a fresh page, so that a torn write does not reach what was acknowledged; a batch
begins where the one before it ends, or at the next page. Everything else is zeros written ahead: a write into blocks
that exist is synced without a change of the file's metadata, which takes a quarter off the time of a small commit.

`durable` tells a torn write from damage: see `scan_journal`.
"""

from __future__ import annotations

import contextlib
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import google_crc32c
import msgspec

from logstore.storage.checksums import PartChecksums
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_JOURNAL, FileHeader, decode_header
from logstore.storage.kernel_sync import Done, KernelSync
from logstore.storage.record import CHUNK_EVENTS, decode_events, decode_stamp, salvage_frames

PAGE_BYTES: Final = 4096
_FIELDS: Final = struct.Struct("<QIIIIQI")
_CRC: Final = struct.Struct("<I")
BATCH_HEADER_BYTES: Final = _FIELDS.size + _CRC.size

MAX_FILE_BYTES: Final = 0xFFFFFFFF
"""No journal is longer: what says so does not tell the truth."""

_SMALL_BATCH_BYTES: Final = 16 << 10
_ZERO_AHEAD_BYTES: Final = 256 << 10


def next_page(offset: int) -> int:
    """Return the first page boundary at or after `offset`."""
    return -(-offset // PAGE_BYTES) * PAGE_BYTES


class JournalWriter:
    """Appends batches to one new journal file; used by one thread at a time.

    After an error of `write` or `sync` the file must be given up: what it holds past `durable` is not known.

    Attributes:
        header: The file's header.
        end: Where the last batch ends.
        durable: Up to where the file is known to be on disk.
    """

    def __init__(self, disk: Disk, path: Path, header: FileHeader) -> None:
        self._disk = disk
        self.path = path
        self.header = header
        encoded = header.encode()
        self._chain = _CRC.unpack_from(encoded, HEADER_BYTES - _CRC.size)[0]
        self._number = 0
        self._fresh_page = False
        self.end = PAGE_BYTES
        self.durable = 0
        self._fd = disk.create(path)
        try:
            disk.write(self._fd, encoded.ljust(PAGE_BYTES, b"\0"), 0)
            disk.sync_folder(path.parent)
        except BaseException:
            self.close()
            # Nothing is in it, and the next try takes another ordinal: a full disk would fill up with them.
            with contextlib.suppress(OSError):
                disk.unlink(path)
            raise
        self._zeroed = PAGE_BYTES

    def write(self, frames: Sequence[bytes]) -> None:
        """Write one batch; on return the operating system has it, the disk may not."""
        body = frames[0] if len(frames) == 1 else b"".join(frames)
        fields = _FIELDS.pack(
            self.header.salt,
            self._number,
            len(frames),
            len(body),
            self._chain,
            self.durable,
            google_crc32c.value(body),
        )
        self._chain = google_crc32c.value(fields)
        data = b"".join((fields, _CRC.pack(self._chain), body))
        start = next_page(self.end) if self._fresh_page else self.end
        end = start + len(data)
        if end > self._zeroed and len(data) <= _SMALL_BATCH_BYTES:
            self._zeroed = next_page(end + _ZERO_AHEAD_BYTES)
            data = data.ljust(self._zeroed - start, b"\0")
        self._disk.write(self._fd, data, start)
        self._number += 1
        self._fresh_page = False
        self.end = end

    def sync(self) -> None:
        """Return when everything written is on disk; the next batch starts on a fresh page."""
        self._disk.sync(self._fd)
        self.synced()

    def begin_sync(self, kernel_sync: KernelSync, done: Done) -> bool:
        """Begin what `sync` does beside this process, as `KernelSync.start`; nothing is written before it has ended.

        When it has ended well, `synced` is to be called.
        """
        return kernel_sync.start(self._fd, str(self.path), done)

    def synced(self) -> None:
        """Note that everything written is on disk."""
        self.durable = self.end
        self._fresh_page = True

    def seal(self) -> None:
        """End the file: sync it, write the witness of that, sync, close."""
        self.sync()
        self.write(())
        self.sync()
        self.close()

    def close(self) -> None:
        """Close the file as it is; a second call does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._disk.close(fd)


class Batch(msgspec.Struct, frozen=True):
    """A batch that was read: where it ends, the chain to the next, its frames' bytes."""

    offset: int
    end: int
    number: int
    count: int
    chain: int
    body: bytes


class JournalDamage(msgspec.Struct, frozen=True):
    """A place in a journal that was durable once and is not what was written."""

    offset: int
    length: int
    lost_events: int | None
    reason: str


class JournalScan(msgspec.Struct):
    """What recovery found in a journal file; `ids`, `streams` and `frames` are in step.

    Attributes:
        header: The file's header.
        end: Where the valid part ends.
        torn_bytes: Length of the torn write behind the end, 0 for none.
        damage: The bad places.
        ids: Ids of all events that are served, in the order of the file.
        streams: Their streams.
        frames: Their frames.
    """

    header: FileHeader
    end: int
    torn_bytes: int = 0
    damage: list[JournalDamage] = []
    ids: list[int] = []
    streams: list[str] = []
    frames: list[bytes] = []

    def take(self, body: bytes) -> int:
        """Serve the events that a batch's body begins with, and return where the first bytes are that are none."""
        offset = 0
        while (found := decode_events(body, self.header.seed, CHUNK_EVENTS, offset))[0]:
            events, ends = found
            self.ids += [event.id for event in events]
            self.streams += [event.stream for event in events]
            self.frames += map(body.__getitem__, map(slice, [offset, *ends], ends))
            offset = ends[-1]
        return offset

    def salvage(self, data: bytes, offset: int = 0) -> None:
        """Serve the events whose frames are whole in a run of bytes, wherever damage lies between them."""
        for _, frame in salvage_frames(data, self.header.seed, offset):
            stamp = decode_stamp(frame)
            self.ids.append(stamp.id)
            self.streams.append(stamp.stream)
            self.frames.append(frame)


class BatchHeader(msgspec.Struct, frozen=True):
    """The fields of a batch's header, see the table above; `chain` is the header's own checksum."""

    number: int
    count: int
    length: int
    previous: int
    durable: int
    checksum: int
    chain: int


class _Found(NamedTuple):
    """Where a batch header stands that can be trusted, though its batch may be bad."""

    offset: int
    header: BatchHeader

    @property
    def end(self) -> int:
        return self.offset + BATCH_HEADER_BYTES + self.header.length


def batch_header_at(data: bytes, offset: int, salt: int) -> BatchHeader | None:
    """Return the batch header at `offset`, if one of this file that can be trusted stands there."""
    if offset + BATCH_HEADER_BYTES > len(data):
        return None
    found, number, count, length, previous, durable, checksum = _FIELDS.unpack_from(data, offset)
    if found != salt:
        return None
    chain = google_crc32c.value(data[offset : offset + _FIELDS.size])
    if _CRC.unpack_from(data, offset + _FIELDS.size)[0] != chain:
        return None
    return BatchHeader(number, count, length, previous, durable, checksum, chain)


class JournalReader:
    """Walks the batches of a journal's bytes, from wherever an earlier walk ended.

    Args:
        header: The decoded header of the file.
        encoded: The header's bytes, for the chain.
    """

    def __init__(self, header: FileHeader, encoded: bytes) -> None:
        self.header = header
        self.offset = PAGE_BYTES
        self.number = 0
        self._checksums: PartChecksums | None = None
        self._chain: int | None = _CRC.unpack_from(encoded, HEADER_BYTES - _CRC.size)[0]

    def batches(self, data: bytes, base: int = 0, limit: int | None = None) -> Iterator[Batch]:
        """Yield the batches that follow, up to the first that is not whole and valid.

        Args:
            data: Bytes of the file from offset `base` on.
            base: Where `data` begins in the file; at or before `offset`.
            limit: Where the file ends for this walk; batches that reach beyond are not there.
        """
        end = base + len(data) if limit is None else min(limit, base + len(data))
        while (batch := self._next(data, base, end)) is not None:
            self._accept(batch)
            yield batch

    def _next(self, data: bytes, base: int, end: int) -> Batch | None:
        for offset in dict.fromkeys((self.offset, next_page(self.offset))):
            header = batch_header_at(data, offset - base, self.header.salt)
            if header is None:
                continue
            start = offset + BATCH_HEADER_BYTES
            stop = start + header.length
            if stop > end or header.number != self.number or self._chain not in (None, header.previous):
                return None
            if self._checksum(data, start - base, stop - base) != header.checksum:
                return None
            body = data[start - base : stop - base]
            return Batch(offset, stop, header.number, header.count, header.chain, body)
        return None

    def _checksum(self, data: bytes, start: int, end: int) -> int:
        if self._checksums is None:
            return int(google_crc32c.value(data[start:end]))
        return self._checksums.extend(0, start, end)

    def _accept(self, batch: Batch) -> None:
        self.offset = batch.end
        self.number = batch.number + 1
        self._chain = batch.chain

    def continue_at(self, offset: int, number: int, data: bytes) -> None:
        """Go on behind a damaged place, with the batch `number` at `offset`; `data` is the whole file."""
        self.offset = offset
        self.number = number
        self._chain = None
        if self._checksums is None:
            # Thousands of headers that can be trusted may claim the same bytes, and none of them rightly.
            self._checksums = PartChecksums(lambda start, end: data[start:end], len(data))


def scan_journal(data: bytes, path: Path, known_durable: int = 0, limit: int | None = None) -> JournalScan:
    """Read a journal whose writer is gone and decide what each bad place means.

    A bad batch is damage when somebody knows that it was on disk once: a later batch of the same file whose own header
    is good and says so, or a witness given by the caller. Otherwise it is a write that the crash tore: it was never
    acknowledged, and the file ends there. Most logs end at the first bad record either way, and lose what was
    acknowledged behind it.

    Args:
        data: The whole file.
        path: The file, for messages.
        known_durable: Up to where a witness says that the file was on disk: the lane's mark, the next file's header.
        limit: Where the file ends: the next file's header may say that it was given up there.

    Raises:
        DamageError: The file's own header is bad.
        FormatVersionError: A newer release wrote the file.

    Source: the witness inside the batches is this project's; keeping bytes aside before ending a file is etcd's
        (`server/storage/wal/repair.go`).
    """
    reader = JournalReader(decode_header(data, path, KIND_JOURNAL), data)
    return _scan(data[:limit], reader, known_durable)


def scan_headless(data: bytes, store_id: int, known_durable: int, limit: int | None, reason: str) -> JournalScan:
    """Read a journal whose own header is bad.

    Header and first batch go to the disk with the same sync. So without a sign that anything was on disk the file was
    only being made, whatever of it is there.

    Args:
        data: The whole file.
        store_id: Of the store that the file is in.
        known_durable: As in `scan_journal`.
        limit: As in `scan_journal`.
        reason: What is wrong with the header.
    """
    data = data[:limit]
    salt = int.from_bytes(data[PAGE_BYTES : PAGE_BYTES + 8], "little")
    header = FileHeader(kind=KIND_JOURNAL, store_id=store_id, salt=salt)
    whole = batch_header_at(data, PAGE_BYTES, salt) is not None
    found = _later_headers(data, PAGE_BYTES, salt) if whole else ()
    if max(known_durable, _known_durable(found)) <= PAGE_BYTES:
        return JournalScan(header, 0, len(data.rstrip(b"\0")))
    if not whole:
        scan = JournalScan(header, 0, damage=[JournalDamage(0, len(data), None, reason)])
        scan.salvage(data)
        return scan
    reader = JournalReader(header, bytes(HEADER_BYTES))
    reader.continue_at(PAGE_BYTES, 0, data)
    scan = _scan(data, reader, known_durable)
    scan.damage.insert(0, JournalDamage(0, PAGE_BYTES, 0, reason))
    return scan


def _scan(data: bytes, reader: JournalReader, known_durable: int) -> JournalScan:
    header = reader.header
    scan = JournalScan(header, PAGE_BYTES)
    later: deque[_Found] | None = None
    while True:
        for batch in reader.batches(data):
            _take(batch, scan)
        scan.end = bad = reader.offset
        if later is None:
            # Looked for once: a file with thousands of bad places would be searched from each of them to its end.
            later = deque(_later_headers(data, bad, header.salt))
            known_durable = max(known_durable, _known_durable(later))
        while later and later[0].offset < bad:
            later.popleft()
        if known_durable <= bad:
            scan.torn_bytes = _torn_bytes(data, bad)
            return scan
        if not _skip_damage(data, reader, scan, later, known_durable):
            return scan


def _take(batch: Batch, scan: JournalScan) -> None:
    """Serve a batch's events."""
    before = len(scan.frames)
    bad = scan.take(batch.body)
    if bad < len(batch.body):
        # Its checksum matches, so whoever wrote this wrote it so.
        scan.salvage(batch.body, bad)
        lost = max(0, batch.count - (len(scan.frames) - before))
        reason = "a batch holds bytes that are no event, and its checksum matches"
        scan.damage.append(JournalDamage(batch.offset, batch.end - batch.offset, lost, reason))


def _known_durable(later: Iterable[_Found]) -> int:
    """Return up to where batch headers say that the file was on disk."""
    return min(MAX_FILE_BYTES, max((each.header.durable for each in later), default=0))


def _later_headers(data: bytes, offset: int, salt: int) -> Iterator[_Found]:
    """Yield the batch headers that stand anywhere behind a bad place, wherever pages went missing between."""
    needle = salt.to_bytes(8, "little")
    # The bad batch's own header may be good and its body bad, so the search begins with it.
    position = data.find(needle, offset)
    while position >= 0:
        if (header := batch_header_at(data, position, salt)) is not None:
            yield _Found(position, header)
        position = data.find(needle, position + 1)


def _skip_damage(data: bytes, reader: JournalReader, scan: JournalScan, later: deque[_Found], durable: int) -> bool:
    """Record the damage at the reader's place, save its whole frames, go on behind it; False at the end."""
    bad = reader.offset
    own = later.popleft() if later and _begins_at_reader(later[0], reader) else None
    following = later[0] if later else None
    if following is not None and following.offset >= durable and following.offset != next_page(durable):
        # Not synced, nor the first that was written after the last sync: what came between was torn.
        following = None
    end = durable if following is None else following.offset
    before = len(scan.frames)
    scan.salvage(data[bad : min(end, durable)])
    lost = None
    if own is not None and (own.end == end if following is None else own.header.number + 1 == following.header.number):
        # Nothing was between this batch and what follows, so all that is missing was in it.
        lost = max(0, own.header.count - (len(scan.frames) - before))
    scan.damage.append(JournalDamage(bad, end - bad, lost, "a batch that was on disk does not match its checksum"))
    if following is None:
        scan.end = end
        scan.torn_bytes = _torn_bytes(data, end)
        return False
    reader.continue_at(end, following.header.number, data)
    return True


def _begins_at_reader(found: _Found, reader: JournalReader) -> bool:
    """Whether a header is that of the bad batch itself, and not of the next one where the bad one might have begun."""
    places = (reader.offset, next_page(reader.offset))
    return found.offset in places and found.header.number == reader.number


def _torn_bytes(data: bytes, offset: int) -> int:
    """Return how much behind `offset` is anything but zeros written ahead."""
    rest = data[offset:]
    return len(rest.rstrip(b"\0"))


def read_header(disk: Disk, fd: int, path: Path) -> FileHeader:
    """Return the header of an open journal file.

    Raises:
        DamageError: It is not one, or not whole yet.
    """
    return decode_header(disk.read(fd, HEADER_BYTES, 0), path, KIND_JOURNAL)
