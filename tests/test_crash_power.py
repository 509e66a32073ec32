"""A disk whose power can be cut, the campaign that cuts it, and that both see what they are to see."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crash_device import SECTOR_BYTES, FileState
from crash_disk import Omitted, PowerDisk
from crash_kill import BrokenPromiseError
from crash_power import PowerCampaign
from crash_power_ledger import Ledger, Owner
from logstore.storage import Durability, Log, LogOptions
from tests.engine import payloads

MOST_RUNS = 60
MEMORY = Path("/dev/shm")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where SQLite's syncs cost nothing, if there is such a place: the rest is not synced for real."""
    with tempfile.TemporaryDirectory(prefix="logstore-power-", dir=MEMORY if MEMORY.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def home(folder: Path) -> Path:
    home = folder / "disk"
    home.mkdir()
    return home


@pytest.fixture
def disk(home: Path) -> PowerDisk:
    return PowerDisk(home, home / "events.db")


def left_by(disk: PowerDisk, tries: int = 100) -> Iterator[Path]:
    """Yield folders as power cuts leave them."""
    cut = disk.cut()
    for seed in range(tries):
        place = disk.home.with_name("left")
        cut.leave(random.Random(seed), place)
        yield place
        shutil.rmtree(place)


def names_left(disk: PowerDisk) -> set[frozenset[str]]:
    """Return which files power cuts leave."""
    return {
        frozenset(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
        for place in left_by(disk)
    }


def contents_left(disk: PowerDisk, name: str) -> set[bytes | None]:
    """Return what power cuts leave of a file."""
    return {(place / name).read_bytes() if (place / name).exists() else None for place in left_by(disk)}


def write(disk: PowerDisk, name: str, data: bytes = b"", *, sync: bool = False) -> None:
    fd = disk.create(disk.home / name)
    disk.write(fd, data, 0)
    if sync:
        disk.sync(fd)
    disk.close(fd)


# The disk.


def test_a_file_is_on_disk_when_it_and_its_folder_are_synced(disk: PowerDisk) -> None:
    write(disk, "a", b"data", sync=True)
    assert contents_left(disk, "a") == {None, b"data"}
    disk.sync_folder(disk.home)
    assert contents_left(disk, "a") == {b"data"}


def test_a_name_without_a_sync_of_its_file_may_be_there_without_its_bytes(disk: PowerDisk) -> None:
    write(disk, "a", b"data")
    disk.sync_folder(disk.home)
    left = contents_left(disk, "a")
    assert {b"", b"data", bytes(4)} <= left
    assert None not in left


def test_changes_of_a_folder_are_lost_from_the_end(disk: PowerDisk) -> None:
    for name in "abc":
        write(disk, name)
    disk.unlink(disk.home / "a")
    assert names_left(disk) == {frozenset(names) for names in ("", "a", "ab", "abc", "bc")}


def test_changes_of_two_folders_are_lost_apart_and_a_rename_between_them_is_one(disk: PowerDisk) -> None:
    for name in ("one", "two"):
        disk.make_folder(disk.home / name)
        write(disk, f"{name}/file")
    assert names_left(disk) == {
        frozenset(names) for names in ((), ("one/file",), ("two/file",), ("one/file", "two/file"))
    }
    for name in ("one", "two"):
        disk.sync_folder(disk.home / name)
    disk.rename(disk.home / "one" / "file", disk.home / "two" / "other")
    moved, unmoved = frozenset({"two/file", "two/other"}), frozenset({"one/file", "two/file"})
    assert names_left(disk) == {moved, unmoved}
    disk.sync_folder(disk.home / "two")
    assert names_left(disk) == {moved}


def test_a_folder_that_was_made_again_has_nothing_of_the_one_before(disk: PowerDisk) -> None:
    folder = disk.home / "folder"
    disk.make_folder(folder)
    write(disk, "folder/old")
    disk.sync_folder(folder)
    disk.unlink(folder / "old")
    folder.rmdir()
    disk.make_folder(folder)
    write(disk, "folder/new")
    assert names_left(disk) == {frozenset(), frozenset({"folder/new"})}


@pytest.mark.parametrize("torn", [False, True])
def test_what_was_synced_in_a_sector_outlives_the_write_of_another_part_unless_it_is_torn(torn: bool) -> None:
    state = FileState()
    state.write(b"synced", 0)
    state.sync()
    state.write(b"more", 100)
    left = {state.after_cut(random.Random(seed), torn=torn)[:6] for seed in range(60)}
    assert b"synced" in left
    assert (len(left) > 1) == torn


def test_each_sector_has_its_own_fate() -> None:
    state = FileState(bytes(3 * SECTOR_BYTES))
    state.write(b"a" * 3 * SECTOR_BYTES, 0)
    state.write(b"b" * SECTOR_BYTES, SECTOR_BYTES)
    left = {state.after_cut(random.Random(seed), torn=False) for seed in range(200)}
    first, second, third = (
        {image[start : start + SECTOR_BYTES][:1] for image in left}
        for start in range(0, 3 * SECTOR_BYTES, SECTOR_BYTES)
    )
    assert {b"\0", b"a"} < first
    assert {b"\0", b"a", b"b"} < second
    assert {b"\0", b"a"} < third
    assert {len(image) for image in left} == {3 * SECTOR_BYTES}


def test_a_sync_that_is_omitted_brings_nothing_to_the_disk(home: Path) -> None:
    disk = PowerDisk(home, home / "events.db", [Omitted("sync", "*.journal"), Omitted("sync_folder", "disk")])
    write(disk, "1.journal", b"data", sync=True)
    write(disk, "1.segment", b"data", sync=True)
    disk.sync_folder(home)
    assert {None, b"", b"data"} <= contents_left(disk, "1.journal")
    assert contents_left(disk, "1.segment") == {None, b"data"}


# The engine on it.


@pytest.mark.parametrize("durability", ["interval", "os"])
async def test_a_lane_is_on_disk_before_its_sessions_move(disk: PowerDisk, durability: Durability) -> None:
    path = disk.home / "events.db"
    late = LogOptions(durability=durability, sync_interval_s=60, checkpoint_interval_s=60)
    async with Log(path, late, disk) as owner, Log(path, LogOptions(), disk) as heir:
        await owner.sessions.open("key", b"", "session/")
        for number in range(3):
            await owner.append("session/a", b"%d" % number)
        await owner.sessions.release("key")
        assert await heir.sessions.take_over("key") is not None
        await heir.append("session/a", b"3")
        cut = disk.cut()
    for seed in range(6):
        left = cut.leave(random.Random(seed), disk.home.with_name(f"left-{seed}"))
        async with Log(left) as log:
            assert await payloads(log, "session/a") == [b"0", b"1", b"2", b"3"]


# The campaign.


def run_some(campaign: PowerCampaign, count: int) -> None:
    for number in range(count):
        campaign.run(number)


def test_power_cuts_lose_nothing(folder: Path) -> None:
    campaign = PowerCampaign(folder, seed=11)
    run_some(campaign, 3)
    assert campaign.figures["power cuts"] >= 8


@pytest.mark.parametrize(
    "omitted",
    [
        Omitted("sync", "*.journal"),
        Omitted("sync", "*.segment"),
        Omitted("sync_folder", "segments"),
        Omitted("sync_folder", "lanes/*"),
    ],
    ids=str,
)
def test_it_sees_a_sync_that_is_left_out(folder: Path, omitted: Omitted) -> None:
    campaign = PowerCampaign(folder, seed=11, omit=[omitted])
    with pytest.raises(BrokenPromiseError):
        run_some(campaign, MOST_RUNS)


# What it compares with.


@pytest.fixture
def ledger() -> Ledger:
    """One that was told of three events, a call of two, and a session."""
    ledger = Ledger()
    opening = ledger.opened(always=False)
    ledger.sent(opening, [("s", b"1")])
    ledger.acknowledged(b"1", 101)
    ledger.synced(opening)
    ledger.sent(opening, [("s", b"2")])
    ledger.acknowledged(b"2", 102)
    ledger.sent(opening, [("s", b"3"), ("t", b"4")])
    ledger.acknowledged(b"3", 103)
    ledger.acknowledged(b"4", 104)
    ledger.session("key", Owner(100, released=False))
    ledger.session_done("key")
    return ledger


KEY = {"key": Owner(100, released=False)}
S = [(101, b"1"), (102, b"2"), (103, b"3")]
T = [(104, b"4")]


@pytest.mark.parametrize("s", [S[:1], S[:2]])
def test_the_ledger_is_content_with_a_prefix_of_what_was_not_synced(ledger: Ledger, s: list[tuple[int, bytes]]) -> None:
    ledger.check({"s": s}, KEY)
    ledger.settle({"s": s}, KEY)
    ledger.check({"s": s}, KEY)
    with pytest.raises(BrokenPromiseError, match="are back"):
        ledger.check({"s": S, "t": T}, KEY)


@pytest.mark.parametrize(
    ("s", "t", "sessions", "why"),
    [
        ([], [], KEY, "that were on disk are gone"),
        ([S[0], S[2]], T, KEY, "is gone, of"),
        (S, [], KEY, "1 of the 2 events of one call"),
        ([S[0], S[0]], [], KEY, "comes twice"),
        ([(101, b"2")], [], KEY, "id or the payload of another"),
        ([(101, b"?")], [], KEY, "never stored"),
        (S[:1], [(102, b"2")], KEY, "never stored there"),
        (S[:1], [], {}, "session key is None"),
        (S[:1], [], {**KEY, "other": KEY["key"]}, "never opened"),
    ],
)
def test_the_ledger_sees_what_is_wrong(
    ledger: Ledger, s: list[tuple[int, bytes]], t: list[tuple[int, bytes]], sessions: dict[str, Owner], why: str
) -> None:
    with pytest.raises(BrokenPromiseError, match=why):
        ledger.check({"s": s, "t": t}, sessions)


def test_the_ledger_lets_retention_drop_the_oldest_but_not_what_it_keeps(ledger: Ledger) -> None:
    ledger.synced(0)
    ledger.keep(2)
    ledger.check({"s": S[1:], "t": T}, KEY)
    for wrong in (S[2:], [S[0], S[2]]):
        with pytest.raises(BrokenPromiseError, match="on disk are gone"):
            ledger.check({"s": wrong, "t": T}, KEY)


def test_the_ledger_sees_an_id_that_is_given_out_again(ledger: Ledger) -> None:
    again: list[Callable[[int], None]] = []
    for always in (True, False):
        opening = ledger.opened(always=always)
        payload = b"%d" % (10 + opening)
        ledger.sent(opening, [("s", payload)])
        again.append(lambda event_id, payload=payload: ledger.acknowledged(payload, event_id))  # type: ignore[misc]
    for given in again:
        with pytest.raises(BrokenPromiseError, match="given out again"):
            given(104)
