"""The parsers of registry, reservations and marks; of any file of the log record by record; and of large ones."""

from __future__ import annotations

import contextlib
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import google_crc32c
import msgspec

from crash_fuzz_files import FIRST_ID, SALT, SEED, STORE_ID, TIME_US, JournalTarget, SegmentTarget, crc, forged_header
from crash_fuzz_inputs import EXTREMES, LARGE, MIB, Input, Target, damaged, frame, hostile_array
from crash_kill import BrokenPromiseError
from logstore.ops.verify.dump import dump
from logstore.ops.verify.frames import Frames
from logstore.ops.verify.journals import LaneLook
from logstore.ops.verify.registry import check_registry
from logstore.storage.files import Disk
from logstore.storage.header import KIND_JOURNAL, KIND_REGISTRY, FileHeader
from logstore.storage.ids import MAX_ID
from logstore.storage.journal import PAGE_BYTES, scan_headless, scan_journal
from logstore.storage.lane import Marks, Reservation, boot_id, first_reservation, read_reservation
from logstore.storage.record import Event, encode_frame, salvage_frames
from logstore.storage.registry import OPENED, Entry, Registry, salvage_entries
from logstore.storage.scan import scan_segment

_DISK: Final = Disk()


class RegistryTarget(Target):
    """The registry of sessions, opened and verified."""

    name = "registry"
    share = 0.5

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="logstore-fuzz-"))
        self._path = self._folder / "registry.log"
        header = FileHeader(kind=KIND_REGISTRY, store_id=STORE_ID, salt=SALT)
        self._head = header.encode()
        self._seed = int(google_crc32c.value(SALT.to_bytes(8, "little")))
        entries = [Entry(OPENED, f"{number:064x}", FIRST_ID, TIME_US, b'{"scope":1}', "a/") for number in range(20)]
        entries += [Entry(number % 4 + 1, f"{number:064x}", FIRST_ID, TIME_US, b"") for number in range(12)]
        self._written = frozenset(entries)
        self._samples = [
            self._head + b"".join(frame(msgspec.msgpack.encode(entry), self._seed) for entry in entries[start:])
            for start in (0, 10, 30)
        ]

    def draw(self, rng: random.Random) -> Input:
        if rng.random() < 0.4:
            bodies = [
                hostile_array(
                    [rng.choice((1, 2, 3, 4, 9)), "k", FIRST_ID, TIME_US, b"data", "a/"][: rng.choice((5, 6))], rng
                )
                for _ in range(rng.randrange(1, 8))
            ]
            head = self._head if rng.random() < 0.9 else forged_header(rng, KIND_REGISTRY)
            return Input(head + b"".join(frame(body, self._seed) for body in bodies), True)
        return Input(damaged(rng.choice(self._samples), rng, self._samples), False)

    def feed(self, given: Input) -> bool:
        saved = [each.entry for each in salvage_entries(given.data, SALT)]
        if not given.forged and not self._written.issuperset(saved):
            raise BrokenPromiseError("an entry was taken that was never written")
        self._path.write_bytes(given.data)
        check_registry(_DISK, self._folder, [], self._folder / "events.db")
        with contextlib.closing(Registry(_DISK, self._folder)) as registry:
            registry.open(STORE_ID)
            for change in registry.changes():
                if not (0 <= change.incarnation <= MAX_ID and 0 <= change.opened_us <= MAX_ID):
                    raise BrokenPromiseError(f"a session that SQLite cannot hold was taken: {change}")
            registry.open_session("new", FIRST_ID, TIME_US, b"data")
            if registry.find("new") is None:
                raise BrokenPromiseError("a session that was opened is not found")
            return bool(registry.sessions())

    def close(self) -> None:
        shutil.rmtree(self._folder)


class LaneTarget(Target):
    """The reservation and the marks of a lane."""

    name = "lane"
    share = 0.5

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="logstore-fuzz-")) / "0003"
        self._folder.mkdir()
        self._reservation = Reservation(FIRST_ID, 70)
        first_reservation(_DISK, self._folder, self._reservation)
        state = (self._folder / "state").read_bytes()
        self._states = [state.ljust(PAGE_BYTES + 28, b"\0"), bytes(PAGE_BYTES) + state[PAGE_BYTES:]]
        words = struct.pack("<QQ", 5 << 32 | 9000, 5 << 32 | 8192)
        self._marks = [(words + boot_id() + struct.pack("<Q", FIRST_ID)).ljust(PAGE_BYTES, b"\0")]

    def draw(self, rng: random.Random) -> Input:
        if rng.random() < 0.5:
            return Input(damaged(rng.choice(self._marks), rng, self._marks), True, (0,))
        if rng.random() < 0.5:
            fields = struct.pack("<QQQ", *(rng.choice((1, *EXTREMES, *LARGE)) for _ in range(3)))
            return Input(bytes(PAGE_BYTES) + fields + crc(fields), True, (1,))
        return Input(damaged(rng.choice(self._states), rng, self._states), False, (1,))

    def feed(self, given: Input) -> bool:
        state, marks = self._folder / "state", self._folder / "marks"
        state.write_bytes(given.data if given.numbers[0] else self._states[0])
        marks.write_bytes(self._marks[0] if given.numbers[0] else given.data)
        found = read_reservation(_DISK, self._folder)
        if not given.forged and found not in (self._reservation, Reservation(0, 0)):
            raise BrokenPromiseError(f"a reservation was taken that was never written: {found}")
        if not 0 <= found.event_id <= MAX_ID or not 0 <= found.ordinal <= MAX_ID:
            raise BrokenPromiseError(f"a reservation of what can be no id was taken: {found}")
        LaneLook(_DISK, self._folder, 3, STORE_ID, set(), quick=False).run()
        with (
            contextlib.suppress(FileNotFoundError),
            contextlib.closing(Marks(_DISK, self._folder, look_only=True)) as seen,
        ):
            return max(seen.visible, seen.durable) > (0, 0)
        return False

    def close(self) -> None:
        shutil.rmtree(self._folder.parent)


