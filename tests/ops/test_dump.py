"""`dump` shows every record of a file, marks what is damaged, and shows what is behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import google_crc32c
import pytest
from click.testing import CliRunner

from logstore.cli import main
from logstore.errors import DamageError
from logstore.ops.verify.dump import Record, dump
from logstore.storage.files import Disk
from logstore.storage.header import (
    HEADER_BYTES,
    KIND_JOURNAL,
    KIND_REGISTRY,
    KIND_SEGMENT,
    FileHeader,
    frame_seed,
)
from logstore.storage.journal import BATCH_HEADER_BYTES, PAGE_BYTES, JournalWriter
from logstore.storage.record import Event, encode_frame
from logstore.storage.registry import ENDED, OPENED, Entry, encode_registry
from tests.ops.damaged import change

STORE_ID = 77
SEED = frame_seed(STORE_ID)


def frame(event_id: int, size: int = 20) -> bytes:
    return encode_frame(Event(event_id, event_id - 1, 1_790_000_000_000_000, "stream", 2, b"p" * size), SEED)


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    path = tmp_path / "5.segment"
    header = FileHeader(kind=KIND_SEGMENT, store_id=STORE_ID, salt=3, number=5)
    path.write_bytes(header.encode() + b"".join(frame(number) for number in range(1, 6)))
    return path


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "0000000009.journal"
    header = FileHeader(kind=KIND_JOURNAL, store_id=STORE_ID, salt=0x1234567, number=9, follows=8, follows_end=5000)
    writer = JournalWriter(Disk(), path, header)
    writer.write([frame(1), frame(2)])
    writer.sync()
    writer.write([frame(3)])
    writer.seal()
    return path


def shown(path: Path) -> list[tuple[str, bool]]:
    return [(record.what, record.ok) for record in dump(path)]


def covers(path: Path, records: list[Record]) -> bool:
    """Whether the records, batches aside, lie one behind the other over the whole file."""
    end = 0
    for record in records:
        if record.what in ("batch", "seal"):
            end = record.offset + BATCH_HEADER_BYTES
        else:
            if record.offset != end and record.what != "header" and end not in (HEADER_BYTES, 0):
                return False
            end = record.offset + record.size
    return end == path.stat().st_size


def test_a_segment_shows_every_event(segment: Path) -> None:
    header, *events = dump(segment)
    assert header.detail.startswith("segment 5 of store 000000000000004d")
    assert [event.event_id for event in events] == [1, 2, 3, 4, 5]
    assert events[0].offset == HEADER_BYTES
    assert (events[1].prev, events[1].stream, events[1].flags, events[1].size) == (1, "stream", 2, len(frame(2)))
    assert events[0].checksum == int.from_bytes(frame(1)[4:8], "little")
    assert covers(segment, [header, *events])


@pytest.mark.promise("dump-shows-all")
def test_what_is_behind_damage_is_shown(segment: Path) -> None:
    place = HEADER_BYTES + len(frame(1)) + 12
    change(segment, place, b"\xff")
    records = list(dump(segment))
    assert [(each.what, each.ok) for each in records[1:]] == [
        ("event", True),
        ("damage", False),
        ("event", True),
        ("event", True),
        ("event", True),
    ]
    assert (records[2].offset, records[2].size) == (HEADER_BYTES + len(frame(1)), len(frame(2)))
    assert covers(segment, records)


@pytest.mark.promise("dump-shows-all")
def test_a_damaged_header_hides_nothing(segment: Path, journal: Path) -> None:
    for path in (segment, journal):
        whole = shown(path)
        change(path, 0, b"x")
        assert shown(path) == [("header", False), *whole[1:]]


def test_a_journal_shows_batches_events_and_the_zeros_between(journal: Path) -> None:
    records = list(dump(journal))
    assert [each.what for each in records] == [
        "header",
        "batch",
        "event",
        "event",
        "zeros",
        "batch",
        "event",
        "zeros",
        "seal",
        "zeros",
    ]
    assert all(each.ok for each in records)
    assert "follows 8 which ends at 5000" in records[0].detail
    assert "batch 0, 2 events" in records[1].detail
    assert records[1].offset == PAGE_BYTES


@pytest.mark.promise("dump-shows-all")
def test_a_damaged_batch_shows_the_events_that_are_whole(journal: Path) -> None:
    change(journal, PAGE_BYTES + BATCH_HEADER_BYTES + 10, b"\xff")
    assert shown(journal)[1:5] == [("batch", False), ("damage", False), ("event", True), ("zeros", True)]
    # Its header, too: then nothing says that there was a batch.
    change(journal, PAGE_BYTES + 8, b"\xff\xff")
    assert shown(journal)[1:4] == [("damage", False), ("event", True), ("damage", False)]


def test_a_registry_shows_entries_without_what_they_keep(tmp_path: Path) -> None:
    path = tmp_path / "registry.log"
    secret = b"what the opener keeps"
    path.write_bytes(encode_registry(STORE_ID, [Entry(OPENED, "key", 5, 1, secret), Entry(ENDED, "key", 5, 2, b"")]))
    records = list(dump(path))
    assert [(each.what, each.ok) for each in records] == [("header", True), ("entry", True), ("entry", True)]
    assert records[1].detail == "session opened: key, incarnation 5"
    assert not any("keeps" in each.detail for each in records)
    change(path, HEADER_BYTES + 9, b"\xff\xff")
    assert shown(path)[1:] == [("damage", False), ("entry", True)]
    assert path.read_bytes()[10] == KIND_REGISTRY


def test_events_larger_than_the_window_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "6.segment"
    header = FileHeader(kind=KIND_SEGMENT, store_id=STORE_ID, salt=3, number=6)
    path.write_bytes(header.encode() + frame(1, 3 << 20) + frame(2) + frame(3, 3 << 20))
    assert shown(path) == [("header", True), ("event", True), ("event", True), ("event", True)]
    change(path, 2 << 20, b"\xff")
    assert shown(path) == [("header", True), ("damage", False), ("event", True), ("event", True)]


@pytest.mark.promise("damage-no-traceback")
def test_any_bytes_end_in_records_or_a_clear_error(tmp_path: Path) -> None:
    for name in ("1.segment", "0000000001.journal", "registry.log"):
        for size in (0, 1, 50, 5000):
            path = tmp_path / name
            path.write_bytes(os.urandom(size))
            assert all(not record.ok or record.what == "zeros" for record in dump(path))
    other = tmp_path / "picture.png"
    other.write_bytes(os.urandom(100))
    with pytest.raises(DamageError, match="does not begin as a logstore file"):
        list(dump(other))


def test_the_command_prints_a_line_a_record(segment: Path) -> None:
    run = CliRunner()
    result = run.invoke(main, ["dump", str(segment)])
    assert (result.exit_code, len(result.output.splitlines())) == (0, 1 + 6)
    result = run.invoke(main, ["dump", str(segment), "--json"])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines[1]["event_id"] == "1"
    assert set(lines[1]) == {
        "what", "offset", "size", "ok", "checksum", "event_id", "prev", "stream", "flags", "time"
    }  # fmt: skip
    change(segment, 100, b"\xff")
    result = run.invoke(main, ["dump", str(segment)])
    assert result.exit_code == 1
    assert "BAD" in result.output
    assert run.invoke(main, ["dump"]).exit_code == 2


def test_what_is_no_event_is_damage_though_its_checksum_matches(segment: Path) -> None:
    body = b"\x96\x01\x02\x03"
    with segment.open("ab") as file:
        file.write(len(body).to_bytes(4, "little") + google_crc32c.extend(SEED, body).to_bytes(4, "little") + body)
        file.write(frame(9))
    assert shown(segment)[-2:] == [("damage", False), ("event", True)]


class CountingDisk(Disk):
    """The real disk; counts what is read."""

    def __init__(self) -> None:
        self.bytes_read = 0

    def read(self, fd: int, length: int, offset: int) -> bytes:
        data = super().read(fd, length, offset)
        self.bytes_read += len(data)
        return data


def test_what_claims_to_reach_far_is_not_read_again_and_again(segment: Path) -> None:
    claim = (2 << 20).to_bytes(4, "little") + b"1234" + b"\x96"
    with segment.open("ab") as file:
        file.write(claim * 500 + bytes(2 << 20))
    disk = CountingDisk()
    assert [each.what for each in dump(segment, disk)][-1] == "damage"
    assert disk.bytes_read < 10 * segment.stat().st_size
