"""What the campaigns interrupt: eight kinds of work on a store, each with the store that it begins with."""

from __future__ import annotations

import asyncio
import functools
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from crash_examine import check_opened, check_unopened, look
from crash_kill import BrokenPromiseError
from crash_life import Hand, live
from crash_scenario import ACT, KIB, Scenario, catalogue, with_store
from crash_told import Told
from logstore.errors import LogstoreError
from logstore.ops.access import open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.manifest import read_manifest
from logstore.ops.backup.pool import FolderTarget
from logstore.ops.backup.restore import restore
from logstore.ops.backup.rotation import check_backup, delete_old
from logstore.ops.compaction.compact import compact
from logstore.ops.reindex import reindex_at
from logstore.storage import Log, LogOptions, Retention
from logstore.storage.files import Disk
from logstore.storage.opening import OpenStore

_KEPT: Final = 20


class Append(Scenario):
    """Appends of several tasks, from the opening, which makes the store in every other variation, to the close."""

    name = "append"

    def prepare(self) -> None:
        """Make a small store, or none."""
        if self.variation % 2:
            self.live_once(self.life(0, [[1, 3, 2]]))

    def may_refuse(self, told: Told) -> bool:
        """Before anything was acknowledged there may be no store."""
        return not told.stored

    def act(self, folder: Path, hand: Hand) -> None:
        """Open, append, close."""
        rounds = [[self.rng.choice((1, 1, 1, 2, 7)) for _ in range(8)] for _ in range(2)]
        life = self.life(ACT, rounds, options=self.options(checkpoint_interval_s=60.0))
        asyncio.run(live(catalogue(folder), hand, life, begin="opening"))


class Roll(Scenario):
    """Appends that fill one journal file after another."""

    name = "roll"

    def prepare(self) -> None:
        """Make a small store."""
        self.live_once(self.life(0, [[5]]))

    def act(self, folder: Path, hand: Hand) -> None:
        """Fill a file of 64 KiB every few calls."""
        small = self.options(
            journal_file_bytes=64 * KIB, journal_bytes=256 * KIB, checkpoint_interval_s=self.rng.choice((0.01, 60.0))
        )
        rounds = [[self.rng.randrange(10, 50) for _ in range(5)] for _ in range(2)]
        asyncio.run(live(catalogue(folder), hand, self.life(ACT, rounds, options=small)))


class Checkpoint(Scenario):
    """Rounds of appends, each brought into segments: packs, files of a stream, files that are full."""

    name = "checkpoint"

    def prepare(self) -> None:
        """Make a small store."""
        self.live_once(self.life(0, [[20, 5]]))

    def act(self, folder: Path, hand: Hand) -> None:
        """Append, and wait each time until all is in segments."""
        options = self.options(
            checkpoint_interval_s=0.01, segment_bytes=self.rng.choice((64, 512)) * KIB, journal_file_bytes=1 << 20
        )
        # Sixty large ones of one stream get a file of its own.
        rounds = [[3, 1], [60], [9], [60, 2], [1]]
        asyncio.run(live(catalogue(folder), hand, self.life(ACT, rounds, options=options, segmented=True)))


class Compaction(Scenario):
    """Retention and compaction of a store with many small segments, half-dead ones, and some of a dead process."""

    name = "compaction"
    _retention: Final = Retention(max_events=_KEPT, resume_window_s=0.0)

    def prepare(self) -> None:
        """Fill segments in three lives, of which one is killed."""
        options = self.options(checkpoint_interval_s=0.01)
        rounds = [[self.rng.randrange(5, 20)] for _ in range(4)] + [[60], [20], [10]]
        self.live_once(self.life(0, rounds, streams=4, options=options, segmented=True))
        self.die_once(self.life(1, [[60], [15]], streams=4, options=options, segmented=True))
        self.live_once(self.life(2, [[8], [60], [3]], streams=4, options=options, segmented=True))
        self.told.most_events = _KEPT

    def act(self, folder: Path, hand: Hand) -> None:
        """Drop what is too many, and compact."""
        with_store(folder, hand, [lambda store: compact(store, self._retention, segment_bytes=64 * KIB)])

    def examine(self, folder: Path, told: Told) -> int:
        """Look as always; then a pass that nothing interrupts loses nothing either, and leaves no waste."""
        events = super().examine(folder, told)
        store = open_existing(catalogue(folder))
        try:
            compact(store, self._retention, segment_bytes=64 * KIB)
        finally:
            store.close(empty=True)
        if waste := [each.name for each in folder.glob("store/events-log/segments/*.tmp")]:
            raise BrokenPromiseError(f"a pass of compaction leaves {waste}")
        check_unopened(catalogue(folder), told, may_refuse=False)
        return events


