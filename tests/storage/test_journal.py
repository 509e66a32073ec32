"""What a journal gives back after a crash, and after damage: the heart of the promise to lose nothing acknowledged.

A crash may do what it likes to bytes that were not synced: none of that is damage, and a prefix of it survives. Damage
changes bytes that were synced: it is reported, and everything around it is served.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import pytest

from crash_device import SECTOR_BYTES
from logstore.errors import DamageError, FormatVersionError
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_JOURNAL, KIND_SEGMENT, FileHeader, frame_seed
from logstore.storage.journal import (
    BATCH_HEADER_BYTES,
    MAX_FILE_BYTES,
    PAGE_BYTES,
    JournalReader,
    JournalScan,
    JournalWriter,
    next_page,
    read_header,
    scan_journal,
)
from logstore.storage.record import Event, decode_frame, encode_frame
from tests.storage.disks import CrashDisk, Fault, FaultyDisk, open_descriptors

PATH = Path("0000000001.journal")
STORE_ID = 77
SEED = frame_seed(STORE_ID)
HEADER = FileHeader(kind=KIND_JOURNAL, store_id=STORE_ID, salt=0x5A17_0000_0000_0001, number=1)


def frames_of(rng: random.Random, count: int, first_id: int, largest: int = 700) -> list[bytes]:
    return [
        encode_frame(Event(each, 0, 0, "stream", 0, rng.randbytes(rng.randrange(largest))), SEED)
        for each in range(first_id, first_id + count)
    ]


class Written(NamedTuple):
    """A batch as it was written."""

    start: int
    end: int
    frames: list[bytes]


class Journal:
    """A journal on a disk that can crash, and what was written to it."""

    def __init__(self) -> None:
        self.disk = CrashDisk()
        self.writer = JournalWriter(self.disk, PATH, HEADER)
        self.batches: list[Written] = []
        self.synced = 0
        self.ids = 1

    def write(self, frames: list[bytes]) -> None:
        start = len(b"".join(frames)) + BATCH_HEADER_BYTES
        self.writer.write(frames)
        self.batches.append(Written(self.writer.end - start, self.writer.end, frames))
        self.ids += len(frames)

    def sync(self) -> None:
        self.writer.sync()
        self.synced = len(self.batches)

    def seal(self) -> None:
        self.writer.seal()
        self.batches.append(Written(self.writer.end - BATCH_HEADER_BYTES, self.writer.end, []))
        self.synced = len(self.batches)

    @property
    def data(self) -> bytes:
        return bytes(self.disk.content)

    @property
    def acknowledged(self) -> list[bytes]:
        return [frame for batch in self.batches[: self.synced] for frame in batch.frames]

    @property
    def frames(self) -> list[bytes]:
        return [frame for batch in self.batches for frame in batch.frames]


def write_random(journal: Journal, rng: random.Random) -> None:
    count = rng.choice((1, 1, 1, 2, 5, 20))
    # Past 16 KiB a batch is written without zeros ahead.
    largest = 20_000 if rng.random() < 0.05 else 700
    journal.write(frames_of(rng, count, journal.ids, largest))


def aligned(rng: random.Random, batches: int) -> Journal:
    """A journal as `always` writes it: a sync for every batch."""
    journal = Journal()
    for _ in range(batches):
        write_random(journal, rng)
        journal.sync()
    return journal


def packed(rng: random.Random, batches: int) -> Journal:
    """A journal as `interval` writes it: several batches to a sync; it ends with a sync."""
    journal = Journal()
    for _ in range(batches):
        write_random(journal, rng)
        if rng.random() < 0.3:
            journal.sync()
    journal.sync()
    return journal


def unsynced(rng: random.Random, batches: int) -> Journal:
    """A journal as `os` writes it: nobody syncs it."""
    journal = Journal()
    for _ in range(batches):
        write_random(journal, rng)
    return journal


def ids_of(frames: Sequence[bytes]) -> list[int]:
    """Ids say more than bytes when a list of frames is not what it should be."""
    return [decode_frame(frame).id for frame in frames]


# Crashes.


@pytest.mark.promise("always-on-disk", "power-cut-no-hole", "torn-is-no-damage")
@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("syncs", [1.0, 0.25], ids=["aligned", "packed"])
def test_a_crash_loses_nothing_acknowledged_and_is_no_damage(syncs: float, seed: int) -> None:
    rng = random.Random(seed)
    journal = Journal()
    for _ in range(rng.randrange(1, 12)):
        write_random(journal, rng)
        survives_crashes(journal, rng, tries=4)
        if rng.random() < syncs:
            journal.sync()


def survives_crashes(journal: Journal, rng: random.Random, tries: int) -> None:
    crashes = journal.disk.crashes(rng)
    witness = journal.batches[journal.synced - 1].end if journal.synced else 0
    for _ in range(tries):
        data = next(crashes)
        try:
            # The mark of the lane may be on disk or not.
            scan = scan_journal(data, PATH, rng.choice((0, witness)))
        except DamageError:
            assert not journal.synced, "the header was on disk"
            continue
        assert scan.damage == []
        survivors = ids_of(scan.frames)
        assert survivors == ids_of(journal.frames)[: len(survivors)]
        assert len(survivors) >= len(journal.acknowledged)
        assert scan.end in {PAGE_BYTES, *(batch.end for batch in journal.batches)}


@pytest.mark.promise("power-cut-no-hole")
@pytest.mark.parametrize("seed", range(20))
def test_a_crash_while_the_file_is_sealed_loses_nothing(seed: int) -> None:
    rng = random.Random(seed)
    journal = packed(rng, 5)
    write_random(journal, rng)
    journal.sync()
    journal.write([])
    survives_crashes(journal, rng, tries=30)


@pytest.mark.promise("power-cut-no-hole")
def test_a_crash_leaves_whole_batches_or_none_of_them() -> None:
    rng = random.Random(1)
    journal = Journal()
    journal.write(frames_of(rng, 3, 1))
    journal.sync()
    journal.write(frames_of(rng, 3, 4))
    journal.write(frames_of(rng, 3, 7))
    second = journal.batches[1]
    for cut in range(second.start, second.end):
        scan = scan_journal(journal.data[:cut], PATH)
        assert ids_of(scan.frames) == [1, 2, 3]
        assert (scan.end, scan.damage) == (journal.batches[0].end, [])
    torn = bytearray(journal.data)
    torn[second.start : second.end] = bytes(second.end - second.start)
    scan = scan_journal(bytes(torn), PATH)
    # The third batch is whole, but a hole before it would break the order of what was sent.
    assert ids_of(scan.frames) == [1, 2, 3]
    assert scan.torn_bytes == journal.batches[2].end - scan.end


@pytest.mark.promise("torn-is-no-damage")
def test_a_torn_write_does_not_reach_the_page_of_what_was_acknowledged() -> None:
    rng = random.Random(2)
    journal = packed(rng, 60)
    synced = 0
    for batch in journal.batches:
        if batch.start % PAGE_BYTES == 0:
            synced += 1
            continue
        assert batch.start == journal.batches[journal.batches.index(batch) - 1].end
    assert synced > 5
    for before, batch in zip(journal.batches, journal.batches[1:], strict=False):
        assert batch.start in (before.end, next_page(before.end))


# Zeros written ahead.


@pytest.mark.promise("nothing-wrong-is-served")
@pytest.mark.parametrize("build", [aligned, packed])
def test_zeros_written_ahead_are_never_a_batch_wherever_the_file_ends(
    build: Callable[[random.Random, int], Journal],
) -> None:
    journal = build(random.Random(3), 6)
    end = journal.batches[-1].end
    data = journal.data
    assert len(data) > end + 2 * PAGE_BYTES
    assert not any(data[end:])
    whole = scan_journal(data, PATH, end)
    assert ids_of(whole.frames) == ids_of(journal.frames)
    sizes = {end, end + 1, next_page(end), len(data), *range(end, len(data), 997)}
    for size in sizes:
        for zeros in (0, 5 * PAGE_BYTES):
            scan = scan_journal(data[:size] + bytes(zeros), PATH, end)
            assert (scan.frames, scan.end, scan.torn_bytes, scan.damage) == (whole.frames, end, 0, [])


def test_a_journal_without_a_batch_is_empty_and_whole() -> None:
    journal = Journal()
    scan = scan_journal(journal.data, PATH)
    assert (scan.header, scan.frames, scan.end, scan.torn_bytes, scan.damage) == (HEADER, [], PAGE_BYTES, 0, [])
    for size in (HEADER_BYTES, HEADER_BYTES + 1, PAGE_BYTES - 1):
        assert scan_journal(journal.data[:size], PATH).frames == []


def test_writing_into_zeros_leaves_the_length_of_the_file_alone() -> None:
    rng = random.Random(4)
    journal = Journal()
    sizes = set()
    for _ in range(20):
        journal.write(frames_of(rng, 1, journal.ids))
        journal.sync()
        sizes.add(len(journal.data))
    assert len(sizes) == 1


# Damage.

Damager = Callable[[random.Random, bytearray, int, int], None]


def flip_bit(rng: random.Random, data: bytearray, start: int, end: int) -> None:
    place = rng.randrange(start, end)
    data[place] ^= 1 << rng.randrange(8)


def zero_sectors(rng: random.Random, data: bytearray, start: int, end: int) -> None:
    first = rng.randrange(start, end) // SECTOR_BYTES * SECTOR_BYTES
    size = min(SECTOR_BYTES * rng.choice((1, 1, 2, 8)), next_page(end) - first, len(data) - first)
    data[first : first + size] = bytes(size)


def trash_page(rng: random.Random, data: bytearray, start: int, end: int) -> None:
    first = rng.randrange(start, end) // PAGE_BYTES * PAGE_BYTES
    size = min(PAGE_BYTES, len(data) - first)
    data[first : first + size] = rng.randbytes(size)


def truncate(rng: random.Random, data: bytearray, start: int, end: int) -> None:
    del data[rng.randrange(start, end) :]


DAMAGERS: list[Damager] = [flip_bit, zero_sectors, trash_page, truncate]


def check_reported(journal: Journal, damaged: bytes, scan: JournalScan) -> None:
    """Every batch whose bytes changed is reported, every frame whose bytes did not is served, nothing else is."""
    original = journal.data
    changed = [
        batch
        for batch in journal.batches[: journal.synced]
        if damaged[batch.start : batch.end] != original[batch.start : batch.end]
    ]
    for batch in changed:
        assert any(bad.offset < batch.end and batch.start < bad.offset + bad.length for bad in scan.damage), (
            f"the damage in {batch.start}..{batch.end} is not reported: {scan.damage}"
        )
    if not changed:
        assert scan.damage == []
    whole: list[bytes] = []
    for batch in journal.batches[: journal.synced]:
        offset = batch.start + BATCH_HEADER_BYTES
        for frame in batch.frames:
            if damaged[offset : offset + len(frame)] == frame:
                whole.append(frame)
            offset += len(frame)
    assert ids_of(scan.frames) == ids_of(whole)
    assert scan.frames == whole
    if all(bad.lost_events is not None for bad in scan.damage):
        assert sum(bad.lost_events or 0 for bad in scan.damage) == len(journal.acknowledged) - len(whole)


@pytest.mark.promise("damage-is-told")
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("damage", DAMAGERS, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("build", [aligned, packed])
def test_with_a_witness_every_damage_is_reported_and_everything_else_served(
    build: Callable[[random.Random, int], Journal], damage: Damager, seed: int
) -> None:
    rng = random.Random(seed)
    journal = build(rng, rng.randrange(1, 15))
    end = journal.batches[-1].end
    for _ in range(12):
        data = bytearray(journal.data)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            if len(data) > PAGE_BYTES:
                damage(rng, data, PAGE_BYTES, min(end, len(data)))
        check_reported(journal, bytes(data), scan_journal(bytes(data), PATH, end))


@pytest.mark.promise("damage-is-told")
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("build", [aligned, packed, unsynced])
def test_the_seal_of_a_finished_file_is_witness_enough(
    build: Callable[[random.Random, int], Journal], seed: int
) -> None:
    rng = random.Random(seed)
    journal = build(rng, rng.randrange(1, 15))
    last = journal.batches[-1].end
    journal.seal()
    for damage in (flip_bit, zero_sectors, trash_page):
        for _ in range(4):
            data = bytearray(journal.data)
            damage(rng, data, PAGE_BYTES, last)
            check_reported(journal, bytes(data), scan_journal(bytes(data), PATH))


@pytest.mark.promise("damage-is-told")
@pytest.mark.parametrize("seed", range(40))
def test_damage_before_unsynced_batches_is_told_from_their_torn_writes(seed: int) -> None:
    rng = random.Random(seed)
    journal = packed(rng, rng.randrange(1, 8))
    end = journal.batches[-1].end
    for _ in range(rng.randrange(1, 4)):
        write_random(journal, rng)
    crashes = journal.disk.crashes(rng)
    for _ in range(6):
        data = bytearray(next(crashes))
        flip_bit(rng, data, PAGE_BYTES, end)
        scan = scan_journal(bytes(data), PATH, end)
        survivors = [frame for frame in scan.frames if decode_frame(frame).id > len(journal.acknowledged)]
        scan.frames = scan.frames[: len(scan.frames) - len(survivors)]
        unsynced = journal.frames[len(journal.acknowledged) :]
        assert survivors == unsynced[: len(survivors)]
        check_reported(journal, bytes(data), scan)


@pytest.mark.parametrize("seed", range(20))
def test_without_a_witness_damage_in_the_last_batch_looks_like_a_torn_write(seed: int) -> None:
    # Nothing can tell them apart: hence the seal, the durable mark and the end in the next file's header.
    rng = random.Random(seed)
    journal = aligned(rng, rng.randrange(1, 5))
    last = journal.batches[-1]
    data = bytearray(journal.data)
    flip_bit(rng, data, last.start, last.end)
    scan = scan_journal(bytes(data), PATH)
    assert scan.damage == []
    assert ids_of(scan.frames) == ids_of([frame for batch in journal.batches[:-1] for frame in batch.frames])
    assert scan.torn_bytes > 0
    assert scan_journal(bytes(data), PATH, last.end).damage != []


@pytest.mark.promise("damage-is-told")
@pytest.mark.parametrize("seed", range(20))
def test_without_a_witness_damage_in_any_earlier_batch_is_reported(seed: int) -> None:
    rng = random.Random(seed)
    journal = aligned(rng, rng.randrange(2, 10))
    for damage in (flip_bit, zero_sectors):
        before_last = journal.batches[-2].end
        data = bytearray(journal.data)
        damage(rng, data, PAGE_BYTES, before_last)
        check_reported(journal, bytes(data), scan_journal(bytes(data), PATH))


def test_the_count_of_lost_events_is_right_when_the_header_of_a_small_batch_is_gone() -> None:
    # The batch behind it begins on the page where the lost one might have: it must not be taken for it.
    rng = random.Random(5)
    journal = Journal()
    journal.write(frames_of(rng, 1, 1))
    journal.write(frames_of(rng, 3, 2, largest=50))
    journal.sync()
    journal.write(frames_of(rng, 4, 5))
    journal.sync()
    lost, following = journal.batches[1], journal.batches[2]
    assert following.start == next_page(journal.batches[0].end)
    data = bytearray(journal.data)
    data[lost.start : lost.end] = bytes(lost.end - lost.start)
    scan = scan_journal(bytes(data), PATH, following.end)
    assert ids_of(scan.frames) == [1, 5, 6, 7, 8]
    (bad,) = scan.damage
    assert bad.lost_events is None, "a count that nobody can know"
    assert bad.offset + bad.length == following.start


def test_the_count_of_lost_events_is_unknown_when_more_than_one_batch_is_gone_at_the_end() -> None:
    rng = random.Random(6)
    journal = Journal()
    for count in (1, 2, 3):
        journal.write(frames_of(rng, count, journal.ids))
        journal.sync()
    _, second, third = journal.batches
    data = bytearray(journal.data[: third.start])
    data[second.end - 1] ^= 1
    scan = scan_journal(bytes(data), PATH, third.end)
    assert ids_of(scan.frames) == [1, 2]
    (bad,) = scan.damage
    assert bad.lost_events is None


def test_the_count_of_lost_events_is_told_when_the_header_of_their_batch_is_whole() -> None:
    rng = random.Random(7)
    journal = aligned(rng, 3)
    journal.write(frames_of(rng, 9, journal.ids))
    journal.sync()
    journal.write(frames_of(rng, 1, journal.ids))
    journal.sync()
    batch = journal.batches[3]
    data = bytearray(journal.data)
    data[batch.end - 1] ^= 1
    (bad,) = scan_journal(bytes(data), PATH).damage
    assert bad.lost_events == 1
    assert bad.offset <= batch.start
    assert "does not match its checksum" in bad.reason


def test_a_lost_page_at_the_end_is_damage_when_a_witness_saw_it() -> None:
    journal = aligned(random.Random(8), 4)
    last = journal.batches[-1]
    scan = scan_journal(journal.data[: last.start], PATH, last.end)
    assert ids_of(scan.frames) == ids_of([frame for batch in journal.batches[:-1] for frame in batch.frames])
    (bad,) = scan.damage
    assert bad.offset + bad.length == scan.end == last.end


def test_a_badly_damaged_file_is_read_in_reasonable_time() -> None:
    # Every second of thousands of batches is bad: a look at all the later ones for each would take minutes.
    rng = random.Random(9)
    journal = Journal()
    for _ in range(3_000):
        journal.write(frames_of(rng, 1, journal.ids, largest=5))
    journal.sync()
    data = bytearray(journal.data)
    for batch in journal.batches[::2]:
        data[batch.end - 1] ^= 1
    scan = scan_journal(bytes(data), PATH, journal.batches[-1].end)
    assert len(scan.damage) == 1_500
    assert ids_of(scan.frames) == ids_of(journal.frames)[1::2]


def test_a_batch_that_followed_another_one_is_not_taken() -> None:
    rng = random.Random(14)
    journals = [Journal(), Journal()]
    for number in range(3):
        for journal in journals:
            # As long, and under the same number, but with other events.
            journal.write([encode_frame(Event(number + 1, 0, 0, "stream", 0, rng.randbytes(100)), SEED)])
            journal.sync()
    one, other = journals
    last = one.batches[-1]
    data = one.data[: last.start] + other.data[last.start : last.end]
    scan = scan_journal(data, PATH, last.end)
    assert len(scan.damage) == 1
    assert scan.damage[0].offset == one.batches[1].end


# The end that the next file names.


@pytest.mark.promise("failed-file-given-up")
@pytest.mark.parametrize("build", [aligned, packed])
def test_what_lies_beyond_the_end_that_the_next_file_names_does_not_exist(
    build: Callable[[random.Random, int], Journal],
) -> None:
    rng = random.Random(10)
    journal = build(rng, 6)
    for count, batch in enumerate(journal.batches, 1):
        scan = scan_journal(journal.data, PATH, batch.end, limit=batch.end)
        assert ids_of(scan.frames) == [each for one in journal.batches[:count] for each in ids_of(one.frames)]
        assert (scan.end, scan.torn_bytes, scan.damage) == (batch.end, 0, [])


def test_damage_before_the_end_that_the_next_file_names_is_reported_and_nothing_beyond_is_served() -> None:
    rng = random.Random(11)
    journal = aligned(rng, 6)
    end = journal.batches[3].end
    data = bytearray(journal.data)
    data[journal.batches[3].end - 1] ^= 1
    scan = scan_journal(bytes(data), PATH, end, limit=end)
    served = [frame for batch in journal.batches[:3] for frame in batch.frames] + journal.batches[3].frames[:-1]
    assert ids_of(scan.frames) == ids_of(served)
    assert len(scan.damage) == 1
    assert scan.end == end


def test_a_file_that_was_given_up_before_its_first_sync_is_empty() -> None:
    journal = Journal()
    journal.write(frames_of(random.Random(12), 5, 1))
    scan = scan_journal(journal.data, PATH, PAGE_BYTES, limit=PAGE_BYTES)
    assert (scan.frames, scan.end, scan.torn_bytes, scan.damage) == ([], PAGE_BYTES, 0, [])


# Foreign and unreadable files.


@pytest.mark.promise("nothing-wrong-is-served")
def test_batches_of_another_file_are_not_read() -> None:
    # What an earlier file left in blocks that the file system gave out again.
    journal, other = Journal(), CrashDisk()
    rng = random.Random(13)
    writer = JournalWriter(
        other, PATH, FileHeader(kind=KIND_JOURNAL, store_id=STORE_ID, salt=HEADER.salt + 2, number=2)
    )
    writer.write(frames_of(rng, 3, 1))
    journal.write(frames_of(rng, 2, 1))
    journal.sync()
    end = next_page(journal.batches[-1].end)
    data = journal.data[:end] + bytes(other.content[PAGE_BYTES:])
    scan = scan_journal(data, PATH)
    assert ids_of(scan.frames) == [1, 2]
    assert scan.damage == []


def test_a_batch_of_the_same_file_in_a_wrong_place_is_not_read_as_its_next() -> None:
    journal = aligned(random.Random(14), 4)
    first, second, third = journal.batches[:3]
    moved = journal.data[: second.start] + journal.data[third.start : third.end]
    scan = scan_journal(moved, PATH)
    assert ids_of(scan.frames)[: len(first.frames)] == ids_of(first.frames)
    assert len(scan.damage) == 1


def test_a_bad_file_header_is_damage_with_its_place() -> None:
    data = bytearray(aligned(random.Random(15), 1).data)
    data[20] ^= 1
    with pytest.raises(DamageError, match=r"0000000001\.journal.*offset 0"):
        scan_journal(bytes(data), PATH)


def test_a_segment_is_no_journal_and_a_newer_journal_is_refused() -> None:
    with pytest.raises(DamageError):
        scan_journal(FileHeader(kind=KIND_SEGMENT, store_id=1, salt=1).encode(), PATH)
    data = bytearray(aligned(random.Random(16), 1).data)
    data[8] = 9
    with pytest.raises(FormatVersionError):
        scan_journal(bytes(data), PATH)


@pytest.mark.promise("nothing-wrong-is-served")
@pytest.mark.parametrize("seed", range(30))
def test_trash_behind_the_header_is_never_an_event(seed: int) -> None:
    rng = random.Random(seed)
    data = HEADER.encode().ljust(PAGE_BYTES, b"\0") + rng.randbytes(rng.randrange(20_000))
    scan = scan_journal(data, PATH)
    assert (scan.frames, scan.damage) == ([], [])


# Reading a journal that grows.


@pytest.mark.parametrize("seed", range(20))
def test_a_growing_journal_is_read_on_from_where_the_last_look_ended(seed: int) -> None:
    rng = random.Random(seed)
    journal = Journal()
    reader = JournalReader(HEADER, journal.data)
    seen: list[bytes] = []
    for _ in range(15):
        write_random(journal, rng)
        if rng.random() < 0.4:
            journal.sync()
        if rng.random() < 0.6:
            start = reader.offset
            for batch in reader.batches(journal.data[start : journal.writer.end], start):
                seen.append(batch.body)
            assert reader.offset == journal.writer.end
    seen += [batch.body for batch in reader.batches(journal.data)]
    assert b"".join(seen) == b"".join(journal.frames)


def test_a_reader_stops_before_a_batch_that_reaches_beyond_its_limit() -> None:
    journal = packed(random.Random(17), 5)
    for place, batch in enumerate(journal.batches):
        for limit in (batch.end - 1, batch.start + 1):
            reader = JournalReader(HEADER, journal.data)
            assert len(list(reader.batches(journal.data, limit=limit))) == place
        assert len(list(reader.batches(journal.data))) == len(journal.batches) - place


# Bytes with checksums that match, and that no writer wrote.


def forged(*batches: tuple[int, int, bytes]) -> bytes:
    """Return a journal of batches: up to where the file is said to be on disk, how many events, and the body."""
    data = bytearray(HEADER.encode().ljust(PAGE_BYTES, b"\0"))
    chain = int.from_bytes(HEADER.encode()[-4:], "little")
    for number, (durable, count, body) in enumerate(batches):
        checksum = google_crc32c.value(body)
        head = struct.pack("<QIIIIQI", HEADER.salt, number, count, len(body), chain, durable, checksum)
        chain = google_crc32c.value(head)
        data += head + struct.pack("<I", chain) + body
    return bytes(data)


def test_bytes_that_are_no_event_are_damage_though_the_batch_is_whole() -> None:
    first, second, third = frames_of(random.Random(22), 3, 1)
    body = b"\x93\x01\x02\x03"
    no_event = struct.pack("<II", len(body), google_crc32c.extend(SEED, body)) + body
    scan = scan_journal(forged((0, 3, first + no_event + second), (0, 1, third)), PATH)
    assert scan.frames == [first, second, third]
    assert [(each.offset, each.lost_events) for each in scan.damage] == [(PAGE_BYTES, 1)]
    assert scan.torn_bytes == 0


def test_a_place_that_no_journal_reaches_is_not_believed() -> None:
    frames = frames_of(random.Random(23), 2, 1)
    data = bytearray(forged((0, 1, frames[0]), ((1 << 64) - 1, 1, frames[1])))
    data[-1] ^= 1
    scan = scan_journal(bytes(data), PATH)
    assert scan.frames == frames[:1]
    # SQLite takes no more than 63 bits.
    assert [each.offset + each.length for each in scan.damage] == [MAX_FILE_BYTES]


@pytest.mark.parametrize("end", [0, 1, HEADER_BYTES, PAGE_BYTES])
def test_a_journal_that_is_said_to_end_before_its_first_batch_is_empty(end: int) -> None:
    data = forged((0, 1, frames_of(random.Random(24), 1, 1)[0]))
    scan = scan_journal(data, PATH, end, end)
    assert (scan.frames, scan.damage, scan.torn_bytes) == ([], [], 0)


# Writing on a disk that fails.


def on_disk(disk: Disk, path: Path) -> bytes:
    fd = disk.open(path)
    try:
        return disk.read(fd, disk.size(fd), 0)
    finally:
        disk.close(fd)


def test_the_journal_on_a_real_disk_is_what_was_written(tmp_path: Path) -> None:
    disk = Disk()
    path = tmp_path / PATH.name
    writer = JournalWriter(disk, path, HEADER)
    frames = frames_of(random.Random(18), 10, 1)
    for frame in frames:
        writer.write([frame])
        writer.sync()
    assert writer.durable == writer.end
    writer.seal()
    scan = scan_journal(on_disk(disk, path), path, writer.end)
    assert (scan.frames, scan.end, scan.torn_bytes, scan.damage) == (frames, writer.end, 0, [])
    fd = disk.open(path)
    assert read_header(disk, fd, path) == HEADER
    disk.close(fd)


@pytest.mark.promise("torn-is-no-damage")
@pytest.mark.parametrize("written", [0, 1, BATCH_HEADER_BYTES - 1, BATCH_HEADER_BYTES, 300])
def test_a_short_write_is_a_torn_write_to_whoever_reads_the_file(tmp_path: Path, written: int) -> None:
    disk = FaultyDisk()
    path = tmp_path / PATH.name
    writer = JournalWriter(disk, path, HEADER)
    rng = random.Random(19)
    writer.write(frames_of(rng, 2, 1))
    writer.sync()
    disk.fail(Fault("write", written=written))
    with pytest.raises(OSError, match="Input/output error"):
        writer.write(frames_of(rng, 2, 3, largest=3_000))
    writer.close()
    scan = scan_journal(on_disk(disk, path), path, writer.durable)
    assert ids_of(scan.frames) == [1, 2]
    assert scan.damage == []


def test_a_failed_sync_leaves_the_durable_end_where_it_was(tmp_path: Path) -> None:
    disk = FaultyDisk()
    writer = JournalWriter(disk, tmp_path / PATH.name, HEADER)
    rng = random.Random(20)
    writer.write(frames_of(rng, 2, 1))
    writer.sync()
    durable = writer.durable
    writer.write(frames_of(rng, 2, 3))
    disk.fail(Fault("sync"))
    with pytest.raises(OSError, match="Input/output error"):
        writer.sync()
    assert writer.durable == durable < writer.end
    writer.close()


@pytest.mark.parametrize("kind", ["create", "write", "sync_folder"])
def test_a_journal_that_cannot_be_begun_holds_no_descriptor(tmp_path: Path, kind: str) -> None:
    disk = FaultyDisk()
    disk.fail(Fault(kind))
    before = open_descriptors()
    with pytest.raises(OSError, match="Input/output error"):
        JournalWriter(disk, tmp_path / PATH.name, HEADER)
    assert open_descriptors() == before


def test_a_journal_never_takes_the_place_of_another(tmp_path: Path) -> None:
    disk = Disk()
    JournalWriter(disk, tmp_path / PATH.name, HEADER).close()
    before = on_disk(disk, tmp_path / PATH.name)
    with pytest.raises(FileExistsError):
        JournalWriter(disk, tmp_path / PATH.name, FileHeader(kind=KIND_JOURNAL, store_id=1, salt=1))
    assert on_disk(disk, tmp_path / PATH.name) == before


def test_a_batch_says_how_much_was_durable_when_it_was_written() -> None:
    journal = Journal()
    rng = random.Random(21)
    durable = []
    for _ in range(6):
        write_random(journal, rng)
        durable.append(journal.writer.durable)
        if rng.random() < 0.5:
            journal.sync()
    told = [int.from_bytes(journal.data[batch.start + 24 :][:8], "little") for batch in journal.batches]
    assert told == durable
