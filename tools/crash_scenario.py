"""Work on a store that a campaign interrupts: what each kind of it needs, and what it is held to."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from crash_calls import DiskCall, Fate, run_watched
from crash_examine import check_opened, check_unopened
from crash_kill import BrokenPromiseError
from crash_life import EndedError, Hand, Job, Life, live
from crash_told import Told
from logstore.ops.access import open_existing
from logstore.storage import LogOptions
from logstore.storage.opening import OpenStore

DEADLINE_S: Final = 60.0
KIB: Final = 1 << 10
ACT: Final = 100
"""Number of the life that is interrupted."""
VARIATIONS: Final = 6
"""After which the options are the same again."""
_MODES: Final = ("always", "interval", "os")
_POLICIES: Final = ("degrade", "raise")


def catalogue(folder: Path) -> Path:
    """Return the path of the store in the folder of a scenario."""
    return folder / "store" / "events.db"


class Scenario:
    """Work on a store that is interrupted.

    Args:
        folder: Where the store that it begins with is made.
        seed: What everything is drawn from, but for ids and times.
        variation: Which of its variations.

    Attributes:
        name: What it is called.
        told: What is known of the store that it begins with.
        prepared: The folder of that.
    """

    name: ClassVar[str]

    def __init__(self, folder: Path, seed: int, variation: int) -> None:
        self.told = Told()
        self.prepared = folder
        self.variation = variation
        self.rng = random.Random(f"{seed} {self.name} {variation}")
        shutil.rmtree(folder, ignore_errors=True)
        catalogue(folder).parent.mkdir(parents=True)
        self.prepare()

    def prepare(self) -> None:
        """Make the store that it begins with."""
        raise NotImplementedError

    def act(self, folder: Path, hand: Hand) -> None:
        """Do the work, in a child, on a copy of the store."""
        raise NotImplementedError

    def examine(self, folder: Path, told: Told) -> int:
        """Look at what is left; return how many events were compared.

        Raises:
            BrokenPromiseError: With what is wrong.
        """
        check_unopened(catalogue(folder), told, may_refuse=self.may_refuse(told))
        return check_opened(catalogue(folder), told)

    def may_refuse(self, told: Told) -> bool:
        """Whether who only looks may be refused before somebody opens the store."""
        return False

    # What they share.

    def options(self, **changes: Any) -> LogOptions:
        """Return options that differ from one variation to the next."""
        chosen: dict[str, Any] = {
            "durability": _MODES[self.variation % 3],
            "on_write_failure": _POLICIES[self.variation // 3 % 2],
            "sync_interval_s": 0.01,
            "segment_bytes": 64 * KIB,
            "memory_bytes": 8 << 20,
            "cached_events_per_stream": 10,
        }
        return LogOptions(**{**chosen, **changes})

    def life(self, number: int, rounds: Sequence[Sequence[int]], **changes: Any) -> Life:
        """Return a life whose streams are drawn by the scenario."""
        options = changes.pop("options", None) or self.options()
        return Life(number, options, rounds, seed=self.rng.randrange(1 << 30), **changes)

    def live_once(self, life: Life) -> None:
        """Have a life before the one that is interrupted."""
        asyncio.run(live(catalogue(self.prepared), Hand(self.told.hear), life))

    def die_once(self, life: Life, first: Job | None = None) -> None:
        """Have a life whose process is killed at its end."""
        path = catalogue(self.prepared)

        def act(say: Callable[[str], None]) -> None:
            hand = Hand(say)
            hand.watch()
            asyncio.run(live(path, hand, life, first=first, end=lambda: os.kill(os.getpid(), signal.SIGKILL)))

        status = run_watched(act, _Bystander(self.told), self.prepared, DEADLINE_S)
        if status != -signal.SIGKILL or self.told.odd:
            raise BrokenPromiseError(f"the life before ended with {status}: {self.told.odd}")


class _Bystander:
    """Hears what is said, and lets all calls go."""

    reads = False
    listens = False

    def __init__(self, told: Told) -> None:
        self._told = told

    def call(self, call: DiskCall) -> Fate:
        """Let it go."""
        return "go"

    def word(self, line: str) -> None:
        """Pass it on."""
        self._told.hear(line)


def with_store(folder: Path, hand: Hand, jobs: Sequence[Callable[[OpenStore], object]]) -> None:
    """Do work on the open files of a store, as a command does."""
    store = open_existing(catalogue(folder))
    hand.begin()
    with contextlib.suppress(EndedError):
        for job in jobs:
            hand.do(functools.partial(job, store))
    hand.mend()
    with hand.closing():
        store.close(empty=True)
