"""Journals of other lanes are read while their processes write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from logstore.storage.files import Disk
from logstore.storage.foreign import Foreign
from logstore.storage.header import KIND_JOURNAL, FileHeader, frame_seed
from logstore.storage.journal import JournalWriter
from logstore.storage.lane import Marks, journal_path
from logstore.storage.record import Event, encode_frame

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
