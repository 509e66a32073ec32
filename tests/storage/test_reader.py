"""A reader is given a stream's events in order and without a hole, or told of the hole; never another stream's."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from logstore.errors import GapError
from logstore.storage.catalogue import Catalogue
from logstore.storage.checkpoint import SegmentStore
from logstore.storage.files import Disk
from logstore.storage.foreign import Foreign
from logstore.storage.header import frame_seed
from logstore.storage.ids import IdGenerator
from logstore.storage.options import Retention
from logstore.storage.reader import Reader, contiguous
from logstore.storage.record import Event, encode_frame
from logstore.storage.tail import Unsegmented
from tests.storage.disks import Fault, FaultyDisk

STORE_ID = 8
SEED = frame_seed(STORE_ID)
NOW_US = 1_790_000_000_000_000


def event(event_id: int, prev: int, stream: str = "s") -> Event:
    return Event(event_id, prev, NOW_US, stream, 0, b"")


def ids(events: list[Event]) -> list[int]:
    return [each.id for each in events]


# The chain of predecessors.


def test_a_whole_chain_is_returned_whole() -> None:
    chain = [event(3, 2), event(5, 3), event(9, 5)]
    assert contiguous("s", 2, chain) == chain
    assert contiguous("s", 2, []) == []


@pytest.mark.promise("no-hole-passed-over")
def test_events_before_a_hole_are_returned_and_the_hole_is_told_next_time() -> None:
    chain = [event(3, 2), event(5, 3), event(9, 7), event(10, 9)]
    assert ids(contiguous("s", 2, chain)) == [3, 5]
    with pytest.raises(GapError, match="event 7 is gone") as caught:
        contiguous("s", 5, chain[2:])
    assert (caught.value.stream, caught.value.after) == ("s", "5")


def test_a_reader_from_the_beginning_takes_it_wherever_it_is() -> None:
    assert ids(contiguous("s", 0, [event(9, 7), event(10, 9)])) == [9, 10]
    assert ids(contiguous("s", 0, [event(9, 7), event(12, 11)])) == [9]


def test_a_writer_that_did_not_know_its_predecessor_leaves_no_hole() -> None:
    assert ids(contiguous("s", 2, [event(3, 0), event(5, 3), event(9, 0)])) == [3, 5, 9]


def test_a_predecessor_before_what_the_reader_holds_is_no_hole() -> None:
    # The id that the reader holds need not be of this stream.
    assert ids(contiguous("s", 6, [event(8, 4), event(9, 8)])) == [8, 9]


# What is in segments.


class Shelf:
    """Segments, a catalogue and a reader over them."""

    def __init__(self, root: Path, disk: Disk | None = None, retention: Retention | None = None) -> None:
        disk = disk or Disk()
        for folder in ("lanes", "segments"):
            disk.make_folder(root / folder)
        self.catalogue = Catalogue(root / "events.db")
        disk.close(disk.create(self.catalogue.path))
        self.catalogue.open()
        self.segments = SegmentStore(
            disk,
            root,
            self.catalogue,
            store_id=STORE_ID,
            incarnation=1,
            numbers=IdGenerator(0),
            segment_bytes=1 << 20,
        )
        self._foreign = Foreign(disk, root, 0)
        self._reader = Reader(disk, root, self.catalogue, self._foreign, SEED, retention or Retention())

    def store(self, **streams: list[int]) -> None:
        """Checkpoint events with these ids, the streams of one call together."""
        owners = {number: name for name, numbers in streams.items() for number in numbers}
        frames = [encode_frame(event(each, 0, name), SEED) for each, name in owners.items()]
        self.segments.write(Unsegmented(list(owners), list(owners.values()), frames), [], NOW_US)

    def read(self, stream: str, after: int = 0, limit: int = 1000, own: Sequence[Event] = ()) -> list[tuple[str, int]]:
        frames = [encode_frame(each, SEED) for each in own]
        return [(each.stream, each.id) for each in self._reader.read(stream, after, limit, frames).events]

    def close(self) -> None:
        self.segments.close()
        self._foreign.close()
        self.catalogue.close()


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path)
    yield shelf
    shelf.close()


def test_a_stream_is_read_across_segments_from_any_of_its_events(shelf: Shelf) -> None:
    shelf.store(a=[1, 3, 5], b=[2, 4])
    shelf.store(a=[7, 9], b=[8])
    shelf.store(b=[11], a=[12])
    everything = [1, 3, 5, 7, 9, 12]
    for after in range(14):
        expected = [("a", each) for each in everything if each > after]
        if after == 0 or after in everything:
            assert shelf.read("a", after) == expected
            assert shelf.read("a", after, 2) == expected[:2]
    assert shelf.read("nobody") == []


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_an_id_of_another_stream_shows_nothing_of_it_and_hides_nothing(shelf: Shelf, order: str) -> None:
    streams = {"a": [10, 30, 50], "b": [20, 40, 60]}
    shelf.store(**{name: streams[name] for name in order})
    # One of the two orders shows events of the other stream, one hides events of this one.
    found = {(name, after): shelf.read(name, after) for name in "ab" for after in (10, 20, 30, 40, 50)}
    assert found == {(name, after): [(name, each) for each in streams[name] if each > after] for name, after in found}


@pytest.mark.promise("order")
def test_an_event_that_two_segments_hold_is_read_once(shelf: Shelf) -> None:
    shelf.store(a=[1, 2, 3, 4])
    shelf.store(a=[3, 4, 5])
    assert [each for _, each in shelf.read("a")] == [1, 2, 3, 4, 5]
    assert [each for _, each in shelf.read("a", 3)] == [4, 5]


@pytest.mark.promise("order")
def test_runs_that_overlap_are_merged(shelf: Shelf) -> None:
    shelf.store(a=[1, 4, 7])
    shelf.store(a=[2, 5, 8])
    assert [each for _, each in shelf.read("a")] == [1, 2, 4, 5, 7, 8]


def test_a_page_of_few_events_reads_little_of_a_long_run(tmp_path: Path) -> None:
    class Counting(Disk):
        taken = 0

        def read(self, fd: int, length: int, offset: int) -> bytes:
            data = super().read(fd, length, offset)
            self.taken += len(data)
            return data

    disk = Counting()
    shelf = Shelf(tmp_path, disk)
    shelf.store(a=list(range(1, 5001)))
    for after in (0, 2500):
        before = disk.taken
        assert [each for _, each in shelf.read("a", after, 16)] == list(range(after + 1, after + 17))
        assert disk.taken - before < 32 * len(encode_frame(event(5000, 0, "a"), SEED))
    shelf.close()


def test_events_beyond_the_limit_are_read_once_and_not_for_each_page(tmp_path: Path) -> None:
    disk = FaultyDisk()
    shelf = Shelf(tmp_path, disk, Retention(max_events=4, resume_window_s=0))
    shelf.store(a=list(range(1, 11)))
    reads: list[int] = []
    for after, expected in ((0, [7, 8]), (8, [9, 10])):
        before = len(disk.calls)
        assert [each for _, each in shelf.read("a", after, 2)] == expected
        reads.append(sum(kind == "read" for kind, _ in disk.calls[before:]))
    assert reads == [2, 1]
    # Another event, and another one is too many.
    shelf.store(a=[11])
    assert [each for _, each in shelf.read("a", 0, 2)] == [8, 9]
    shelf.close()


@pytest.mark.parametrize("kind", ["open", "read"])
def test_a_segment_that_the_disk_does_not_give_is_a_hole_and_not_the_end_of_the_rest(tmp_path: Path, kind: str) -> None:
    disk = FaultyDisk()
    shelf = Shelf(tmp_path, disk)
    shelf.store(a=[1, 2, 3])
    shelf.store(a=[4, 5])
    shelf.store(a=[6, 7])
    first, bad, _ = sorted(tmp_path.glob("segments/*"))
    disk.fail(Fault(kind, name=bad.name, from_then_on=True))
    assert [each for _, each in shelf.read("a")] == [1, 2, 3]
    with pytest.raises(GapError, match=bad.name):
        shelf.read("a", 3)
    assert [each for _, each in shelf.read("a", 5)] == [6, 7]
    # What is still in memory is no hole.
    in_memory = [event(4, 3, "a"), event(5, 4, "a")]
    assert [each for _, each in shelf.read("a", own=in_memory)] == [1, 2, 3, 4, 5]
    # The system's own trouble is no damage.
    disk.heal()
    disk.fail(Fault(kind, name=first.name, error=errno.EMFILE))
    with pytest.raises(OSError, match="Too many open files"):
        shelf.read("a")
    assert [each for _, each in shelf.read("a")] == [1, 2, 3, 4, 5, 6, 7]
    shelf.close()