class Backup(Scenario):
    """A backup of a store that has one already and a dead process's journals, and the rotation of old ones."""

    name = "backup"

    def prepare(self) -> None:
        """Fill a store, back it up, and have two more lives."""
        options = self.options(checkpoint_interval_s=0.01)
        self.live_once(self.life(0, [[10], [60], [5]], options=options, segmented=True))
        _back_up(self.prepared)
        self.live_once(self.life(1, [[7], [3]], options=options, segmented=True))
        self.die_once(self.life(2, [[60, 2], [2, 2]], options=self.options(checkpoint_interval_s=60.0)))

    def act(self, folder: Path, hand: Hand) -> None:
        """Back up as a command does, or in the process that writes; then remove what is old."""
        target = FolderTarget(folder / "pool")

        def back_up(store: OpenStore) -> None:
            # Files that the disk did not give are named as damaged: a backup, but no whole one.
            hand.tell("partly made" if create_backup(store, target).damaged else "made")

        if self.variation % 2 == 0:
            with_store(folder, hand, [back_up, lambda _: delete_old(target, 0)])
            return

        async def back_up_own(log: Log, hand: Hand) -> None:
            await hand.do_async(lambda: log.maintain(back_up))
            await hand.do_async(lambda: log.maintain(lambda _: delete_old(target, 0)))

        life = self.life(ACT, [[20, 2]], options=self.options(checkpoint_interval_s=60.0))
        asyncio.run(live(catalogue(folder), hand, life, begin="written", then=back_up_own))

    def examine(self, folder: Path, told: Told) -> int:
        """Look as always; there is a whole backup at any time, and the next one is made."""
        events = super().examine(folder, told)
        needed = {event_id for mark, event_id in told.stored.items() if mark.call.run <= ACT}
        target = FolderTarget(folder / "pool")
        keys = target.manifests()
        whole = [key for key in keys if not read_manifest(target, key).damaged]
        if not whole or any(check_backup(target, key) for key in keys):
            raise BrokenPromiseError(f"backups {keys}: {[check_backup(target, key) for key in keys]}")
        lacks = needed - self._restored(folder, whole[-1])
        if lacks and ("made" in told.words or len(whole) > 1):
            raise BrokenPromiseError(f"the newest of {whole} lacks {len(lacks)} events that were there before")
        _back_up(folder)
        delete_old(target, 0)
        (key,) = target.manifests()
        if problems := check_backup(target, key):
            raise BrokenPromiseError(f"the backup that was made next: {problems}")
        if waste := [each.name for each in folder.glob("pool/**/*.tmp")]:
            raise BrokenPromiseError(f"backups and their rotation leave {waste}")
        return events

    @staticmethod
    def _restored(folder: Path, key: str) -> set[int]:
        """Return the ids of what a backup has, restored elsewhere."""
        place = folder / "elsewhere" / "events.db"
        restore(folder / "pool" / key, place)
        found = _ids(place)
        shutil.rmtree(place.parent)
        return found


class Restore(Scenario):
    """A restore over a store that has got on since the backup, or, in every other variation, into an empty place."""

    name = "restore"

    def prepare(self) -> None:
        """Fill a store, back it up, and go on, or take it away."""
        options = self.options(checkpoint_interval_s=0.01)
        self.live_once(self.life(0, [[10], [60]], options=options, segmented=True))
        _back_up(self.prepared)
        self.new = self.told.copy()
        if self.variation % 2:
            shutil.rmtree(catalogue(self.prepared).parent)
            catalogue(self.prepared).parent.mkdir()
            self.told = Told()
            return
        self.live_once(self.life(1, [[7], [3]], options=options, segmented=True))
        self.die_once(self.life(2, [[5, 2]], options=self.options(checkpoint_interval_s=60.0)))

    def act(self, folder: Path, hand: Hand) -> None:
        """Restore."""
        hand.begin()
        hand.do(lambda: restore(folder / "pool", catalogue(folder)), (LogstoreError,))
        hand.tell("made")

    def may_refuse(self, told: Told) -> bool:
        """Between the old store and the new one who looks is told to open it."""
        return "made" not in told.words

    def examine(self, folder: Path, told: Told) -> int:
        """Find exactly the old store or the new one, as was said; then restore what is not."""
        path, new = catalogue(folder), self.new.copy()
        is_new = self._is_new(path)
        said = "made" if "made" in told.words else told.errors[-1] if told.errors else ""
        if (is_new and "as it was" in said) or (not is_new and (said == "made" or "its place" in said)):
            raise BrokenPromiseError(f"it is the {'new' if is_new else 'old'} store, and was told: {said}")
        # Exactly the one or the other, and no id twice in any case.
        given_out = max(told.highest_id, new.highest_id)
        check_unopened(path, new if is_new else told, may_refuse=self.may_refuse(told))
        events = check_opened(path, new if is_new else told, given_out)
        if not is_new:
            restore(folder / "pool", path)
            events += check_opened(path, new, max(told.highest_id, given_out))
        return events

    def _is_new(self, path: Path) -> bool:
        """Tell which of the two stores it is; what was decided is finished by an opening."""
        try:
            found = _ids(path)
        except LogstoreError:
            OpenStore(Disk(), path, LogOptions().segment_bytes).close(empty=True)
            found = _ids(path)
        return found == set(self.new.stored.values())


