"""A segment holds what was appended to it, from the offsets that it named."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from logstore.errors import DamageError, FormatVersionError
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_JOURNAL, KIND_SEGMENT, FileHeader, decode_header
from logstore.storage.record import Event, encode_frame
from logstore.storage.segment import UNPUBLISHED, SegmentWriter, iter_segment, segment_numbers, segment_path
from tests.storage.disks import Fault, FaultyDisk, open_descriptors

HEADER = FileHeader(kind=KIND_SEGMENT, store_id=3, salt=5, number=12, incarnation=7)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Disk().make_folder(tmp_path / "segments")
    return tmp_path


def frames(first: int, count: int) -> list[bytes]:
    return [
        encode_frame(Event(each, 0, 0, "stream", 0, b"payload"), HEADER.seed) for each in range(first, first + count)
    ]


def test_frames_are_read_back_from_the_offsets_that_were_named(root: Path) -> None:
    writer = SegmentWriter(Disk(), root, HEADER)
    runs = [frames(1, 3), frames(4, 1), frames(5, 20)]
    offsets = [writer.append(b"".join(run)) for run in runs]
    writer.sync()
    writer.close()
    data = segment_path(root, 12).read_bytes()
    assert decode_header(data, writer.path, KIND_SEGMENT) == HEADER
    found = dict(iter_segment(data, writer.path))
    assert list(found.values()) == [frame for run in runs for frame in run]
    assert offsets[0] == HEADER_BYTES
    assert [found[offset] for offset in offsets] == [run[0] for run in runs]
    assert len(data) == writer.end


def test_the_digest_is_that_of_the_whole_file(root: Path) -> None:
    writer = SegmentWriter(Disk(), root, HEADER)
    for frame in frames(1, 10):
        writer.append(frame)
        assert writer.sha256 == hashlib.sha256(segment_path(root, 12).read_bytes()).hexdigest()
    writer.close()


@pytest.mark.promise("compaction-changes-nothing")
def test_a_segment_that_is_put_in_place_stays_there(root: Path) -> None:
    disk = FaultyDisk()
    writer = SegmentWriter(disk, root, HEADER, suffix=UNPUBLISHED)
    writer.append(frames(1, 1)[0])
    writer.sync()
    writer.publish()
    writer.close()
    # The index names it from then on, and what it replaces goes.
    assert disk.calls[-2:] == [("rename", writer.path.name), ("sync_folder", "segments")]


def test_reading_ends_at_the_first_bad_frame(root: Path) -> None:
    writer = SegmentWriter(Disk(), root, HEADER)
    writer.append(b"".join(frames(1, 3)))
    bad = writer.append(frames(4, 1)[0])
    writer.append(frames(5, 1)[0])
    writer.close()
    data = bytearray(segment_path(root, 12).read_bytes())
    data[bad + 10] ^= 1
    assert [frame for _, frame in iter_segment(bytes(data), writer.path)] == frames(1, 3)


def test_a_bad_header_is_damage_and_a_newer_one_refused(root: Path) -> None:
    data = bytearray(HEADER.encode())
    data[30] ^= 1
    with pytest.raises(DamageError):
        iter_segment(bytes(data), segment_path(root, 12))
    data = bytearray(HEADER.encode())
    data[8] = 99
    with pytest.raises(FormatVersionError):
        iter_segment(bytes(data), segment_path(root, 12))
    journal = FileHeader(kind=KIND_JOURNAL, store_id=3, salt=5)
    with pytest.raises(DamageError):
        iter_segment(journal.encode(), segment_path(root, 12))


def test_segments_are_listed_by_number_and_nothing_else_is(root: Path) -> None:
    assert segment_numbers(Disk(), root / "nowhere") == []
    others = ("x.segment", "7.segment.tmp", "8", ".segment", "\u00b2.segment", "007.segment", f"{1 << 63}.segment")
    for name in ("9.segment", "100.segment", "20.segment", *others):
        (root / "segments" / name).touch()
    assert segment_numbers(Disk(), root) == [9, 20, 100]


def test_a_segment_never_takes_the_place_of_another(root: Path) -> None:
    SegmentWriter(Disk(), root, HEADER).close()
    with pytest.raises(FileExistsError):
        SegmentWriter(Disk(), root, HEADER)


@pytest.mark.parametrize("kind", ["create", "write"])
def test_a_segment_that_cannot_be_begun_holds_no_descriptor(root: Path, kind: str) -> None:
    disk = FaultyDisk()
    disk.fail(Fault(kind, error=errno.ENOSPC))
    before = open_descriptors()
    with pytest.raises(OSError, match="No space left"):
        SegmentWriter(disk, root, HEADER)
    assert open_descriptors() == before


def test_segments_are_private(root: Path) -> None:
    SegmentWriter(Disk(), root, HEADER).close()
    assert segment_path(root, 12).stat().st_mode & 0o777 == 0o600
