"""The engine beside lists in memory that say what it must hold, on a disk whose power can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from crash_disk import PowerCut, PowerDisk
from logstore.errors import DamageError, GapError
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.backup.restore import restore
from logstore.ops.compaction.compact import compact
from logstore.ops.verify.store import verify
from logstore.storage import Durability, Event, Log, LogOptions, Retention
from logstore.storage.opening import OpenStore
from tests.engine import deadline, in_segments

MEMORY: Final = Path("/dev/shm")
NAMES: Final = ("a", "b", "c")
SEGMENT_BYTES: Final = 64 << 10

T = TypeVar("T")
Item = tuple[str, bytes]
"""A stream, and what to append to it."""


class Stored(NamedTuple):
    """An event as the model has it."""

    id: int
    payload: bytes


Streams = dict[str, list[Stored]]


class Writer(NamedTuple):
    """An open log."""

    log: Log
    durability: Durability
    incarnation: int


class Backup(NamedTuple):
    """A backup, and what it holds."""

    path: Path
    streams: Streams
    sessions: dict[str, int]


class Lists(NamedTuple):
    """What the engine must hold.

    Attributes:
        streams: What is visible.
        unsynced: What of it a power cut may take: of each opening, in the order in which they were appended, the events
            since it was last known to be on disk whole.
        ids: All that were given out.
        backups: What was backed up.
    """

    streams: Streams
    unsynced: dict[int, list[tuple[str, Stored]]]
    ids: set[int]
    backups: list[Backup]

    def copy(self) -> Lists:
        streams = {stream: events.copy() for stream, events in self.streams.items()}
        unsynced = {writer: events.copy() for writer, events in self.unsynced.items()}
        return Lists(streams, unsynced, self.ids.copy(), self.backups.copy())


class Model:
    """The engine and its lists."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._folder = Path(tempfile.mkdtemp(prefix="logstore-model-", dir=MEMORY if MEMORY.is_dir() else None))
        self._places = 0
        self._numbers = 0
        self.lists = Lists({}, {}, set(), [])
        self.sessions: dict[str, int] = {}
        self.writers: list[Writer] = []
        home = self._new_place()
        home.mkdir()
        self.disk = PowerDisk(home, home / "events.db")

    def _new_place(self) -> Path:
        self._places += 1
        return self._folder / str(self._places)

    @property
    def path(self) -> Path:
        """The catalogue."""
        return self.disk.home / "events.db"

    @property
    def main(self) -> Writer:
        """The log that writes the streams that belong to no session."""
        return self.writers[0]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        async def timed() -> T:
            async with deadline():
                return await work

        return self._runner.run(timed())

    def end(self) -> None:
        with contextlib.ExitStack() as rest:
            rest.callback(shutil.rmtree, self._folder)
            rest.callback(self._runner.close)
            self.run(self.close())

    async def open(self, durability: Durability) -> Writer:
        options = LogOptions(
            durability=durability,
            sync_interval_s=60,
            journal_file_bytes=64 << 10,
            checkpoint_interval_s=60,
            segment_bytes=SEGMENT_BYTES,
        )
        log = Log(self.path, options, self.disk)
        await log.open()
        writer = Writer(log, durability, await log.sessions.incarnation())
        self.writers.append(writer)
        self.lists.unsynced[writer.incarnation] = []
        return writer

    async def close(self) -> None:
        """Close everything: then all of it is on disk."""
        while self.writers:
            await self.writers.pop().log.close()
        self.lists.unsynced.clear()

    # Appending and reading.

    def payload(self, size: int) -> bytes:
        self._numbers += 1
        return f"{self._numbers} ".encode().ljust(size, b".")

    async def append(self, writer: Writer, items: list[Item]) -> None:
        """Append with one call."""
        if len(items) == 1:
            ids = [await writer.log.append(*items[0])]
        else:
            ids = await writer.log.append_many([(stream, payload, 0) for stream, payload in items])
        self._acknowledge(writer, items, ids)

    async def append_from_many_tasks(self, writer: Writer, items: list[Item]) -> None:
        self._acknowledge(writer, items, await asyncio.gather(*(writer.log.append(*item) for item in items)))

    def _acknowledge(self, writer: Writer, items: list[Item], ids: list[str]) -> None:
        for event_id, (stream, payload) in sorted(zip(map(int, ids), items, strict=True)):
            event = Stored(event_id, payload)
            self._show(stream, event)
            if writer.durability != "always":
                self.lists.unsynced[writer.incarnation].append((stream, event))

    def _show(self, stream: str, event: Stored) -> None:
        events = self.lists.streams.setdefault(stream, [])
        assert event.id not in self.lists.ids, "an id was given out twice"
        assert not events or event.id > events[-1].id
        self.lists.ids.add(event.id)
        events.append(event)

    async def read(self, log: Log, stream: str, after: str | None = None) -> list[Stored]:
        found: list[Stored] = []
        while events := await log.read(stream, after, 7):
            found += map(_stored, events)
            after = events[-1].event_id
        return found

    async def contents(self, log: Log) -> Streams:
        return {stream: await self.read(log, stream) for stream in sorted({*self.lists.streams, *NAMES})}

    async def follow(self, stream: str, place: int, items: list[Item]) -> list[Stored]:
        """Return what who follows from a place gets, with what is appended meanwhile."""
        events = self.lists.streams.get(stream, [])
        followed = self.writers[-1].log.follow(stream, str(events[place - 1].id) if place else None)
        found = [await _next_of(followed) for _ in events[place:]]
        coming = asyncio.ensure_future(_next_of(followed))
        await self.append(self.main, items)
        return [*found, await coming]

    def compare(self, found: Streams) -> None:
        streams = self.lists.streams
        assert {each: found[each] for each in found if found[each]} == {
            each: streams[each] for each in streams if streams[each]
        }

    # Work on the store.

    async def checkpoint(self) -> None:
        for writer in self.writers:
            assert writer.log._parts is not None
            writer.log._parts.commit.rotate()
            await in_segments(writer.log)
            self.lists.unsynced[writer.incarnation].clear()

    async def compact(self, kept: int | None) -> None:
        retention = Retention(max_events=kept, resume_window_s=0)
        await self.main.log.maintain(lambda store: compact(store, retention, segment_bytes=SEGMENT_BYTES))
        found = await self.contents(self.main.log)
        for stream, events in self.lists.streams.items():
            # Of each stream the oldest are dropped, and not what is to be kept.
            left = found[stream]
            assert left == events[len(events) - len(left) :]
            assert len(left) >= (len(events) if kept is None else min(kept, len(events)))
            events[:] = left

    async def back_up(self) -> None:
        target = FolderTarget(default_backups(self.path), self.disk)
        done = await self.main.log.maintain(lambda store: create_backup(store, target))
        streams = self.lists.copy().streams
        assert done.events == sum(map(len, streams.values()))
        self.lists.backups.append(Backup(Path(done.path), streams, self.sessions.copy()))

    async def restore(self, backup: Backup, durability: Durability) -> None:
        await self.close()
        await asyncio.to_thread(restore, backup.path, self.path, disk=self.disk)
        self.lists.streams.clear()
        self.lists.streams.update({stream: events.copy() for stream, events in backup.streams.items()})
        self.sessions = backup.sessions.copy()
        await self.open(durability)

    # Sessions.

    async def open_session(self) -> None:
        key = f"session{self._places}-{self._numbers}"
        await self.main.log.sessions.open(key, b"data", f"{key}/")
        self.sessions[key] = self.main.incarnation
        await self.append(self.main, [(f"{key}/a", self.payload(10))])

    async def take_over(self, key: str) -> None:
        """Go on with a session in another log: its owner is dead, or gives it back."""
        owner = next((each for each in self.writers if each.incarnation == self.sessions[key]), None)
        heir = next((each for each in self.writers if each is not owner), None) or await self.open("always")
        if owner is not None:
            await owner.log.sessions.release(key)
            self.lists.unsynced[owner.incarnation].clear()
        taken = await heir.log.sessions.take_over(key)
        assert taken is not None
        assert taken.incarnation == heir.incarnation
        self.sessions[key] = heir.incarnation
        await self.append(heir, [(f"{key}/a", self.payload(10))])

    # Crashes.

    async def killed(self) -> PowerDisk:
        """Return the disk as it is when all processes are killed."""
        place = self._new_place()

        def kill(store: OpenStore) -> PowerDisk:
            # Nobody else writes with SQLite meanwhile.
            with store.checkpoint_lock():
                return self.disk.killed(place)

        return await self.main.log.maintain(kill)

    async def crash(self, durability: Durability) -> None:
        """Kill all processes: nothing that was visible is lost."""
        disk = await self.killed()
        self.lists.unsynced.clear()
        await self._start_again(disk, durability, ())

    async def cut_power(self, seed: int, durability: Durability) -> None:
        await self._start_after(self.disk.cut(), seed, durability, ())

    async def cut_power_during(
        self, work: Callable[[], Awaitable[object]], nth: int, seed: int, under_way: list[Item] | None = None
    ) -> None:
        """Do something, and cut the power before the n-th call to the disk meanwhile, if there are so many.

        Args:
            work: What is done. Whatever it is, the events are what they were.
            nth: Counted from 1.
            seed: What is left is drawn from it.
            under_way: Events that are appended by it with one call: all of them may be there, or none.
        """
        before = self.lists.copy()
        cuts: list[PowerCut] = []
        self.disk.cut_at(nth, cuts.append)
        await work()
        self.disk.cancel_cuts()
        if cuts:
            # What came after it has not happened.
            self.lists = before
            await self._start_after(cuts[0], seed, "always", under_way or ())
        elif not self.writers:
            await self.open("always")

    async def _start_after(
        self, cut: PowerCut, seed: int, durability: Durability, under_way: list[Item] | tuple[()]
    ) -> None:
        path = cut.leave(random.Random(seed), self._new_place())
        await self._start_again(PowerDisk(path.parent, path), durability, under_way)

    async def _start_again(self, disk: PowerDisk, durability: Durability, under_way: list[Item] | tuple[()]) -> None:
        """Go on with another disk, compare it, and throw away the one that was."""
        unsynced = self.lists.unsynced.copy()
        await self.close()
        shutil.rmtree(self.disk.home)
        self.disk = disk
        backups = default_backups(self.path)
        self.lists.backups[:] = [each._replace(path=backups / each.path.name) for each in self.lists.backups]
        await self.open(durability)
        self._take_losses(unsynced, under_way, await self.contents(self.main.log))

    def _take_losses(
        self, unsynced: dict[int, list[tuple[str, Stored]]], under_way: list[Item] | tuple[()], found: Streams
    ) -> None:
        """Take from the lists what the power cut took, and add what was being appended and is there."""
        there = {event for events in found.values() for event in events}
        lost = 0
        for events in unsynced.values():
            kept = [event in there for _, event in events]
            assert kept == sorted(kept, reverse=True), "a lane has a hole"
            for stream, event in events[sum(kept) :]:
                self.lists.streams[stream].remove(event)
                lost += 1
        payloads = {event.payload: event for event in there}
        came = [(stream, payloads[payload]) for stream, payload in under_way if payload in payloads]
        assert len(came) in (0, len(under_way)), "half an append"
        assert not (came and lost), "an append is there, and something before it is not"
        for stream, event in came:
            self._show(stream, event)
        self.compare(found)

    # Damage.

    async def look_at_damage(self, rng: random.Random, *, killed: bool) -> None:
        """Of a copy with a damaged byte nothing wrong is served, and what is missing is told."""
        home = (await self.killed()).home
        path = home / self.path.name
        if not killed:
            async with Log(path):
                pass
        file = _damaged(rng, home)
        if file is not None:
            with _quiet():
                async with Log(path) as log:
                    lacking = [stream for stream in self.lists.streams if not await self._is_served(log, stream)]
                report = await asyncio.to_thread(verify, path)
            assert not lacking or report.findings or report.known, f"{file} was damaged, {lacking} lack events"
        shutil.rmtree(home)

    async def _is_served(self, log: Log, stream: str) -> bool:
        """Whether all is served, or its lack told to who reads; what is served is right."""
        found: list[Stored] = []
        after: str | None = None
        is_told = False
        try:
            while page := await log.read(stream, after):
                found += map(_stored, page)
                after = page[-1].event_id
        except (GapError, DamageError):
            is_told = True
        events = self.lists.streams[stream]
        assert found == sorted(set(found) & set(events))
        return is_told or found == events


def _stored(event: Event) -> Stored:
    return Stored(event.id, event.payload)


async def _next_of(events: AsyncIterator[Event]) -> Stored:
    return _stored(await anext(events))


def _damaged(rng: random.Random, home: Path) -> Path | None:
    """Change one bit of a segment or a journal; None when there is none."""
    files = sorted([*home.rglob("*.segment"), *home.rglob("*.journal")])
    if not files:
        return None
    file = rng.choice(files)
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data.rstrip(b"\0")))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return file


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    logger = logging.getLogger("logstore")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