class Adoption(Scenario):
    """An opening that finds the journals of dead processes, takes their sessions over, and writes to their streams."""

    name = "adoption"

    def prepare(self) -> None:
        """Have two processes die over their journals and their sessions."""
        options = self.options(checkpoint_interval_s=60.0)

        # One dies with its lane free for who opens next; the other's lane has to be adopted beside it.
        self.die_once(
            self.life(0, [[12, 3]], options=options, prefix="a"),
            lambda log, hand: _open_sessions(log, hand, ["a0", "a1"]),
        )
        self.die_once(
            self.life(1, [[50, 3], [20]], options=options, prefix="b"),
            lambda log, hand: _open_sessions(log, hand, ["b0"]),
        )

    def act(self, folder: Path, hand: Hand) -> None:
        """Open, take over, and go on."""
        life = self.life(ACT, [[3], [2]], options=self.options(checkpoint_interval_s=0.01), prefix="b")
        asyncio.run(live(catalogue(folder), hand, life, begin="opening", first=_take_sessions))


async def _open_sessions(log: Log, hand: Hand, keys: Sequence[str]) -> None:
    incarnation = str(await log.sessions.incarnation())
    for key in keys:
        await log.sessions.open(key, b"state")
        hand.tell("session", key, incarnation, True)


async def _take_sessions(log: Log, hand: Hand) -> None:
    """Take over what dead processes served; go on with one session, release one, end one."""
    own = str(await log.sessions.incarnation())

    async def change(key: str, state: str, job: Callable[[str], Awaitable[object]]) -> None:
        hand.tell("session", key, state, False)
        await hand.do_async(functools.partial(job, key))
        hand.tell("session", key, state, True)

    for key in ("a0", "a1", "b0"):
        await change(key, own, log.sessions.take_over)
        session = await log.sessions.find(key)
        if session is None or str(session.incarnation) != own:
            raise BrokenPromiseError(f"session {key} of a dead process is {session}, and was taken over by {own}")
    await change("a0", "released", log.sessions.release)
    await change("a1", "none", log.sessions.end)


class Reindex(Scenario):
    """The index made again: of a whole one, a lost one, a damaged one, and one from before the last segments."""

    name = "reindex"

    def prepare(self) -> None:
        """Fill segments, and do something to the index."""
        path = catalogue(self.prepared)
        options = self.options(checkpoint_interval_s=0.01)
        self.live_once(self.life(0, [[10], [60], [5]], options=options, segmented=True))
        shutil.copy(path, path.with_name("older"))
        self.live_once(self.life(1, [[7], [30]], options=options, segmented=True))
        kind = self.variation % 4
        if kind == 1:
            path.unlink()
        elif kind == 2:
            path.write_bytes(b"no database at all, " * 200)
            self.told.expected = "the catalogue is damaged: kept as"
        elif kind == 3:
            path.with_name("older").replace(path)
        path.with_name("older").unlink(missing_ok=True)

    def may_refuse(self, told: Told) -> bool:
        """An index that was lost before has to be made first."""
        is_gone = self.variation % 4 != 0 or any("there is none now" in error for error in told.errors)
        return is_gone and "made" not in told.words

    def examine(self, folder: Path, told: Told) -> int:
        """Look as always; but an index from before the last segments shows no more than it knows, until one opens."""
        if self.variation % 4 == 3 and "made" not in told.words:
            return check_opened(catalogue(folder), told)
        return super().examine(folder, told)

    def act(self, folder: Path, hand: Hand) -> None:
        """Make the index again."""
        hand.begin()
        hand.do(lambda: reindex_at(catalogue(folder)), (LogstoreError,))
        hand.tell("made")


def _ids(path: Path) -> set[int]:
    return {event_id for events in look(path).values() for event_id, _ in events}


def _back_up(folder: Path) -> None:
    store = open_existing(catalogue(folder))
    try:
        create_backup(store, FolderTarget(folder / "pool"))
    finally:
        store.close(empty=True)


SCENARIOS: Final[tuple[type[Scenario], ...]] = (
    Append,
    Roll,
    Checkpoint,
    Compaction,
    Backup,
    Restore,
    Adoption,
    Reindex,
)
