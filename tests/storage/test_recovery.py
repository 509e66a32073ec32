"""What a dead process acknowledged comes to segments; what was damaged is told, and what was only torn is not."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from logstore.storage.catalogue import Catalogue
from logstore.storage.checkpoint import SegmentStore
from logstore.storage.files import Disk
from logstore.storage.foreign import Foreign
from logstore.storage.header import frame_seed
from logstore.storage.ids import IdGenerator
from logstore.storage.journal import PAGE_BYTES
from logstore.storage.lane import Lane, journal_ordinals, journal_path
from logstore.storage.options import Retention
from logstore.storage.reader import Reader
from logstore.storage.record import Event, encode_frame
from logstore.storage.recovery import adopt_lane
from tests.storage.disks import Fault, FaultyDisk

STORE_ID = 21
SEED = frame_seed(STORE_ID)
NOW_US = 1_790_000_000_000_000


class DeadLane:
    """A lane whose process writes, dies, and is recovered from."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.disk = FaultyDisk()
        for folder in ("lanes", "segments"):
            self.disk.make_folder(root / folder)
        self.lane = Lane.acquire(self.disk, root, STORE_ID)
        self.lane.begin(0, NOW_US)
        self.lane.marks.begin(self.lane.incarnation)
        self.disk.close(self.disk.create(root / "events.db"))
        self.catalogue = Catalogue(root / "events.db")
        self.catalogue.open()

    def write(self, count: int = 1) -> list[int]:
        """Write one batch and return its ids."""
        ids = [self.lane.ids.next(NOW_US) for _ in range(count)]
        self.lane.write([encode_frame(Event(each, 0, NOW_US, "s", 0, b"payload"), SEED) for each in ids], ids[-1])
        return ids

    def write_interleaved(self, streams: int, count: int) -> None:
        """Write one batch with so many events of each stream, one of each after the other."""
        ids = [self.lane.ids.next(NOW_US) for _ in range(streams * count)]
        events = [Event(each, 0, NOW_US, f"s{place % streams}", 0, b"payload") for place, each in enumerate(ids)]
        self.lane.write([encode_frame(each, SEED) for each in events], ids[-1])

    def journal(self) -> Path:
        """The file being written."""
        assert self.lane.journal is not None
        return self.lane.journal.path

    def adopt(self) -> int:
        segments = SegmentStore(
            self.disk,
            self.root,
            self.catalogue,
            store_id=STORE_ID,
            incarnation=1,
            numbers=IdGenerator(1),
            segment_bytes=1 << 20,
        )
        try:
            return adopt_lane(
                self.disk, self.root, self.lane.number, self.lane.folder, self.catalogue, segments, STORE_ID
            )
        finally:
            segments.close()

    def events(self) -> list[int]:
        foreign = Foreign(Disk(), self.root, self.lane.number)
        try:
            reader = Reader(Disk(), self.root, self.catalogue, foreign, SEED, Retention())
            return [event.id for event in reader.read("s", 0, 10_000, []).events]
        finally:
            foreign.close()

    def damage(self) -> list[tuple[str, int, str]]:
        with closing(sqlite3.connect(self.root / "events.db")) as connection:
            return connection.execute("select file, offset, kept_in from damage").fetchall()

    def kept_aside(self) -> list[str]:
        return sorted(self.disk.list(self.root / "damaged"))


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[DeadLane]:
    dead = DeadLane(tmp_path)
    yield dead
    dead.lane.end()
    dead.catalogue.close()


def change(path: Path, offset: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(data)] = data
    path.write_bytes(whole)


@pytest.mark.promise("dead-adopted")
def test_everything_acknowledged_comes_to_segments_and_the_journals_go(dead: DeadLane) -> None:
    written: list[int] = []
    for _ in range(3):
        for count in (1, 5, 2):
            written += dead.write(count)
            dead.lane.sync()
        dead.lane.rotate()
    written += dead.write(4)
    assert dead.adopt() == written[-1]
    assert dead.events() == written
    assert journal_ordinals(dead.disk, dead.lane.folder) == []
    assert (dead.damage(), dead.kept_aside()) == ([], [])
    assert dead.adopt() == 0
    assert dead.events() == written


def test_rows_of_streams_that_took_turns_fill_the_pages_of_the_index(dead: DeadLane) -> None:
    dead.write_interleaved(streams=50, count=100)
    dead.adopt()
    with closing(sqlite3.connect(dead.root / "events.db")) as connection:
        (as_written,) = connection.execute("pragma page_count").fetchone()
        connection.execute("vacuum")
        (packed,) = connection.execute("pragma page_count").fetchone()
    # Inserted in another order than that of the key, they leave half of most pages empty.
    assert as_written < packed * 1.05


@pytest.mark.promise("crash-opens")
def test_a_recovery_that_is_cut_short_is_begun_again(dead: DeadLane) -> None:
    written: list[int] = []
    for _ in range(4):
        written += dead.write(3)
        dead.lane.rotate()
    dead.disk.fail(Fault("unlink", at=2, from_then_on=True))
    dead.adopt()
    assert journal_ordinals(dead.disk, dead.lane.folder) != []
    dead.disk.heal()
    dead.adopt()
    assert dead.events() == written
    assert journal_ordinals(dead.disk, dead.lane.folder) == []


