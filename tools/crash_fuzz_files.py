"""The parsers of the log's own files: header, frames, journal, segment, registry, and what a lane keeps beside them."""

from __future__ import annotations

import random
import shutil
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import google_crc32c
import msgspec

from crash_fuzz_inputs import EXTREMES, LARGE, Input, Target, damaged, frame, hostile_array
from crash_kill import BrokenPromiseError
from logstore.ops.verify.frames import Frames
from logstore.storage.files import Disk
from logstore.storage.header import (
    HEADER_BYTES,
    KIND_JOURNAL,
    KIND_REGISTRY,
    KIND_SEGMENT,
    FileHeader,
    decode_header,
    frame_seed,
)
from logstore.storage.ids import MAX_ID
from logstore.storage.journal import (
    PAGE_BYTES,
    JournalReader,
    JournalScan,
    JournalWriter,
    next_page,
    scan_headless,
    scan_journal,
)
from logstore.storage.lane import END_OF_FILE
from logstore.storage.record import Event, decode_frame, decode_stamp, encode_frame, iter_frames, salvage_frames
from logstore.storage.scan import scan_segment
from logstore.storage.segment import SegmentWriter, iter_segment

STORE_ID: Final = 0x1122334455667788
SEED: Final = frame_seed(STORE_ID)
SALT: Final = 0x99AABBCCDDEEFF01
FIRST_ID: Final = 3_770_000_000_000_000_000
TIME_US: Final = 1_790_000_000_000_000
_KINDS: Final = (KIND_JOURNAL, KIND_SEGMENT, KIND_REGISTRY)
_DISK: Final = Disk()


def crc(data: bytes) -> bytes:
    """Return the CRC-32C of some bytes, as it stands behind them."""
    return struct.pack("<I", google_crc32c.value(data))


def some_events(rng: random.Random, count: int, size: int = 300) -> list[Event]:
    """Return events of a few streams, in order."""
    last: dict[str, int] = {}
    events: list[Event] = []
    for number in range(count):
        stream = rng.choice(("one", "two", "a" * 32 + "/7", "é"))
        payload = rng.choice((b"", b"\x96" * 9, rng.randbytes(rng.randrange(size)), b'{"method":"m"}'))
        event_id = FIRST_ID + number * 3
        events.append(
            Event(event_id, last.get(stream, 0), TIME_US + number, stream, rng.choice((0, 1, 2, 14)), payload)
        )
        last[stream] = event_id
    return events


def frames_of(events: Iterable[Event]) -> list[bytes]:
    """Return the frames that the writer makes of events."""
    return [encode_frame(event, SEED) for event in events]


def forged_frames(rng: random.Random, count: int) -> list[bytes]:
    """Return frames whose checksums match, of bodies that no writer makes."""
    frames: list[bytes] = []
    for event in some_events(rng, count, 60):
        fields: list[object] = [event.id, event.prev, event.time_us, event.stream, event.flags, event.payload]
        if rng.random() < 0.2:
            fields[rng.choice((0, 1, 2, 4))] = rng.choice((-1, *LARGE))
        body = hostile_array(fields, rng) if rng.random() < 0.5 else bytes(msgspec.msgpack.encode(fields))
        frames.append(frame(body, SEED))
    return frames


def forged_header(rng: random.Random, kind: int, *, harm: float = 0.1) -> bytes:
    """Return a file header whose checksum matches; some fields are others than they should be."""

    def field(usual: int, bits: int = 64) -> int:
        return rng.choice(EXTREMES + LARGE) & ((1 << bits) - 1) if rng.random() < harm else usual

    fields = struct.pack(
        "<8sHBB4xQQQQQQ",
        b"LOGSTORE",
        field(1, 16),
        field(kind, 8),
        field(1, 8),
        field(STORE_ID),
        field(SALT),
        field(1),
        field(FIRST_ID),
        field(0),
        field(0),
    )
    return fields + crc(fields)


def check_decoded(frames: Iterable[bytes]) -> int:
    """Have every frame decoded, as whoever is given them does; return how many there are.

    Raises:
        BrokenPromiseError: The two ways of decoding do not agree, or numbers are out of bounds.
    """
    count = 0
    for each in frames:
        event, stamp = decode_frame(each), decode_stamp(each)
        if (event.id, event.prev, event.time_us, event.stream, event.flags) != tuple(
            getattr(stamp, name) for name in ("id", "prev", "time_us", "stream", "flags")
        ):
            raise BrokenPromiseError("an event and its stamp are not the same")
        if not (0 <= event.id <= MAX_ID and 0 <= event.prev <= MAX_ID and 0 <= event.time_us <= MAX_ID):
            raise BrokenPromiseError(f"a number that SQLite cannot hold was taken: {stamp}")
        count += 1
    return count


