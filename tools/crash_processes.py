"""The campaign of many processes: writers and readers on one store, killed at random over and over.

Meanwhile the store is compacted, backed up, verified and indexed again, and loses its index while nobody has it open;
processes are stopped for a while, and the streams of dead ones are taken over by others. Every process checks what it
reads; what was acknowledged to the writers, and shown to the followers, is compared with the store in the end, and of
some streams all the time.
"""

from __future__ import annotations

import random
import resource
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Final

# Run as a script, this folder is on the path and the checkout is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from crash_chores import COMPARED, PATIENCE_S, Chores, audit, audit_opened, make_index, verify_whole
from crash_crew import CLOCK_BEHIND_MS, Crew, Member
from crash_forked import Forked
from crash_kill import BrokenPromiseError
from crash_ledger import Ledger
from logstore.storage.indexing import SQLITE_FILES

_TICK_S: Final = 0.02
_HASTE: Final = 0.3
_YOUNG_S: Final = 0.3
_DIES_YOUNG: Final = 0.15
_ALL_AT_ONCE: Final = 0.03
_SOME_AT_ONCE: Final = 0.1
_TOLD_TO_END: Final = 0.05
_STOP_PAUSE_S: Final = 2.0
_LONGEST_STOP_S: Final = 1.5
_HAND_OVER_PAUSE_S: Final = 2.0
_WORK_PAUSE_S: Final = 3.0
_CLOCK_PAUSE_S: Final = 1.0
_INDEX_LOST: Final = (0.15, 0.5, 0.85)
"""After which share of the kills the index is deleted while nobody has the store open."""
_QUIET_KILLS: Final = 40
_QUIET_S: Final = 60.0
_QUIET_LOOK_S: Final = 0.1
_LAG_LOOK_S: Final = 5.0
_TELL_S: Final = 10.0
_MOST_MIB: Final = 1024
_LOOKED_AT: Final = 2
"""Tasks of which all streams are read when all processes are dead."""
_AUDITORS: Final = 2