@pytest.mark.promise("torn-is-no-damage")
def test_a_torn_write_is_kept_aside_and_is_no_damage(dead: DeadLane) -> None:
    written = dead.write(3)
    dead.lane.sync()
    path = dead.journal()
    dead.write(3)
    change(path, path_end(dead) - 10, bytes(10))
    dead.adopt()
    assert dead.events() == written
    assert dead.damage() == []
    assert dead.kept_aside() == [f"lane-0000-{path.name}.torn"]


def path_end(dead: DeadLane) -> int:
    assert dead.lane.journal is not None
    return dead.lane.journal.end


@pytest.mark.promise("damage-is-told")
def test_damage_is_told_with_file_and_offset_and_the_file_is_kept(dead: DeadLane) -> None:
    written = dead.write(3)
    dead.lane.sync()
    bad = path_end(dead)
    written += dead.write(1)
    dead.lane.sync()
    path = dead.journal()
    change(path, path_end(dead) - 3, b"\xff")
    original = path.read_bytes()
    dead.adopt()
    assert dead.events() == written[:3]
    name = f"lane-0000-{path.name}"
    assert dead.damage() == [(f"lanes/0000/{path.name}", bad, f"damaged/{name}")]
    assert (dead.root / "damaged" / name).read_bytes() == original


@pytest.mark.promise("failed-file-given-up")
def test_what_a_file_holds_beyond_the_end_that_the_next_one_names_is_not_served(dead: DeadLane) -> None:
    written = dead.write(2)
    dead.lane.sync()
    dead.write(2)
    dead.lane.abandon()
    written += dead.write(2)
    dead.lane.sync()
    dead.adopt()
    assert dead.events() == written
    assert dead.damage() == []


def test_that_holds_also_when_the_header_is_damaged(dead: DeadLane) -> None:
    written = dead.write(2)
    dead.lane.sync()
    path = dead.journal()
    dead.write(2)
    dead.lane.abandon()
    written += dead.write(2)
    dead.lane.sync()
    change(path, 20, b"\xff\xff")
    dead.adopt()
    assert len(dead.damage()) == 1
    assert dead.events() == written


@pytest.mark.promise("damage-is-told")
def test_a_file_whose_header_is_damaged_is_told_and_its_events_are_served(dead: DeadLane) -> None:
    written = dead.write(3)
    dead.lane.sync()
    change(dead.journal(), 20, b"\xff\xff")
    dead.adopt()
    assert dead.events() == written
    assert len(dead.damage()) == 1


def test_a_first_commit_that_lost_its_header_is_torn_and_no_damage(dead: DeadLane) -> None:
    # Header and first batch go to the disk with the same sync: a crash before it may keep either.
    dead.write(3)
    change(dead.journal(), 0, bytes(PAGE_BYTES))
    dead.adopt()
    assert dead.damage() == []


def test_a_file_that_was_given_up_before_its_first_sync_may_have_lost_its_header(dead: DeadLane) -> None:
    dead.write(3)
    path = dead.journal()
    dead.disk.fail(Fault("sync", name=path.name))
    with pytest.raises(OSError, match="Input/output error"):
        dead.lane.sync()
    dead.lane.abandon()
    written = dead.write(3)
    dead.lane.sync()
    path.write_bytes(bytes(path.stat().st_size))
    dead.adopt()
    assert dead.events() == written
    assert dead.damage() == []


class UntrustedCacheDisk(FaultyDisk):
    """Notes also when the page cache is dropped."""

    def forget_cache(self, fd: int) -> None:
        self.calls.append(("forget_cache", self._paths[fd].name))
        super().forget_cache(fd)


@pytest.mark.promise("cache-distrusted")
def test_a_journal_is_read_from_the_device_and_not_from_the_cache(dead: DeadLane) -> None:
    # After a failed sync the cache shows what the disk does not have.
    written = dead.write(3)
    dead.lane.sync()
    name = dead.journal().name
    dead.disk = disk = UntrustedCacheDisk()
    dead.adopt()
    calls = [kind for kind, of in disk.calls if of == name]
    at = calls.index("forget_cache")
    assert calls[at - 1 : at + 2] == ["sync", "forget_cache", "read"]
    assert dead.events() == written


def test_an_empty_file_that_was_only_being_made_is_removed(dead: DeadLane) -> None:
    written = dead.write(3)
    dead.lane.rotate()
    journal_path(dead.lane.folder, 7).touch()
    dead.adopt()
    assert dead.events() == written
    assert (dead.damage(), journal_ordinals(dead.disk, dead.lane.folder)) == ([], [])


@pytest.mark.promise("nothing-wrong-is-served")
def test_a_journal_of_another_store_is_told_and_not_served(dead: DeadLane) -> None:
    other = dead.root / "other"
    stranger = Lane.acquire(dead.disk, other, STORE_ID + 1)
    stranger.begin(0, NOW_US)
    stranger.write([encode_frame(Event(1, 0, NOW_US, "s", 0, b""), frame_seed(STORE_ID + 1))], 1)
    stranger.sync()
    assert stranger.journal is not None
    journal_path(dead.lane.folder, 3).write_bytes(stranger.journal.path.read_bytes())
    stranger.end()
    dead.adopt()
    assert dead.events() == []
    # Without a witness for content it is as a file that was only being made; the bytes are kept.
    assert dead.kept_aside() == ["lane-0000-0000000003.journal.torn"]