def check_written(found: Iterable[bytes], written: frozenset[bytes], given: Input) -> None:
    """Check that nothing is taken that nobody wrote.

    Raises:
        BrokenPromiseError: Something is.
    """
    if not given.forged and not written.issuperset(found):
        raise BrokenPromiseError("bytes were taken that were never written")


class HeaderTarget(Target):
    """The header of every file of the log."""

    name = "header"

    def __init__(self) -> None:
        self._headers = [
            FileHeader(
                kind=kind, store_id=STORE_ID, salt=SALT, number=4, incarnation=FIRST_ID, follows=3, follows_end=9
            )
            for kind in _KINDS
        ]
        self._samples = [header.encode() for header in self._headers]

    def draw(self, rng: random.Random) -> Input:
        kind = rng.choice(_KINDS)
        if rng.random() < 0.3:
            return Input(forged_header(rng, kind, harm=0.3), True, (kind,))
        return Input(damaged(rng.choice(self._samples), rng, self._samples), False, (kind,))

    def feed(self, given: Input) -> bool:
        found = decode_header(given.data, Path("file"), given.numbers[0])
        # Bytes 12 to 16 are zeros that the format keeps for later.
        if not given.forged and found not in self._headers:
            raise BrokenPromiseError(f"a header was taken that was never written: {found}")
        return True


class FramesTarget(Target):
    """Frames one after another, and among damage."""

    name = "frames"

    def __init__(self) -> None:
        rng = random.Random(1)
        self._frames = frames_of(some_events(rng, 60))
        self._written = frozenset(self._frames)
        self._samples = [b"".join(self._frames[place : place + 5]) for place in range(0, 60, 5)]

    def draw(self, rng: random.Random) -> Input:
        if rng.random() < 0.4:
            pieces = forged_frames(rng, rng.randrange(1, 8))
            return Input(b"".join(pieces) + rng.choice((b"", b"\x96" * 40)), True)
        return Input(damaged(rng.choice(self._samples), rng, self._samples), False)

    def feed(self, given: Input) -> bool:
        straight = [each for _, each in iter_frames(given.data, SEED)]
        saved = [each for _, each in salvage_frames(given.data, SEED)]
        check_written(straight, self._written, given)
        check_written(saved, self._written, given)
        if saved[: len(straight)] != straight:
            raise BrokenPromiseError("a search among damage does not find what lies whole at the beginning")
        return check_decoded(saved) > 0


