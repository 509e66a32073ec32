"""What an acknowledgement is worth: where the event is by then, who sees it, and what a power cut leaves of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from logstore.ops.access import StoreView
from logstore.storage import Log, LogOptions
from logstore.storage.files import Disk
from tests.engine import deadline, eventually, payloads, read_all, small
from tests.storage.disks import FaultyDisk, HeldDisk

MODES = ("always", "interval", "os")
NEVER_S = 1e9


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "events.db"


class UncachedDisk(Disk):
    """The real disk, which remembers what of it a power cut would leave at worst: nothing that was not synced.

    SQLite's files do not pass the door, and are lost with every cut.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._content: dict[int, bytes] = {}
        self._entries: dict[Path, dict[str, int]] = {}

    def create(self, path: Path) -> int:
        fd = super().create(path)
        with self._mutex:
            # A file system gives the numbers of removed files out again.
            self._content.pop(self.inode(fd), None)
        return fd

    def sync(self, fd: int) -> None:
        with self._mutex:
            data = self.read(fd, self.size(fd), 0)
            super().sync(fd)
            self._content[self.inode(fd)] = data

    def sync_folder(self, folder: Path) -> None:
        with self._mutex:
            entries = {entry.name: entry.inode() for entry in os.scandir(folder)}
            super().sync_folder(folder)
            self._entries[folder] = entries

    def has(self, payload: bytes) -> bool:
        """Whether a power cut would leave some bytes."""
        with self._mutex:
            return any(payload in data for data in self._content.values())

    def cut_power(self, folder: Path, target: Path) -> None:
        """Put what a folder would be after a power cut now in another place."""
        with self._mutex:
            content, entries = dict(self._content), {each: dict(names) for each, names in self._entries.items()}
        _put(folder, target, content, entries)


def _put(folder: Path, target: Path, content: dict[int, bytes], entries: dict[Path, dict[str, int]]) -> None:
    target.mkdir(parents=True)
    for name, inode in entries.get(folder, {}).items():
        if folder / name in entries:
            _put(folder / name, target / name, content, entries)
        else:
            (target / name).write_bytes(content.get(inode, b""))


async def write(log: Log, stream: str, acknowledged: list[tuple[int, bytes]]) -> None:
    for number in itertools.count():
        payload = f"{stream} {number} ".encode().ljust(700, b".")
        acknowledged.append((int(await log.append(stream, payload)), payload))
        await asyncio.sleep(0)


async def left_in(path: Path) -> list[tuple[int, bytes]]:
    """Return all events of a store in the order in which they were appended; it can be written on."""
    async with Log(path) as log:
        assert log.health().status == "ok"
        streams = [summary.stream for summary in log.stream_summaries()]
        found = [(event.id, event.payload) for stream in streams for event in await read_all(log, stream)]
        # No id that anybody was ever told.
        found.append((int(await log.append("after", b"")), b""))
        assert await payloads(log, "after") == [b""]
    return sorted(found)


@pytest.mark.promise("always-on-disk", "power-cut-no-hole", "ids-never-twice")
@pytest.mark.parametrize("durability", MODES)
async def test_a_power_cut_at_any_moment_leaves_what_was_acknowledged_without_a_hole(
    path: Path, tmp_path: Path, durability: Any
) -> None:
    disk = UncachedDisk()
    acknowledged: list[tuple[int, bytes]] = []
    images: list[tuple[Path, list[tuple[int, bytes]]]] = []
    async with deadline(), Log(path, small(durability=durability, sync_interval_s=0.005), disk) as log:
        writers = [asyncio.create_task(write(log, f"s{number}", acknowledged)) for number in range(3)]
        for number in range(4):
            await eventually(lambda: len(acknowledged) > 40 * number * number)  # noqa: B023
            known = list(acknowledged)
            images.append((tmp_path / f"cut {number}", known))
            disk.cut_power(path.parent, images[-1][0])
        for writer in writers:
            writer.cancel()
        await asyncio.wait(writers)
    everything = sorted(acknowledged)
    for image, known in images:
        *found, after = await left_in(image / "events.db")
        # A prefix of the whole lane, all streams together; the last ones may have been on their way.
        ids = [event_id for event_id, _ in found]
        assert found[: len(everything)] == everything[: len(found)]
        assert len(found) <= len(known) + 3
        assert after[0] > max(ids, default=0)
        if durability == "always":
            assert {event_id for event_id, _ in known} <= set(ids)
        else:
            assert after[0] > max((event_id for event_id, _ in known), default=0)


