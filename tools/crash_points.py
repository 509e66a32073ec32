"""The points campaign: a process is killed at every change of its disk in turn, and what it leaves is examined."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from crash_calls import DiskCall, Fate
from crash_kill import BrokenPromiseError
from crash_life import Until
from crash_trials import CallJudge, Trials, is_change, named


class KillPoint(NamedTuple):
    """Which change of the disk a process does not live to see, and whether some pages of that write are done."""

    at: int
    tears: bool

    @property
    def until(self) -> Until | None:
        """No fault lasts."""
        return None

    def __str__(self) -> str:
        """Name it."""
        return f"{self.at}/tear" if self.tears else str(self.at)


def parse(name: str) -> KillPoint:
    """Return the point of a name."""
    at, _, tears = name.partition("/")
    return KillPoint(int(at), bool(tears))


def places(calls: list[DiskCall]) -> list[KillPoint]:
    """Return every point of some work."""
    changes = [call for call in calls if is_change(call)]
    points = [KillPoint(at, False) for at in range(1, len(changes) + 1)]
    return points + [KillPoint(at, True) for at, call in enumerate(changes, 1) if call.tearable]


class Killer:
    """Kills at the n-th change."""

    def __init__(self, point: KillPoint) -> None:
        self._point = point
        self._changes = 0
        self.killed: DiskCall | None = None

    def call(self, call: DiskCall) -> Fate:
        """Count a change."""
        self._changes += is_change(call)
        if not is_change(call) or self._changes != self._point.at:
            return "go"
        self.killed = call
        return "tear" if self._point.tears and call.tearable else "kill"

    def mend(self) -> None:
        """There is nothing to mend."""


class PointsCampaign:
    """Kills at every change of the disk.

    Args:
        folder: Where the stores go.
        seed: What everything is drawn from; where threads meet the clock has its say, too.
        only: One point, such as `compaction/2/57` or `compaction/2/57/tear`; one scenario, such as `compaction`; empty
            for all in turn.

    Attributes:
        figures: What was done.
    """

    def __init__(self, folder: Path, seed: int, only: str = "") -> None:
        self._seed = seed
        self._trials = Trials(folder, seed, only, places, parse, reads=False)
        self.figures: Counter[str] = Counter()

    def run(self, number: int) -> None:
        """Kill at one point, and examine what is left.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        trial = self._trials.next(number)
        copy, told = self._trials.copied(trial.scenario)
        killer = Killer(trial.place)
        with named("points", self._seed, trial, told):
            status = self._trials.do(trial.scenario, copy, CallJudge(told, killer, reads=False), None)
            if status != (-signal.SIGKILL if killer.killed else 0):
                raise BrokenPromiseError(f"it ended with {status}")
            self.figures["events compared"] += trial.scenario.examine(copy, told)
        self._count(trial.scenario.name, killer.killed, trial.place)

    def _count(self, scenario: str, killed: DiskCall | None, point: KillPoint) -> None:
        if killed is None:
            # A thread was faster this time.
            self.figures["points that were not reached"] += 1
            return
        self.figures["kills"] += 1
        self.figures[f"kills in {scenario}"] += 1
        self.figures["kills in the middle of a write"] += point.tears and killed.tearable
        self.figures["kills at a call of SQLite"] += "/events.db" in killed.path

    def finish(self) -> None:
        """Tell how many points there were."""
        self.figures.update(self._trials.figures)