class DumpTarget(Target):
    """Any file of the log, record by record."""

    name = "dump"
    share = 0.3

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="logstore-fuzz-"))
        self._sources: Sequence[tuple[str, Target]] = (
            ("1.journal", JournalTarget()),
            ("1.segment", SegmentTarget()),
            ("registry.log", RegistryTarget()),
        )

    def draw(self, rng: random.Random) -> Input:
        place = rng.randrange(len(self._sources))
        given = self._sources[place][1].draw(rng)
        return Input(given.data, given.forged, (place,))

    def feed(self, given: Input) -> bool:
        path = self._folder / self._sources[given.numbers[0]][0]
        path.write_bytes(given.data)
        end, whole = 0, False
        for each in dump(path):
            if each.what not in ("batch", "seal"):
                if each.offset < end:
                    raise BrokenPromiseError(f"dump goes back from {end} to {each.offset}")
                end = each.offset + each.size
            whole |= each.what in ("event", "entry")
        return whole

    def close(self) -> None:
        for _, source in self._sources:
            source.close()
        shutil.rmtree(self._folder)


class LargeTarget(Target):
    """Files of megabytes that are made to take a parser as long as can be."""

    name = "large-files"
    share = 0.01
    cpu_s = 40.0
    memory_bytes = 512 * MIB

    def draw(self, rng: random.Random) -> Input:
        data = rng.choice(_LARGE)(rng, rng.choice((1, 2, 4)) * MIB)
        return Input(data, True, (rng.randrange(len(_READERS)), rng.choice((0, len(data)))))

    def feed(self, given: Input) -> bool:
        reader, witness = given.numbers
        _READERS[reader](given.data, witness)
        return True


def _dumped(name: str) -> Callable[[bytes, int], object]:
    def read(data: bytes, _witness: int) -> None:
        with tempfile.TemporaryDirectory(prefix="logstore-fuzz-") as folder:
            path = Path(folder, name)
            path.write_bytes(data)
            list(dump(path))

    return read


_READERS: Final[tuple[Callable[[bytes, int], object], ...]] = (
    lambda data, _: list(salvage_frames(data, SEED)),
    lambda data, _: list(scan_segment(data, SEED)),
    lambda data, _: Frames(data, SEED),
    lambda data, _: list(salvage_entries(data, SALT)),
    lambda data, witness: scan_headless(data, STORE_ID, witness, None, "made up"),
    lambda data, witness: scan_journal(data, Path("file"), witness),
    _dumped("1.journal"),
    _dumped("1.segment"),
    _dumped("registry.log"),
)


def _heads_everywhere(rng: random.Random, size: int) -> bytes:
    """Return frames that claim to reach far, each in the other, none of them true."""
    piece = struct.pack("<II", rng.choice((size // 2, size // 4, 1 << 20, 60_000)), rng.getrandbits(32)) + b"\x96"
    return piece * (size // len(piece))


def _true_and_false(rng: random.Random, size: int) -> bytes:
    """Return a true frame after each false one."""
    true = encode_frame(Event(FIRST_ID, 0, 1, "s", 0, b""), SEED)
    piece = true + struct.pack("<II", size // 2, 7) + b"\x96"
    return piece * (size // len(piece))


def _salts_everywhere(rng: random.Random, size: int) -> bytes:
    header = FileHeader(kind=KIND_JOURNAL, store_id=STORE_ID, salt=0x0101010101010101, number=1)
    return header.encode().ljust(PAGE_BYTES, b"\0") + b"\1" * size


def _batches_everywhere(rng: random.Random, size: int) -> bytes:
    """Return thousands of batch headers that can be trusted, of batches that are bad."""
    header = FileHeader(kind=KIND_JOURNAL, store_id=STORE_ID, salt=SALT, number=1).encode()
    pieces = [header.ljust(PAGE_BYTES, b"\0")]
    step = rng.choice((40, 48, 400))
    for number in range(size // step):
        head = struct.pack("<QIIIIQI", SALT, number, 1, rng.choice((8, size)), 0, size, 0)
        pieces.append((head + crc(head)).ljust(step, b"\x96"))
    return b"".join(pieces)


def _noise(rng: random.Random, size: int) -> bytes:
    return rng.choice((rng.randbytes(size), bytes(size), b"\x96" * size, b"\xff" * size, bytes(8) + b"\x96" * size))


_LARGE: Final = (_heads_everywhere, _true_and_false, _salts_everywhere, _batches_everywhere, _noise)


LANE_TARGETS: Final[tuple[type[Target], ...]] = (RegistryTarget, LaneTarget, DumpTarget, LargeTarget)