@pytest.mark.promise("interval-on-disk")
@pytest.mark.parametrize("interval_s", [0.1, NEVER_S])
async def test_with_interval_the_disk_has_an_event_once_the_interval_is_over(path: Path, interval_s: float) -> None:
    disk = UncachedDisk()
    options = small(durability="interval", sync_interval_s=interval_s, checkpoint_interval_s=NEVER_S)
    async with deadline(), Log(path, options, disk) as log:
        await log.append("s", b"the first one of a turn may be synced at once")
        await log.append("s", b"the second")
        if interval_s == NEVER_S:
            assert not disk.has(b"the second")
        else:
            # Nothing else happens.
            await eventually(lambda: disk.has(b"the second"))


@pytest.mark.promise("power-cut-no-hole", "session-moves-synced")
@pytest.mark.parametrize("durability", ["interval", "os"])
async def test_a_session_takes_what_is_in_its_streams_to_the_disk_when_it_moves(
    path: Path, tmp_path: Path, durability: Any
) -> None:
    """Else a power cut could take it, and leave what its next owner wrote behind it."""
    disk = UncachedDisk()
    options = small(durability=durability, sync_interval_s=NEVER_S, checkpoint_interval_s=NEVER_S)
    async with deadline(), Log(path, options, disk) as one, Log(path, options, disk) as other:
        session = await one.sessions.open("session", b"")
        await one.append("s", b"first")
        await one.sessions.release("session")
        taken = await other.sessions.take_over("session")
        assert taken is not None
        assert taken.incarnation != session.incarnation
        await other.append("s", b"second")
        disk.cut_power(path.parent, tmp_path / "cut")
    async with Log(tmp_path / "cut" / "events.db") as log:
        assert await payloads(log, "s") == [b"first"]


SMALL, LARGE = b"", bytes(300 << 10)
"""What a batch of one event is, that the loop writes itself, or that the journal's thread does."""


def seen_from_outside(path: Path) -> list[bytes]:
    with StoreView(path) as view:
        return [event.payload for event in view.events("s")]


@pytest.mark.promise("visible-when-acknowledged", "slow-is-not-failed")
@pytest.mark.parametrize("padding", [SMALL, LARGE], ids=["small", "large"])
async def test_nobody_sees_an_event_before_it_is_acknowledged_and_a_slow_disk_is_no_failure(
    path: Path, padding: bytes
) -> None:
    disk = HeldDisk()
    async with deadline(), Log(path, small(checkpoint_interval_s=NEVER_S), disk) as log, Log(path, small()) as other:
        await log.append("s", b"first")
        disk.hold()
        syncs = disk.syncs
        appending = asyncio.create_task(log.append("s", b"second" + padding))
        await eventually(lambda: disk.syncs > syncs, "its sync")
        # It is in the file by now.
        for seen in (
            await payloads(log, "s"),
            await payloads(other, "s"),
            await asyncio.to_thread(seen_from_outside, path),
        ):
            assert seen == [b"first"]
        assert log.health() == ("ok", None, None, 0)
        assert not appending.done()
        disk.let_go()
        event_id = await appending
        assert await log.stream_of(event_id) == await other.stream_of(event_id) == "s"
        for seen in (
            await payloads(log, "s"),
            await payloads(other, "s"),
            await asyncio.to_thread(seen_from_outside, path),
        ):
            assert seen == [b"first", b"second" + padding]


@pytest.mark.promise("cost-of-an-event")
@pytest.mark.parametrize("durability", MODES)
async def test_an_event_of_one_writer_costs_one_write_and_with_always_one_sync(path: Path, durability: Any) -> None:
    disk = FaultyDisk()
    options = LogOptions(durability=durability, sync_interval_s=NEVER_S, checkpoint_interval_s=NEVER_S)
    async with deadline(), Log(path, options, disk) as log:
        # Makes the file, and the zeros that the others are written into.
        await log.append("s", b"first")
        disk.calls.clear()
        for number in range(50):
            await log.append("s", b"%d" % number)
        calls = Counter(kind for kind, name in disk.calls if name.endswith(".journal"))
    assert calls == ({"write": 50, "sync": 50} if durability == "always" else {"write": 50})


@pytest.mark.promise("one-sync-for-all")
async def test_one_sync_covers_all_that_came_while_the_last_one_ran(path: Path) -> None:
    disk = HeldDisk()
    async with deadline(), Log(path, small(checkpoint_interval_s=NEVER_S), disk) as log:
        await log.append("first", b"")
        disk.hold()
        syncs = disk.syncs
        appending = [asyncio.create_task(log.append("alone", b""))]
        await eventually(lambda: disk.syncs > syncs, "a sync")
        appending += [asyncio.create_task(log.append(f"s{number}", b"")) for number in range(50)]
        await asyncio.sleep(0)
        disk.let_go()
        await asyncio.gather(*appending)
        assert disk.syncs == syncs + 2
