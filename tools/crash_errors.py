"""The errors campaign: every system call on the store's files fails in turn, once or from then on, and life goes on."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path
from typing import Final, NamedTuple, get_args

from crash_calls import DiskCall, Fate, Kind
from crash_kill import BrokenPromiseError
from crash_life import Until
from crash_trials import CallJudge, Trials, is_change, named

SHORT: Final = "short"
_EIO, _ENOSPC = "EIO", "ENOSPC"
_FAULTS: Final[dict[Kind, tuple[str, ...]]] = {
    "read": (_EIO,),
    "open": (_EIO,),
    "create": (_EIO, _ENOSPC),
    "write": (_EIO, _ENOSPC),
    "extend": (_EIO, _ENOSPC),
    "sync": (_EIO, _ENOSPC),
    "rename": (_EIO, _ENOSPC),
    "unlink": (_EIO,),
    "mkdir": (_EIO, _ENOSPC),
}
_NEEDS_ROOM: Final = frozenset(("create", "write", "extend", "mkdir"))
"""What fails on a full disk; files can be removed from it, and what has room be synced."""
_TURN: Final = 60
"""There are thousands of faults in each variation of a scenario: all variations have their turn within an hour."""
_TRUSTED_ONCE: Final = (".journal", ".segment", ".tmp", "registry.log")
"""Ends of the names of files that are given up when a sync fails: the next one would succeed and mean nothing."""


class Fault(NamedTuple):
    """Which call fails, how, and how long."""

    at: int
    error: str
    until: Until

    def __str__(self) -> str:
        """Name it."""
        return f"{self.at}/{self.error}/{self.until}"


def parse(name: str) -> Fault:
    """Return the fault of a name."""
    at, error, until = name.split("/")
    return Fault(int(at), error, next(each for each in get_args(Until) if each == until))


def places(calls: list[DiskCall]) -> list[Fault]:
    """Return every fault of every call of some work."""
    return [
        Fault(at, error, until)
        for at, call in enumerate(calls, 1)
        for error in (*_FAULTS[call.kind], *([SHORT] if call.tearable else []))
        for until in get_args(Until)
    ]


class Failing:
    """Has the n-th call fail, and, if the fault lasts, those after it.

    Attributes:
        failed: The call that failed first.
        injected: How many failed.
        wrongs: Files that were synced again after a sync had failed.
    """

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._calls = 0
        self._lasts = False
        self._mended = False
        self._own: set[str] = set()
        self._given_up: set[str] = set()
        self.failed: DiskCall | None = None
        self.injected = 0
        self.wrongs: list[str] = []

    def call(self, call: DiskCall) -> Fate:
        """Count a call, and decide."""
        self._calls += 1
        fate = self._fate(call)
        if isinstance(fate, int):
            self.injected += 1
        self._watch_syncs(call, failed=isinstance(fate, int))
        return fate

    def _fate(self, call: DiskCall) -> Fate:
        if self._calls == self._fault.at:
            self.failed = call
            self._lasts = self._fault.until != "once" and not self._mended
            if self._fault.error == SHORT and call.tearable:
                self.injected += 1
                return "short"
            # Where threads meet it may be another call than the one that the fault was meant for.
            return self._errno if self._fault.error in _FAULTS[call.kind] else errno.EIO
        return self._errno if self._lasts and self._is_hit(call) else "go"

    @property
    def _errno(self) -> int:
        return errno.EIO if self._fault.error == _EIO else errno.ENOSPC

    def _is_hit(self, call: DiskCall) -> bool:
        """Whether a call fails while the fault lasts."""
        if self._fault.error != _EIO:
            return call.kind in _NEEDS_ROOM
        if self.failed is not None and not is_change(self.failed):
            # A place that cannot be read: another one can.
            return call.path == self.failed.path and call.kind == self.failed.kind
        return is_change(call)

    def _watch_syncs(self, call: DiskCall, *, failed: bool) -> None:
        """Note who syncs a file of its own again after that has failed."""
        path = call.path
        if call.kind in ("create", "rename"):
            self._own.add(path)
        if call.kind in ("create", "rename", "open"):
            # Or it is read again from the device, where recovery drops the cache behind its sync.
            self._given_up.discard(path)
        elif call.kind == "sync" and path.endswith(_TRUSTED_ONCE) and path in self._own:
            if path in self._given_up:
                self.wrongs.append(Path(path).name)
            if failed:
                self._given_up.add(path)

    def mend(self) -> None:
        """Have everything work from here on."""
        self._mended = True
        self._lasts = False


class ErrorsCampaign:
    """Has every call on the store's files fail.

    Args:
        folder: Where the stores go.
        seed: What everything is drawn from; where threads meet the clock has its say, too.
        only: One fault, such as `backup/0/57/ENOSPC/mended`; one scenario, such as `backup`; empty for all in turn.

    Attributes:
        figures: What was done.
    """

    def __init__(self, folder: Path, seed: int, only: str = "") -> None:
        self._seed = seed
        self._trials = Trials(folder, seed, only, places, parse, reads=True, turn=_TURN)
        self.figures: Counter[str] = Counter()

    def run(self, number: int) -> None:
        """Inject one fault, see that the process deals with it, and examine what it leaves.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        trial = self._trials.next(number)
        copy, told = self._trials.copied(trial.scenario)
        failing = Failing(trial.place)
        with named("errors", self._seed, trial, told):
            status = self._trials.do(trial.scenario, copy, CallJudge(told, failing, reads=True), trial.place.until)
            if status:
                raise BrokenPromiseError(f"it ended with {status}")
            if failing.wrongs:
                raise BrokenPromiseError(f"synced again after a failed sync: {failing.wrongs}")
            if told.odd:
                raise BrokenPromiseError("it did not deal with the error")
            self.figures["events compared"] += trial.scenario.examine(copy, told)
        self._count(trial.scenario.name, failing, trial.place)
        self.figures["errors that were told"] += len(told.errors)

    def _count(self, scenario: str, failing: Failing, fault: Fault) -> None:
        if failing.failed is None:
            # A thread was faster this time.
            self.figures["faults that were not reached"] += 1
            return
        self.figures["faults"] += 1
        self.figures["calls that failed"] += failing.injected
        self.figures[f"faults in {scenario}"] += 1
        self.figures[f"faults of {fault.error}"] += 1
        self.figures[f"faults that lasted, {fault.until}"] += 1
        self.figures["faults at a call of SQLite"] += "/events.db" in failing.failed.path

    def finish(self) -> None:
        """Tell how many places there were."""
        self.figures.update(self._trials.figures)
