"""The processes of the campaign of many processes, seen from outside: begun, given slots, stopped, killed, replaced."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Final, NamedTuple

from crash_chores import REINDEXED
from crash_forked import Forked
from crash_kill import BrokenPromiseError, read_lines
from crash_ledger import ID_BYTES, STREAMS_A_SLOT, Ledger, name_of
from crash_member import Follow, Orders, Sample, counts_path, live, report_path, shown_path
from logstore.storage import LogOptions

PATIENCE_S: Final = 300.0
"""Longer than it takes to make the index of ten million events again on a busy machine."""
CLOCK_BEHIND_MS: Final = 5_000
"""More than ids are reserved ahead."""
_FOLLOWED: Final = 4
_FROM_BEGINNING: Final = 0.1
_SHORT: Final = 20_000
"""Events of a stream that anybody may follow from its beginning."""
_RECENT: Final = 5_000
_SAMPLES: Final = 8
_SAMPLE_EVENTS: Final = 50
_TO_NEWCOMER: Final = 0.5


class Member:
    """One process.

    Attributes:
        life: Its number.
        process: The process.
        commands: Where it is told what to do.
        orders: What it was told when it began.
        slots: What it serves, or is to.
        served: What it ever served: no slot comes back to a process.
        learnt: Bytes of its report that are known.
        grew: When that grew last, or it was given something to do.
        continues: When it is to go on, if it is stopped.
        ending: Whether it was told to end.
    """

    def __init__(self, life: int, process: Forked, commands: int, orders: Orders) -> None:
        self.life = life
        self.process = process
        self.commands = commands
        self.orders = orders
        self.slots: set[int] = set()
        self.served: set[int] = set()
        self.learnt = 0
        self.grew = time.monotonic()
        self.continues: float | None = None
        self.ending = False

    def tell(self, *words: object) -> None:
        """Give it a line."""
        # One that ended by itself is found by who looks.
        with contextlib.suppress(BrokenPipeError):
            os.write(self.commands, (" ".join(map(str, words)) + "\n").encode())

    def stop(self, seconds: float) -> None:
        """Take the processor from it for a while."""
        os.kill(self.process.pid, signal.SIGSTOP)
        self.continues = time.monotonic() + seconds

    def go_on(self) -> None:
        """Give it the processor back."""
        if self.continues is not None:
            os.kill(self.process.pid, signal.SIGCONT)
            self.continues = None


class _Late(NamedTuple):
    """Since when a follower is to be shown an event, and which."""

    since: float
    newest: int


class Crew:
    """All processes that write and read one store.

    Args:
        path: The catalogue.
        pool: Where backups go.
        reports: Where processes report.
        ledger: Takes up what they report.
        figures: What is counted.
        seed: What everything is drawn from.

    Attributes:
        members: Those that live.
    """

    def __init__(self, path: Path, pool: Path, reports: Path, ledger: Ledger, figures: Counter[str], seed: int) -> None:
        self._path = path
        self._pool = pool
        self._reports = reports
        self._ledger = ledger
        self._figures = figures
        self._seed = seed
        self._lives = 0
        self._quiet = False
        self._late: dict[tuple[int, int], _Late] = {}
        self._rng = random.Random(f"{seed} crew")
        self.members: list[Member] = []
        reports.mkdir(parents=True)

    def descriptors(self) -> list[int]:
        """Return what a process that is forked must not keep: it would keep the others from seeing the campaign die."""
        return [member.commands for member in self.members]

    # Beginning and ending.

    def begin(self) -> Member:
        """Start a process; it serves nothing yet."""
        life = self._lives = self._lives + 1
        orders = Orders(
            path=self._path,
            pool=self._pool,
            reports=self._reports,
            life=life,
            seed=self._seed,
            options=self._options(),
            behind_ms=self._rng.choice((0, self._rng.randrange(CLOCK_BEHIND_MS))),
            follows=self._follows(),
            samples=self._samples(),
        )
        theirs, ours = os.pipe()
        close = [ours, *self.descriptors()]
        process = Forked(f"life {life}", self._reports / f"{life}.stderr", partial(live, orders, theirs), close)
        os.close(theirs)
        member = Member(life, process, ours, orders)
        self.members.append(member)
        self._figures["processes"] += 1
        if self._quiet:
            member.tell("quiet")
        return member

    def _options(self) -> LogOptions:
        rng = self._rng
        return LogOptions(
            durability=rng.choice(("always", "interval", "os")),
            sync_interval_s=rng.choice((0.02, 0.1)),
            memory_bytes=rng.choice((2 << 20, 8 << 20)),
            cached_events_per_stream=rng.choice((1, 10, 100)),
            journal_file_bytes=rng.choice((64 << 10, 256 << 10, 1 << 20)),
            journal_bytes=rng.choice((512 << 10, 4 << 20)),
            checkpoint_interval_s=rng.choice((0.05, 0.3, 1.0)),
            segment_bytes=rng.choice((256 << 10, 1 << 20, 8 << 20)),
        )

    def _follows(self) -> tuple[Follow, ...]:
        streams = self._rng.sample(range(len(self._ledger.newest)), _FOLLOWED)
        return tuple(Follow(stream, self._start_of(stream)) for stream in streams)

    def _start_of(self, stream: int) -> int:
        """Return after which event to follow a stream."""
        lives = self._ledger.ids[stream]
        known = sum(map(len, lives.values()))
        if not known or (known < _SHORT and self._rng.random() < _FROM_BEGINNING):
            return 0
        ids = self._rng.choice(list(lives.values())[-3:])
        return ids[-self._rng.randint(1, min(len(ids), _RECENT))]

    def _samples(self) -> tuple[Sample, ...]:
        samples: list[Sample] = []
        for stream in self._rng.sample(range(len(self._ledger.newest)), _SAMPLES):
            if lives := self._ledger.ids[stream]:
                ids = self._rng.choice(list(lives.values()))
                start = self._rng.randrange(len(ids))
                samples.append(Sample(stream, tuple(ids[start : start + _SAMPLE_EVENTS])))
        return tuple(samples)

    def kill(self, victims: Sequence[Member]) -> list[int]:
        """Kill processes and take up what they reported; return the slots that nobody serves now.

        Raises:
            BrokenPromiseError: One had ended by itself, or had something to say.
        """
        for member in victims:
            member.process.kill()
        self._figures["kills"] += len(victims)
        return self._bury(victims)

    def _bury(self, dead: Sequence[Member]) -> list[int]:
        orphans: list[int] = []
        for member in dead:
            self.members.remove(member)
            os.close(member.commands)
            self._learn_from(member)
            self._ledger.ended.add(member.life)
            for place, follow in enumerate(member.orders.follows):
                shown = _read(shown_path(self._reports, member.life, place))
                self._figures["events followed"] += self._ledger.learn_shown(follow.stream, follow.after, shown)
                shown_path(self._reports, member.life, place).unlink(missing_ok=True)
            for line in read_lines(counts_path(self._reports, member.life)):
                count, _, what = line.partition(" ")
                self._figures[what] += int(count)
            for path in (report_path(self._reports, member.life), counts_path(self._reports, member.life)):
                path.unlink(missing_ok=True)
            member.process.check(REINDEXED if self._figures["chores: reindex"] else None)
            if member.process.status == 0 and not member.ending:
                raise BrokenPromiseError(f"life {member.life} ended, and nobody had told it to")
            orphans += member.slots
        return orphans

    def end(self) -> None:
        """Have half of the processes end by themselves, and kill the others.

        Raises:
            BrokenPromiseError: One did not, or not well.
        """
        told = self.members[::2]
        for member in told:
            member.go_on()
            member.ending = True
            member.tell("stop")
        for member in told:
            member.process.wait(PATIENCE_S)
        self._figures["processes that ended as told"] += len(told)
        self._bury(told)
        self.kill(list(self.members))

    def kill_all(self) -> None:
        """Kill whatever runs, after a failure."""
        for member in self.members:
            member.process.kill()

    # Slots.

    def pass_on(self, slots: Iterable[int], newcomers: Sequence[Member]) -> None:
        """Give slots to other processes: to those that have just begun, or any."""
        for slot in slots:
            able = [each for each in self.members if slot not in each.served and not each.ending]
            if newcomers and self._rng.random() < _TO_NEWCOMER:
                able = list(newcomers)
            self._give(slot, self._rng.choice(able or [self.begin()]))

    def _give(self, slot: int, member: Member) -> None:
        first = slot * STREAMS_A_SLOT
        member.tell("serve", slot, *self._ledger.newest[first : first + STREAMS_A_SLOT])
        member.slots.add(slot)
        member.served.add(slot)
        member.grew = time.monotonic()
        self._figures["slots given"] += 1

    def hand_over(self) -> None:
        """Have a process give one of its slots to another, both alive."""
        owners = [(each, slot) for each in self.members for slot in each.slots if self._writes(each, slot)]
        if not owners:
            return
        owner, slot = self._rng.choice(owners)
        able = [each for each in self.members if slot not in each.served and not each.ending]
        if able and not owner.ending:
            heir = self._rng.choice(able)
            owner.tell("release", slot)
            owner.slots.remove(slot)
            self._give(slot, heir)
            self._figures["slots handed over"] += 1

    def _writes(self, member: Member, slot: int) -> bool:
        """Whether a process has written to a slot: then it serves it."""
        first = slot * STREAMS_A_SLOT
        return any(member.life in ids for ids in self._ledger.ids[first : first + STREAMS_A_SLOT])

    def be_quiet(self, quiet: bool) -> None:
        """Have nobody write any more, or everybody write on."""
        self._quiet = quiet
        for member in self.members:
            member.go_on()
            member.tell("quiet" if quiet else "write")

    # Looking.

    def look(self) -> None:
        """Take up what was reported, let those go on that were stopped for long enough, replace those that have ended.

        Raises:
            BrokenPromiseError: A process ended by itself, or does not get on.
        """
        now = time.monotonic()
        for member in list(self.members):
            self._learn_from(member)
            if member.continues is not None and now > member.continues:
                member.go_on()
            if member.process.ended():
                self.pass_on(self._bury([member]), [self.begin()])
                self._figures["processes that ended as told"] += 1
            elif member.slots and now - member.grew > PATIENCE_S:
                raise BrokenPromiseError(f"life {member.life} does not get on:\n{member.process.where()}")

    def _learn_from(self, member: Member) -> None:
        learnt = self._ledger.learn(member.life, _read(report_path(self._reports, member.life), member.learnt))
        if learnt:
            member.learnt += learnt
            member.grew = time.monotonic()
        self._figures["events acknowledged"] = self._ledger.events

    def check_followers(self, patience_s: float = PATIENCE_S) -> int:
        """Check that the followers get on; return how many have not been shown all that is known to be acknowledged.

        Args:
            patience_s: How long one may take until it is shown what was acknowledged when it was looked at; when the
                index was lost it opens the store first, which makes it again.

        Raises:
            BrokenPromiseError: One took longer.
        """
        now = time.monotonic()
        late: dict[tuple[int, int], _Late] = {}
        for member in self.members:
            # One that was told to end has no followers any more.
            for place, follow in enumerate(() if member.ending else member.orders.follows):
                shown, newest = self._last_shown(member, place) or follow.after, self._ledger.newest[follow.stream]
                if shown >= newest:
                    continue
                before = self._late.get((member.life, place))
                if before is None or shown >= before.newest:
                    before = _Late(now, newest)
                late[member.life, place] = before
                if now - before.since > patience_s:
                    raise BrokenPromiseError(
                        f"{now - before.since:.0f} s after event {before.newest} of {name_of(follow.stream)} was "
                        f"acknowledged, {member.process.name} has followed to {shown}:\n{member.process.where()}"
                    )
        self._late = late
        return len(late)

    def _last_shown(self, member: Member, place: int) -> int:
        """Return the last event that a follower was shown, 0 for none."""
        path = shown_path(self._reports, member.life, place)
        size = path.stat().st_size if path.exists() else 0
        return int.from_bytes(_read(path, size - ID_BYTES)[:ID_BYTES], "little") if size >= ID_BYTES else 0


def _read(path: Path, offset: int = 0) -> bytes:
    """Return some of a report from an offset on; nothing when there is none."""
    with contextlib.suppress(FileNotFoundError), FileIO(path) as report:
        report.seek(offset)
        return report.readall()
    return b""
