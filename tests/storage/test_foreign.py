"""Journals of other lanes are read while their processes write them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from logstore.errors import DamageError
from logstore.storage.files import Disk
from logstore.storage.foreign import Foreign
from logstore.storage.header import KIND_JOURNAL, FileHeader, frame_seed
from logstore.storage.journal import JournalWriter
from logstore.storage.lane import Marks, journal_path
from logstore.storage.record import Event, encode_frame
from tests.storage.disks import Fault, FaultyDisk, open_descriptors

STORE_ID = 8
FRAME = encode_frame(Event(7, 0, 1_790_000_000_000_000, "s", 0, b"payload"), frame_seed(STORE_ID))


class DiskBesideOthers(Disk):
    """The real disk; another process does something after the first read."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self._meanwhile: list[Callable[[], object]] = [meanwhile]

    def read(self, fd: int, length: int, offset: int) -> bytes:
        data = super().read(fd, length, offset)
        while self._meanwhile:
            self._meanwhile.pop()()
        return data


def test_a_journal_whose_header_is_being_written_is_read_once_it_is_whole(tmp_path: Path) -> None:
    made = tmp_path / "made"
    writer = JournalWriter(Disk(), made, FileHeader(kind=KIND_JOURNAL, store_id=STORE_ID, salt=1, number=1))
    writer.write([FRAME])
    writer.close()
    folder = tmp_path / "lanes" / "0001"
    folder.mkdir(parents=True)
    marks = Marks(Disk(), folder)
    marks.begin(1)
    journal_path(folder, 1).touch()
    foreign = Foreign(DiskBesideOthers(lambda: journal_path(folder, 1).write_bytes(made.read_bytes())), tmp_path, 0)
    foreign.read_on()
    assert foreign.frames("s", 0, 10) == []
    marks.show(1, writer.end)
    foreign.read_on()
    assert foreign.frames("s", 0, 10) == [FRAME]
    foreign.close()
    marks.close()


@pytest.mark.promise("unreadable-is-told")
@pytest.mark.parametrize("what", ["header", "batches", "frames"])
def test_a_journal_that_the_disk_does_not_give_is_told_as_damaged(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "lanes" / "0001"
    folder.mkdir(parents=True)
    path = journal_path(folder, 1)
    writer = JournalWriter(Disk(), path, FileHeader(kind=KIND_JOURNAL, store_id=STORE_ID, salt=1, number=1))
    writer.write([FRAME])
    writer.close()
    disk = FaultyDisk()

    def read() -> list[bytes]:
        foreign.read_on()
        return foreign.frames("s", 0, 10)

    with contextlib.closing(Marks(Disk(), folder)) as marks, contextlib.closing(Foreign(disk, tmp_path, 0)) as foreign:
        marks.begin(1)
        marks.show(1, writer.end)
        if what == "frames":
            foreign.read_on()
        disk.fail(Fault("read", at=2 if what == "batches" else 1, name=path.name))
        with pytest.raises(DamageError, match="the disk does not give them") as told:
            read()
        assert told.value.path == path
        # It may give them the next time.
        assert read() == [FRAME]


def test_a_journal_that_is_gone_and_cannot_be_read_any_more_is_let_go_of(tmp_path: Path) -> None:
    folder = tmp_path / "lanes" / "0001"
    folder.mkdir(parents=True)
    path = journal_path(folder, 1)
    writer = JournalWriter(Disk(), path, FileHeader(kind=KIND_JOURNAL, store_id=STORE_ID, salt=1, number=1))
    disk = FaultyDisk()
    with contextlib.closing(Marks(Disk(), folder)) as marks, contextlib.closing(Foreign(disk, tmp_path, 0)) as foreign:
        marks.begin(1)
        marks.show(1, writer.end)
        foreign.read_on()
        before = open_descriptors()
        writer.write([FRAME])
        path.unlink()
        disk.fail(Fault("read", name=path.name))
        with pytest.raises(DamageError):
            foreign.read_on()
        assert open_descriptors() == before - 1
        foreign.read_on()
        writer.close()


def test_what_had_grown_before_a_look_failed_is_not_forgotten(tmp_path: Path) -> None:
    disk = FaultyDisk()
    with contextlib.ExitStack() as stack:
        for name in ("0001", "0002"):
            folder = tmp_path / "lanes" / name
            folder.mkdir(parents=True)
            header = FileHeader(kind=KIND_JOURNAL, store_id=STORE_ID, salt=1, number=1)
            writer = JournalWriter(Disk(), journal_path(folder, 1), header)
            stack.callback(writer.close)
            event = Event(7, 0, 1_790_000_000_000_000, name, 0, b"payload")
            writer.write([encode_frame(event, frame_seed(STORE_ID))])
            marks = stack.enter_context(contextlib.closing(Marks(Disk(), folder)))
            marks.begin(1)
            marks.show(1, writer.end)
        foreign = stack.enter_context(contextlib.closing(Foreign(disk, tmp_path, 0)))
        # Of the second lane the header is read, and then the batch is not.
        disk.fail(Fault("read", at=2, name="0002/"))
        with pytest.raises(DamageError):
            foreign.read_on()
        grown, missed = foreign.news()
        assert missed or grown == {"0001", "0002"}