class ProcessesCampaign:
    """Runs processes on one store, and kills them.

    Args:
        folder: Where the stores go.
        seed: What everything is drawn from, but for the moments.
        events: How many events are acknowledged before it ends.
        kills: How many processes are killed meanwhile.
        processes: How many there are at a time.

    Attributes:
        figures: What was counted.
    """

    def __init__(self, folder: Path, seed: int, *, events: int, kills: int, processes: int) -> None:
        self.figures: Counter[str] = Counter()
        self._folder = folder
        self._seed = seed
        self._events = events
        self._kills = kills
        self._processes = processes

    def run(self, number: int) -> None:
        """Do one run, over a store of its own.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        folder = self._folder / f"{number:03d}"
        run = _Run(folder, self._seed * 1_000 + number, self._processes, self.figures)
        try:
            run.play(self._events, self._kills)
        finally:
            run.end()
        shutil.rmtree(folder)

    def finish(self) -> None:
        """Nothing is left over from one run to the next."""


class _Run:
    """One run."""

    def __init__(self, folder: Path, seed: int, processes: int, figures: Counter[str]) -> None:
        if threading.active_count() > 1:
            raise RuntimeError("processes cannot be forked from one that has threads")
        self._folder = folder
        self._path = folder / "store" / "events.db"
        self._processes = processes
        self._figures = figures
        self._rng = random.Random(seed)
        self._ledger = Ledger(processes)
        pool = folder / "pool"
        self._crew = Crew(self._path, pool, folder / "reports", self._ledger, figures, seed)
        self._chores = Chores(folder, self._path, pool, self._ledger, figures, str(seed), self._crew.descriptors)
        self._began = time.monotonic()
        self._told = 0.0
        self._due: dict[str, float] = {}
        self._young: dict[Member, float] = {}

    def end(self) -> None:
        """End every process, whatever happened."""
        self._chores.kill()
        self._crew.kill_all()

    def play(self, events: int, kills: int) -> None:
        """Have so many events written, and so many processes killed meanwhile; then compare.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        self._replace(range(self._processes), self._processes)
        lost_index = [round(share * kills) for share in _INDEX_LOST]
        quiet = list(range(_QUIET_KILLS, kills, _QUIET_KILLS))
        killed = self._figures["kills"]
        while self._ledger.events < events or self._figures["kills"] - killed < kills:
            self._crew.look()
            self._chores.go_on()
            done = self._figures["kills"] - killed
            if lost_index and done >= lost_index[0]:
                lost_index.pop(0)
                self._lose_index()
            elif quiet and done >= quiet[0]:
                quiet.pop(0)
                self._be_quiet()
            elif (late := kills * min(1.0, self._ledger.events / events) - done) > 0:
                self._kill(late)
            self._disturb()
            if self._is_due("followers", _LAG_LOOK_S):
                self._crew.check_followers()
            self._tell()
            time.sleep(self._rng.uniform(0, _TICK_S))
        self._finish()

    # What happens to processes.

    def _kill(self, late: float) -> None:
        """Kill one, several or all, or tell one to end; sooner when `late` says that more kills are due."""
        now = time.monotonic()
        young = next((member for member, dies in self._young.items() if dies < now), None)
        if young is not None:
            del self._young[young]
            if young in self._crew.members:
                self._kill_and_replace([young])
        elif self._rng.random() < _HASTE * late:
            self._kill_some()

    def _kill_some(self) -> None:
        members = self._crew.members
        drawn = self._rng.random()
        if drawn < _ALL_AT_ONCE:
            self._kill_all()
        elif drawn < _ALL_AT_ONCE + _SOME_AT_ONCE:
            self._kill_and_replace(self._rng.sample(members, min(3, len(members))))
        elif drawn < _ALL_AT_ONCE + _SOME_AT_ONCE + _TOLD_TO_END:
            member = self._rng.choice(members)
            member.go_on()
            member.tell("stop")
            member.ending = True
        else:
            self._kill_and_replace([self._rng.choice(members)])

    def _kill_and_replace(self, victims: list[Member]) -> None:
        orphans = self._crew.kill(victims)
        self._replace(orphans, len(victims))

    def _replace(self, slots: Iterable[int], count: int) -> None:
        newcomers = [self._crew.begin() for _ in range(count)]
        self._crew.pass_on(slots, newcomers)
        for member in newcomers:
            if self._rng.random() < _DIES_YOUNG:
                # While it opens the store, recovers, takes over.
                self._young[member] = time.monotonic() + self._rng.uniform(0, _YOUNG_S)

    def _kill_all(self) -> None:
        """Kill all at once; what they left is looked at before anybody opens the store."""
        orphans = self._crew.kill(list(self._crew.members))
        self._figures["times all were killed"] += 1
        tasks = self._rng.sample(self._ledger.tasks, _LOOKED_AT)
        self._do(("a look at what dead processes left", partial(audit, self._path, self._ledger, tasks)))
        self._replace(orphans, self._processes)

    def _lose_index(self) -> None:
        """Delete the index while nobody has the store open."""
        orphans = self._crew.kill(list(self._crew.members))
        self._chores.settle(kill=True)
        self._delete_index()
        self._figures["indexes lost"] += 1
        self._replace(orphans, self._processes)

    def _disturb(self) -> None:
        """Stop a process for a while; have one do what a server does beside; have one give a slot to another."""
        member = self._rng.choice(self._crew.members)
        if self._is_due("stop", _STOP_PAUSE_S) and member.continues is None:
            member.stop(self._rng.uniform(0, _LONGEST_STOP_S))
            self._figures["processes stopped for a while"] += 1
        if self._is_due("work", _WORK_PAUSE_S) and not member.ending:
            work = self._rng.choice(("compact", "back-up"))
            member.tell(work)
            self._figures[f"times a writing process was told to {work}"] += 1
        if self._is_due("clock", _CLOCK_PAUSE_S):
            member.tell("clock", self._rng.randrange(CLOCK_BEHIND_MS))
            self._figures["times a clock was set"] += 1
        if self._is_due("hand over", _HAND_OVER_PAUSE_S):
            self._crew.hand_over()

    def _is_due(self, what: str, pause_s: float) -> bool:
        now = time.monotonic()
        due = self._due.setdefault(what, now + self._rng.expovariate(1 / pause_s))
        if now > due:
            del self._due[what]
        return now > due

    def _be_quiet(self) -> None:
        """Have nobody write until every follower has been shown everything.

        Raises:
            BrokenPromiseError: One is not.
        """
        self._crew.be_quiet(True)
        events = -1
        while self._crew.check_followers(_QUIET_S) or events != self._ledger.events:
            events = self._ledger.events
            time.sleep(_QUIET_LOOK_S)
            self._crew.look()
            self._chores.go_on()
            self._tell()
        self._crew.be_quiet(False)
        self._figures["times all followers had everything"] += 1

    # The end.

    def _finish(self) -> None:
        """End all processes, and compare everything.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        self._be_quiet()
        self._chores.settle(kill=True)
        self._crew.end()
        self._do(("verify in the end", partial(verify_whole, self._path)))
        self._audit(audit_opened)
        self._ledger.check_ids()
        self._delete_index()
        self._do(("reindex in the end", partial(make_index, self._path)))
        self._audit(audit)
        self._do(("verify of the new index", partial(verify_whole, self._path)))
        self._check_memory()

    def _delete_index(self) -> None:
        for suffix in SQLITE_FILES:
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def _do(self, *works: tuple[str, Callable[[], Counter[str]]]) -> None:
        """Do something in a process each, and wait for them."""
        forked = [Forked(name, self._folder / f"{name}.stderr", work, self._crew.descriptors()) for name, work in works]
        try:
            for process in forked:
                process.wait(PATIENCE_S)
                process.check()
                self._figures.update(process.counted())
        finally:
            for process in forked:
                process.kill()

    def _audit(self, how: Callable[[Path, Ledger, Iterable[int]], Counter[str]]) -> None:
        """Compare all streams, in as many processes as are of use."""
        parts = [self._ledger.tasks[part::_AUDITORS] for part in range(_AUDITORS)]
        before = self._figures[COMPARED]
        self._do(*((f"audit {n}", partial(how, self._path, self._ledger, part)) for n, part in enumerate(parts)))
        compared = self._figures[COMPARED] - before
        self._figures["events in the end, acknowledged or not"] = compared

    def _check_memory(self) -> None:
        """Check that no process has taken more than it should, whatever the number of events."""
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        for name, who in (("a process", resource.RUSAGE_CHILDREN), ("the campaign", resource.RUSAGE_SELF)):
            most_mib = resource.getrusage(who).ru_maxrss // unit
            self._figures[f"MiB that {name} took at most"] = most_mib
            if most_mib > _MOST_MIB:
                raise BrokenPromiseError(f"{name} took {most_mib} MiB of memory")

    def _tell(self) -> None:
        seconds = time.monotonic() - self._began
        if seconds > self._told + _TELL_S:
            self._told = seconds
            sys.stderr.write(f"{seconds:6.0f} s: {self._ledger.events:,} events, {self._figures['kills']} kills\n")
