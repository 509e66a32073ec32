"""A store from one start of the machine to the next: opened, compared with what it must be, and used."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, NamedTuple

from crash_disk import PowerCut, PowerDisk
from crash_kill import BrokenPromiseError
from crash_power_ledger import Ledger, Owner
from logstore.errors import GapError
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.backup.restore import restore
from logstore.ops.backup.rotation import check_backup
from logstore.ops.compaction.compact import compact
from logstore.ops.verify.report import Finding
from logstore.ops.verify.store import verify
from logstore.storage import Log, LogOptions, Retention
from logstore.storage.ids import lane_of
from logstore.storage.opening import OpenStore

_DEADLINE_S: Final = 60.0
_STREAMS: Final = 5
_SEGMENT_BYTES: Final = 64 << 10
_SETTLE_S: Final = 0.002
_KEPT: Final = (1, 3, 10)
_TORN_OR_DAMAGED: Final = (
    "the last entry is not whole: torn by a power cut, or damaged",
    "a reservation does not match its checksum",
)
"""What `verify` says, before a store is opened, of what a power cut may tear and nothing tells from damage."""
_HEADLESS: Final = "does not begin as a logstore file"
"""Without its index nothing tells a segment whose checkpoint did not commit from a damaged one."""

Events = list[tuple[int, bytes]]
"""Id and payload of events, in order."""


class World:
    """What a store must be like.

    Attributes:
        ledgers: What must be there: as the one says, or while the store is being replaced as one of two.
        backups: Names of the backups that were made, each with what it holds.
        has_notes: Whether nothing ever happened to the index that is more than a power cut: it alone knows what
            retention has dropped.
        killed: Whether the processes were killed and the machine runs on: the system has what they handed to it.
    """

    def __init__(self, ledgers: list[Ledger], backups: dict[str, Ledger]) -> None:
        self.ledgers = ledgers
        self.backups = backups
        self.has_notes = True
        self.killed = False

    def copy(self) -> World:
        """Return the same as it is now."""
        copy = World([each.copy() for each in self.ledgers], self.backups.copy())
        copy.has_notes, copy.killed = self.has_notes, self.killed
        return copy


class Cut(NamedTuple):
    """A power cut, what the store must be like after it, and before which call it came."""

    power: PowerCut
    world: World
    place: str


class Killed(NamedTuple):
    """The disk when all processes were killed, and what the store must be like after it."""

    disk: PowerDisk
    world: World


class _Opened:
    """An open log, and what the ledger calls this opening."""

    def __init__(self, log: Log, opening: int, incarnation: int, slot: int) -> None:
        self.log = log
        self.opening = opening
        self.incarnation = incarnation
        self.slot = slot
        self.streams = [f"{slot}/{number}" for number in range(_STREAMS)]
        self.sessions: list[str] = []


class Life:
    """One life of a store.

    Args:
        rng: What is drawn from.
        path: The catalogue.
        world: What must be there; kept up to date.
        figures: Counts for the report.
        disk: The disk.

    Attributes:
        cuts: The power cuts.
        errors: What was logged as an error.
    """

    def __init__(self, rng: random.Random, path: Path, world: World, figures: Counter[str], disk: PowerDisk) -> None:
        self._rng = rng
        self._path = path
        self._world = world
        self._figures = figures
        self._by_lane: dict[int, int] = {}
        self._logs: list[_Opened] = []
        self.cuts: list[Cut] = []
        self.errors = Errors()
        self.disk = disk
        self.disk.on_sync = self._on_sync

    def note_cut(self, power: PowerCut, world: World | None = None) -> None:
        """Note that the power goes; with nobody else at the disk, or with a copy of the world from before."""
        call, path = self.disk.made[-1] if self.disk.made else ("nothing", self._path)
        world = world or self._world.copy()
        world.killed = False
        self.cuts.append(Cut(power, world, f"{call} {path.relative_to(self._path.parent.parent)}"))

    def _on_sync(self, path: Path) -> None:
        if path.suffix == ".journal":
            opening = self._by_lane.get(int(path.parent.name))
            if opening is not None:
                self._ledger.synced(opening)

    @property
    def _ledger(self) -> Ledger:
        return self._world.ledgers[0]

    async def live(self, steps: int, cuts: int, heir: Path | None = None) -> Killed | None:
        """Open the store, see that it is what it must be, and use it; ends when as many cuts were made.

        Args:
            steps: How often something is done with it.
            cuts: How many power cuts there are.
            heir: Where the disk goes when all processes are killed in the end.

        Returns:
            How they were killed, if they were.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        async with asyncio.timeout(_DEADLINE_S):
            try:
                self._logs.append(await self._open())
                for _ in range(steps):
                    if len(self.cuts) >= cuts > 0:
                        break
                    await self._step()
                while len(self.cuts) < cuts and self._rng.random() < 0.5:
                    self._cut()
                if heir is not None:
                    return await self._kill(heir)
            finally:
                for opened in self._logs:
                    await self._close(opened)
            while len(self.cuts) < cuts:
                self._cut()
        return None

    def _cut(self) -> None:
        # A sync that ends after the power has gone must not count.
        world = self._world.copy()
        self.note_cut(self.disk.cut(), world)

    async def _kill(self, heir: Path) -> Killed:
        def kill(store: OpenStore) -> Killed:
            # Nobody else writes with SQLite meanwhile.
            with store.checkpoint_lock():
                world = self._world.copy()
                return Killed(self.disk.killed(heir), world)

        killed = await self._any_log().log.maintain(kill)
        killed.world.killed = True
        self._figures["kills"] += 1
        return killed

    async def _open(self) -> _Opened:
        rng = self._rng
        options = LogOptions(
            durability=rng.choice(("always", "always", "interval", "os")),
            sync_interval_s=rng.choice((0.001, 0.01)),
            journal_file_bytes=64 << 10,
            journal_bytes=rng.choice((128 << 10, 1 << 20)),
            checkpoint_interval_s=rng.choice((0.01, 0.05, 60.0)),
            segment_bytes=rng.choice((_SEGMENT_BYTES, 8 << 20)),
        )
        log = Log(self._path, options, self.disk)
        try:
            await log.open()
            if not self._logs:
                await self._look(log)
            incarnation = await log.sessions.incarnation()
        except BaseException:
            await log.close()
            raise
        opening = self._ledger.opened(always=options.durability == "always")
        self._by_lane[lane_of(incarnation)] = opening
        # A stream has one writer at a time.
        slot = min({0, 1} - {each.slot for each in self._logs})
        return _Opened(log, opening, incarnation, slot)

    async def _close(self, opened: _Opened) -> None:
        await opened.log.close()
        self._ledger.synced(opened.opening)

    # Looking.

    async def _look(self, log: Log) -> None:
        """Compare the store with what it must be; from here on it stays as it is."""
        found = await self._read(log)
        sessions = {each.key: Owner(each.incarnation, each.released) for each in await log.sessions.all()}
        summaries = {each.stream: each.events for each in log.stream_summaries()}
        counts = {stream: len(events) for stream, events in found.items() if events}
        if summaries != counts:
            raise BrokenPromiseError(f"the summaries say {summaries}, there are {counts}")
        errors: list[BrokenPromiseError] = []
        for ledger in self._world.ledgers:
            if self._world.killed:
                ledger.all_there()
            try:
                ledger.check(found, sessions, has_notes=self._world.has_notes)
            except BrokenPromiseError as error:
                errors.append(error)
                continue
            ledger.settle(found, sessions)
            self._world.ledgers[:] = [ledger]
            self._world.killed = False
            self._check_backups()
            return
        raise errors[0]

    async def _read(self, log: Log) -> dict[str, Events]:
        ledger = self._ledger
        if self._world.has_notes or not ledger.swept:
            return {stream: await read_whole(log, stream) for stream in ledger.streams}
        found = await self._read_over_gaps(log)
        if self.errors.lines:
            # An index from before retention dropped what has left its file: it takes that for lost, as it should.
            await log.maintain(lambda store: store.reindex())
            self.errors.lines.clear()
            self._figures["indexes older than retention, made again"] += 1
            found = await self._read_over_gaps(log)
        return found

    async def _read_over_gaps(self, log: Log) -> dict[str, Events]:
        """Read what retention has left holes in, which only a lost index knew of."""
        found: dict[str, Events] = {}
        for stream in self._ledger.streams:
            events: dict[int, bytes] = {}
            for after in (None, *self._ledger.ids_of(stream)):
                if after not in events:
                    events.update((await read_to_gap(log, stream, after))[0])
            found[stream] = sorted(events.items())
        return found

    def _check_backups(self) -> None:
        target = FolderTarget(default_backups(self._path))
        manifests = target.manifests()
        if lost := self._world.backups.keys() - set(manifests):
            raise BrokenPromiseError(f"backups are gone: {sorted(lost)}")
        for manifest in manifests:
            if problems := check_backup(target, manifest):
                raise BrokenPromiseError(f"backup {manifest}: {problems}")

    def verify(self) -> list[Finding]:
        """Return what `verify` says of the store, which is closed, that it should not."""
        findings = [each for each in verify(self._path).findings if each.reason not in _TORN_OR_DAMAGED]
        if self._world.has_notes:
            return findings
        gaps = "gap" if self._ledger.swept else ""
        return [each for each in findings if _HEADLESS not in each.reason and each.kind != gaps]

    def logged(self) -> list[str]:
        """Return what was logged as an error, that should not be."""
        return [line for line in self.errors.lines if self._world.has_notes or _HEADLESS not in line]

    # Using.

    async def _step(self) -> None:
        steps = (
            (self._append, 30),
            (self._append_together, 15),
            (self._append_batch, 12),
            (self._append_much, 5),
            (self._settle, 7),
            (self._use_session, 12),
            (self._compact, 6),
            (self._back_up, 5),
            (self._read_beside, 4),
            (self._reopen, 4),
            (self._open_another, 4),
            (self._restore, 5),
            (self._reindex, 2),
        )
        await self._rng.choices([step for step, _ in steps], [weight for _, weight in steps])[0]()

    def _any_log(self) -> _Opened:
        return self._rng.choice(self._logs)

    def _event(self, opened: _Opened, size: int | None = None) -> tuple[str, bytes]:
        if size is None:
            size = self._rng.choice((0, 10, 300, 300, 2_000, 20_000))
        self._figures["events sent"] += 1
        payload = f"{self._figures['events sent']} ".encode().ljust(size, b".")
        return self._rng.choice(opened.streams), payload

    async def _append(self) -> None:
        await self._append_all(self._any_log(), 1)

    async def _append_together(self) -> None:
        await self._append_all(self._any_log(), self._rng.randint(2, 8))

    async def _append_all(self, opened: _Opened, count: int) -> None:
        events = [self._event(opened) for _ in range(count)]
        for event in events:
            self._ledger.sent(opened.opening, [event])

        async def append(stream: str, payload: bytes) -> None:
            self._ledger.acknowledged(payload, int(await opened.log.append(stream, payload)))

        await asyncio.gather(*(append(*event) for event in events))

    async def _append_batch(self) -> None:
        opened = self._any_log()
        await self._append_many(opened, [self._event(opened) for _ in range(self._rng.randint(2, 8))])

    async def _append_much(self) -> None:
        """Append so much to one stream that it gets a segment of its own, which grows from then on."""
        opened = self._any_log()
        stream = opened.streams[0]
        await self._append_many(opened, [(stream, self._event(opened, 60_000)[1]) for _ in range(5)])

    async def _append_many(self, opened: _Opened, events: list[tuple[str, bytes]]) -> None:
        self._ledger.sent(opened.opening, events)
        ids = await opened.log.append_many([(stream, payload, 0) for stream, payload in events])
        for (_, payload), event_id in zip(events, ids, strict=True):
            self._ledger.acknowledged(payload, int(event_id))

    async def _settle(self) -> None:
        """Wait until everything is in segments, or long enough."""
        log = self._any_log().log
        for _ in range(20):
            if not log.stats().unsegmented_bytes:
                return
            await asyncio.sleep(_SETTLE_S)

    async def _use_session(self) -> None:
        opened = self._any_log()
        others = [each for each in self._logs if each is not opened]
        what = self._rng.random()
        if not opened.sessions or what < 0.3:
            await self._open_session(opened)
        elif what < 0.5:
            await opened.log.sessions.touch(self._rng.choice(opened.sessions))
        else:
            key = opened.sessions.pop(self._rng.randrange(len(opened.sessions)))
            opened.streams.remove(f"{key}/a")
            if what < 0.7 or not others:
                await self._change(key, None, lambda: opened.log.sessions.end(key))
            else:
                await self._hand_over(key, opened, self._rng.choice(others))

    async def _open_session(self, opened: _Opened) -> None:
        self._figures["sessions"] += 1
        key = f"session{self._figures['sessions']}"
        data, own = self._rng.randbytes(20), Owner(opened.incarnation, released=False)
        await self._change(key, own, lambda: opened.log.sessions.open(key, data, f"{key}/"))
        self._serve(opened, key)

    async def _hand_over(self, key: str, opened: _Opened, heir: _Opened) -> None:
        released = Owner(opened.incarnation, released=True)
        await self._change(key, released, lambda: opened.log.sessions.release(key))
        taken = Owner(heir.incarnation, released=False)
        await self._change(key, taken, lambda: heir.log.sessions.take_over(key))
        self._serve(heir, key)

    def _serve(self, opened: _Opened, key: str) -> None:
        opened.sessions.append(key)
        opened.streams.append(f"{key}/a")

    async def _change(self, key: str, owner: Owner | None, change: Callable[[], Awaitable[object]]) -> None:
        self._ledger.session(key, owner)
        await change()
        self._ledger.session_done(key)

    async def _compact(self) -> None:
        kept = self._rng.choice((None, *_KEPT))
        self._ledger.keep(kept)
        retention = Retention(max_events=kept, resume_window_s=0)
        log = self._any_log().log
        await log.maintain(lambda store: compact(store, retention, segment_bytes=_SEGMENT_BYTES))

    async def _back_up(self) -> None:
        holds = self._ledger.at_rest()
        target = FolderTarget(default_backups(self._path), self.disk)
        done = await self._any_log().log.maintain(lambda store: create_backup(store, target))
        if done.damaged:
            raise BrokenPromiseError(f"the backup says that the store is damaged: {done.damaged}")
        self._world.backups[Path(done.path).name] = holds

    async def _read_beside(self) -> None:
        """Read as another process does; what `always` shows must stay."""
        async with Log(self._path, LogOptions(), self.disk) as log:
            writing = asyncio.ensure_future(self._append_together())
            for stream in self._ledger.streams:
                self._ledger.shown({stream: (await read_to_gap(log, stream))[0]})
            await writing

    async def _reopen(self) -> None:
        opened = self._any_log()
        self._logs.remove(opened)
        await self._close(opened)
        if not self._logs:
            self._logs.append(await self._open())

    async def _open_another(self) -> None:
        if len(self._logs) < 2:
            self._logs.append(await self._open())

    async def _reindex(self) -> None:
        # Another process would say, as an error, that its index was replaced.
        if len(self._logs) == 1:
            await self._any_log().log.maintain(lambda store: store.reindex())

    async def _restore(self) -> None:
        if not self._world.backups:
            return
        while self._logs:
            await self._close(self._logs.pop())
        manifest = self._rng.choice(sorted(self._world.backups))
        after = self._ledger.restored(self._world.backups[manifest])
        self._world.ledgers.append(after)
        await asyncio.to_thread(restore, default_backups(self._path) / manifest, self._path, disk=self.disk)
        self._world.ledgers[:] = [after]
        self._figures["restores"] += 1
        self._logs.append(await self._open())


async def read_to_gap(log: Log, stream: str, behind: int | None = None) -> tuple[Events, GapError | None]:
    """Return what is in a stream, or behind an id of it, up to the first gap; and that."""
    found: Events = []
    after = None if behind is None else str(behind)
    try:
        while events := await log.read(stream, after):
            found += [(event.id, event.payload) for event in events]
            after = events[-1].event_id
    except GapError as error:
        return found, error
    return found, None


async def read_whole(log: Log, stream: str) -> Events:
    """Return everything in a stream.

    Raises:
        BrokenPromiseError: It has a gap.
    """
    found, gap = await read_to_gap(log, stream)
    if gap is not None:
        raise BrokenPromiseError(f"nothing was lost, and there is a gap: {gap}")
    return found


class Errors(logging.Handler):
    """Keeps what is logged as an error; warnings, such as of torn writes, go nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        if record.levelno >= logging.ERROR:
            self.lines.append(record.getMessage())