class JournalTarget(Target):
    """A journal as recovery reads it, with and without its header, and as others read it while it grows."""

    name = "journal"

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="logstore-fuzz-"))
        try:
            self._samples = [self._sample(folder, number) for number in range(6)]
        finally:
            shutil.rmtree(folder)
        self._written = frozenset(each for sample in self._samples for each in self._frames(sample))

    def _sample(self, folder: Path, number: int) -> bytes:
        rng = random.Random(number)
        path = folder / f"{number:010d}.journal"
        header = FileHeader(
            kind=KIND_JOURNAL, store_id=STORE_ID, salt=SALT + 2 * number, number=1, incarnation=FIRST_ID
        )
        writer = JournalWriter(_DISK, path, header)
        frames = frames_of(some_events(rng, (1, 6, 12, 12, 20, 40)[number], (300, 300, 300, 300, 3000, 30)[number]))
        while frames:
            size = rng.randrange(1, 6)
            writer.write(frames[:size])
            del frames[:size]
            if number % 2 or rng.random() < 0.3:
                writer.sync()
        if number > 3:
            writer.seal()
        writer.close()
        data = path.read_bytes()
        # Of the zeros written ahead a few do.
        return data[: len(data.rstrip(b"\0")) + 600]

    def _frames(self, sample: bytes) -> list[bytes]:
        return scan_journal(sample, Path("sample")).frames

    def draw(self, rng: random.Random) -> Input:
        if rng.random() < 0.4:
            data, forged = self._forged(rng), True
        else:
            data, forged = damaged(rng.choice(self._samples), rng, self._samples), False
        places = (0, 0, PAGE_BYTES, len(data) // 2, len(data), len(data) + 9000, END_OF_FILE - 1)
        return Input(data, forged, (rng.choice(places), rng.choice((-1, -1, *places))))

    def _forged(self, rng: random.Random) -> bytes:
        """Return a journal of batches whose checksums match, some of whose fields do not."""

        def field(usual: int, bits: int = 32) -> int:
            return rng.choice(EXTREMES + LARGE) & ((1 << bits) - 1) if rng.random() < 0.04 else usual

        header = forged_header(rng, KIND_JOURNAL, harm=0.02)
        data = bytearray(header.ljust(PAGE_BYTES, b"\0"))
        chain, durable = struct.unpack("<I", header[-4:])[0], 0
        salt = int.from_bytes(header[24:32], "little")
        for number in range(rng.randrange(1, 7)):
            frames = forged_frames(rng, rng.randrange(5)) if rng.random() < 0.5 else frames_of(some_events(rng, 3, 90))
            body = b"".join(frames)
            if rng.random() < 0.1:
                body = damaged(body, rng)
            head = struct.pack(
                "<QIIIIQI",
                field(salt, 64),
                field(number),
                field(len(frames)),
                field(len(body)),
                field(chain),
                field(durable, 64),
                field(google_crc32c.value(body)),
            )
            data += head + crc(head) + body
            chain = google_crc32c.value(head)
            if rng.random() < 0.5:
                durable = len(data)
                data += bytes(next_page(durable) - durable)
        return damaged(bytes(data), rng) if rng.random() < 0.3 else bytes(data)

    def feed(self, given: Input) -> bool:
        witness, end = given.numbers
        limit = None if end < 0 else end
        headless = scan_headless(given.data, STORE_ID, witness, limit, "made up")
        self._check(headless, given)
        scan = scan_journal(given.data, Path("0000000001.journal"), witness, limit)
        self._check(scan, given)
        self._follow(given, scan)
        return bool(scan.frames)

    def _check(self, scan: JournalScan, given: Input) -> None:
        check_written(scan.frames, self._written, given)
        check_decoded(scan.frames)
        if not 0 <= scan.end <= END_OF_FILE:
            raise BrokenPromiseError(f"a journal of {len(given.data)} bytes ends at {scan.end}")
        for bad in scan.damage:
            if not (0 <= bad.offset <= MAX_ID and 0 <= bad.length <= MAX_ID):
                raise BrokenPromiseError(f"damage that cannot be noted: {bad}")

    def _follow(self, given: Input, scan: JournalScan) -> None:
        """Read it as another process does, piece by piece, and compare."""
        header = decode_header(given.data, Path("file"), KIND_JOURNAL)
        reader = JournalReader(header, given.data[:HEADER_BYTES])
        found: list[bytes] = []
        for stop in (PAGE_BYTES + 100, len(given.data) // 2, len(given.data)):
            base = reader.offset
            for batch in reader.batches(
                given.data[base:stop], base, given.numbers[1] if given.numbers[1] >= 0 else None
            ):
                found += [each for _, each in iter_frames(batch.body, header.seed)]
        check_written(found, self._written, given)
        if not scan.damage and not given.forged and found != scan.frames:
            raise BrokenPromiseError("whoever follows a journal reads something else than recovery")


class SegmentTarget(Target):
    """A segment, as it is indexed, copied and verified."""

    name = "segment"

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="logstore-fuzz-"))
        (folder / "segments").mkdir()
        try:
            self._samples = [self._sample(folder, number) for number in range(1, 5)]
        finally:
            shutil.rmtree(folder)
        self._written = frozenset(
            each for sample in self._samples for _, each in iter_frames(sample, SEED, HEADER_BYTES)
        )

    def _sample(self, folder: Path, number: int) -> bytes:
        header = FileHeader(kind=KIND_SEGMENT, store_id=STORE_ID, salt=SALT, number=number, incarnation=FIRST_ID)
        writer = SegmentWriter(_DISK, folder, header)
        writer.append(b"".join(frames_of(some_events(random.Random(number), 12 * number))))
        writer.sync()
        writer.close()
        return writer.path.read_bytes()

    def draw(self, rng: random.Random) -> Input:
        if rng.random() < 0.4:
            frames = forged_frames(rng, rng.randrange(1, 9)) + frames_of(some_events(rng, 3))
            rng.shuffle(frames)
            return Input(forged_header(rng, KIND_SEGMENT, harm=0.02) + b"".join(frames), True)
        return Input(damaged(rng.choice(self._samples), rng, self._samples), False)

    def feed(self, given: Input) -> bool:
        data = given.data
        indexed: list[bytes] = []
        for chunk in scan_segment(data, SEED):
            for event, offset, length in zip(chunk.events, chunk.offsets, chunk.lengths, strict=True):
                indexed.append(data[offset : offset + length])
                if decode_frame(indexed[-1]) != event:
                    raise BrokenPromiseError(f"the event at {offset} is indexed as {event}")
        check_written(indexed, self._written, given)
        check_decoded(indexed)
        verified = Frames(data, SEED)
        spots = [data[start : start + size] for start, size in zip(verified.offsets, verified.lengths, strict=True)]
        if spots != indexed:
            raise BrokenPromiseError("what is indexed of a segment and what is verified is not the same")
        copied = [each for _, each in iter_segment(data, Path("1.segment"))]
        check_written(copied, self._written, given)
        return check_decoded(copied) > 0


FILE_TARGETS: Final[tuple[type[Target], ...]] = (HeaderTarget, FramesTarget, JournalTarget, SegmentTarget)
