"""One scenario after another, each interrupted at one place of its work after another, on copies of its store."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

from crash_calls import DiskCall, Fate, HangsError, is_supported, run_watched
from crash_kill import BrokenPromiseError
from crash_life import EndedError, Hand, Until
from crash_scenario import DEADLINE_S, VARIATIONS, Scenario
from crash_scenarios import SCENARIOS
from crash_told import Told

_LINES: Final = 12
"""Of a traceback, say."""
_CHANGES: Final = frozenset(("create", "write", "extend", "sync", "rename", "unlink", "mkdir"))


class Interruption(Protocol):
    """Where and how the work is interrupted; `str` of it is how a command line names it."""

    @property
    def until(self) -> Until | None:
        """How long a fault lasts; None for a kill."""
        ...


class Interrupter(Protocol):
    """Judges the calls of one life."""

    def call(self, call: DiskCall) -> Fate:
        """Decide over the next call that counts."""
        ...

    def mend(self) -> None:
        """Let all calls go from here on."""
        ...


class CallJudge:
    """Counts the calls from where the work begins, and passes on what is told.

    Args:
        told: Who hears it.
        interrupter: Who decides; None to let all go.
        reads: Whether calls that only read are counted.

    Attributes:
        reads: As given.
        listens: Whether the work has begun.
        calls: What was counted.
    """

    def __init__(self, told: Told, interrupter: Interrupter | None = None, *, reads: bool) -> None:
        self._told = told
        self._interrupter = interrupter
        self.reads = reads
        self.listens = False
        self.calls: list[DiskCall] = []

    def call(self, call: DiskCall) -> Fate:
        """Count a call and ask."""
        self.calls.append(call)
        return "go" if self._interrupter is None else self._interrupter.call(call)

    def word(self, line: str) -> None:
        """Pass on a line."""
        self._told.hear(line)
        self.listens = "begin" in self._told.words
        if self._interrupter is not None and "mend" in self._told.words:
            self._interrupter.mend()


_I = TypeVar("_I", bound=Interruption)


class Trial(Generic[_I]):
    """One interruption of one scenario."""

    def __init__(self, scenario: Scenario, place: _I) -> None:
        self.scenario = scenario
        self.place = place

    def __str__(self) -> str:
        """Name it as `--only` takes it."""
        return f"{self.scenario.name}/{self.scenario.variation}/{self.place}"


def is_change(call: DiskCall) -> bool:
    """Whether a call changes something on disk."""
    return call.kind in _CHANGES


class Trials(Generic[_I]):
    """Chooses what is interrupted where.

    Args:
        folder: Where the stores go.
        seed: What everything is drawn from.
        only: Name of a scenario, of its variation, or of one trial: `backup`, `backup/2`, `backup/2/57`; empty for all.
        places: Lists the interruptions of some work, by the calls that it makes when nothing interrupts it.
        parse: Reads an interruption's name.
        reads: Whether calls that only read can be interrupted.
        turn: After how many places the next variation has its turn; 0 after all of them.

    Attributes:
        figures: How many places there were in all, by scenario.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        only: str,
        places: Callable[[list[DiskCall]], list[_I]],
        parse: Callable[[str], _I],
        *,
        reads: bool,
        turn: int = 0,
    ) -> None:
        if not is_supported():
            raise SystemExit("this campaign stops the system calls of a process: it needs Linux on x86-64 or ARM64")
        # Warnings are of the trade here.
        logging.getLogger("logstore").setLevel(logging.ERROR)
        self._folder = folder
        self._seed = seed
        name, _, rest = only.partition("/")
        variation, _, place = rest.partition("/")
        self._kinds = [kind for kind in SCENARIOS if name in ("", kind.name)]
        if not self._kinds:
            raise SystemExit(f"there is no scenario {name}: {', '.join(kind.name for kind in SCENARIOS)}")
        self._first = int(variation or 0)
        self._place = parse(place) if place else None
        self._places = places
        self._reads = reads
        self._turn = turn
        self._left: dict[tuple[str, int], list[_I]] = {}
        self._taken: Counter[str] = Counter()
        self._scenarios: dict[str, Scenario] = {}
        self.figures: Counter[str] = Counter()

    def next(self, number: int) -> Trial[_I]:
        """Return the trial of a run."""
        kind = self._kinds[number % len(self._kinds)]
        scenario = self._scenarios.get(kind.name)
        if self._place is not None:
            return Trial(scenario or self._prepare(kind, self._first), self._place)
        taken = self._taken[kind.name] = self._taken[kind.name] + 1
        if scenario is None:
            scenario = self._begin(kind, self._first)
        elif not self._left[kind.name, scenario.variation] or (self._turn and taken % self._turn == 0):
            scenario = self._begin(kind, self._variation_after(scenario))
        return Trial(scenario, self._left[kind.name, scenario.variation].pop())

    def _variation_after(self, scenario: Scenario) -> int:
        after = scenario.variation + 1
        return after % VARIATIONS if self._turn else after

    def _prepare(self, kind: type[Scenario], variation: int) -> Scenario:
        scenario = kind(self._folder / kind.name, self._seed, variation)
        self._scenarios[kind.name] = scenario
        return scenario

    def _begin(self, kind: type[Scenario], variation: int) -> Scenario:
        """Begin a variation, or go on with it; where it can be interrupted tells a life that nothing interrupts."""
        scenario = self._prepare(kind, variation)
        if self._left.get((kind.name, variation)):
            return scenario
        copy, told = self.copied(scenario)
        judge = CallJudge(told, reads=self._reads)
        status = self.do(scenario, copy, judge, None)
        if status or told.odd:
            raise BrokenPromiseError(f"{kind.name}/{variation} ends with {status} by itself: {told.odd}")
        scenario.examine(copy, told)
        places = self._places(judge.calls)
        random.Random(f"{self._seed} {kind.name} {variation}").shuffle(places)
        self._left[kind.name, variation] = places
        self.figures[f"places in {kind.name}"] += len(places)
        return scenario

    def copied(self, scenario: Scenario) -> tuple[Path, Told]:
        """Return a copy of the store that a scenario begins with, and of what is known of it."""
        copy = self._folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(scenario.prepared, copy)
        return copy, scenario.told.copy()

    def do(self, scenario: Scenario, copy: Path, judge: CallJudge, until: Until | None) -> int:
        """Have a child do the work of a scenario; return how it ended.

        Raises:
            BrokenPromiseError: It hangs.
        """

        def work(say: Callable[[str], None]) -> None:
            hand = Hand(say, until)
            hand.watch()
            with contextlib.suppress(EndedError):
                scenario.act(copy, hand)

        try:
            return run_watched(work, judge, copy, DEADLINE_S)
        except HangsError as error:
            raise BrokenPromiseError("it hangs") from error


@contextlib.contextmanager
def named(campaign: str, seed: int, trial: Trial[_I], told: Told) -> Generator[None]:
    """Say of a broken promise which trial broke it, what was told, and how it is repeated.

    Raises:
        BrokenPromiseError: With all that.
    """
    try:
        yield
        if told.odd:
            raise BrokenPromiseError("what must not be said at all")
    except Exception as error:
        # Whatever the store raises where it is only looked at, it should not.
        problem = error if isinstance(error, BrokenPromiseError) else repr(error)
        told_last = "".join(f"\n  {line}" for line in (*told.errors[-3:], *told.odd[-_LINES:]))
        again = f"python tools/crash.py {campaign} --runs 1 --seed {seed} --only {trial}"
        raise BrokenPromiseError(f"{trial}: {problem}{told_last}\nthis one alone:  {again}") from error
