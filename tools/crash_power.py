"""The power campaign: the power is cut at a random call to the disk, and what may be left is opened.

A store lives several lives. In each it is opened, used, and the power is cut, now and then while it is only being
recovered from the cut before; in one of the states that the device may be left in the next life begins. Others are
looked at and thrown away. Some lives end with a kill, which leaves what the system has. What must be there follows from
what the store said.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Final

from crash_disk import CATALOGUE_FATES, CatalogueFate, Omitted, PowerDisk
from crash_kill import BrokenPromiseError
from crash_power_ledger import Ledger
from crash_power_life import Cut, Killed, Life, World
from logstore.errors import LogstoreError
from logstore.storage.opening import log_folder
from logstore.storage.replacement import is_replacing

_MOST_LIVES: Final = 4
_CUTS_A_LIFE: Final = 2
_MORE_THAN_A_CUT: Final = 0.3
_KILLED: Final = 0.3
_CATALOGUE: Final = "events.db"
_MOMENTS: Final = (
    ("sync", "*.journal"),
    ("sync", "*.segment"),
    ("sync", "registry.log"),
    ("sync", "lanes/*/state"),
    ("sync_folder", "segments"),
    ("sync_folder", "lanes/*"),
    ("sync_folder", "disk"),
    ("unlink", "*.journal"),
    ("unlink", "*.segment"),
    ("rename", "*"),
    ("*", "replac*"),
)
"""Calls before which something is on its way that a cut may take."""


class PowerCampaign:
    """Lets stores live, and cuts their power.

    Args:
        folder: Where the stores go.
        seed: What everything is drawn from; how the threads of a store take turns is not.
        omit: Syncs that the disk does not do, to see that their lack is found.

    Attributes:
        figures: Counts for the report.
    """

    def __init__(self, folder: Path, seed: int, omit: Iterable[Omitted] = ()) -> None:
        self.figures: Counter[str] = Counter()
        self._folder = folder
        self._seed = seed
        self._omit = tuple(omit)

    def run(self, number: int) -> None:
        """Let one store live several lives.

        Raises:
            BrokenPromiseError: A promise was broken. The store is kept, and beside it where the power was cut, and
                what it did to the disk since.
        """
        rng = random.Random(f"{self._seed} {number}")
        home = self._folder / f"{number:05d}"
        place = home / "0" / "disk"
        place.mkdir(parents=True)
        world, disk = World([Ledger()], {}), self._disk(place)
        for life in range(1, rng.randint(2, _MOST_LIVES)):
            heir = home / f"{life}" / "disk"
            heir.parent.mkdir()
            is_killed = rng.random() < _KILLED
            cuts, killed = self._live(rng, disk, world, rng.randint(0, 25), _CUTS_A_LIFE, heir if is_killed else None)
            for look, cut in enumerate(cuts):
                self._look(rng, cut, home / f"{life}-{look}")
            if killed is not None:
                disk, world = killed
            else:
                world = self._leave(rng, rng.choice(cuts), heir)
                disk = self._disk(heir)
        self._live(rng, disk, world, 5)
        shutil.rmtree(home)

    def finish(self) -> None:
        """Nothing is left to be looked at."""

    def _disk(self, place: Path) -> PowerDisk:
        return PowerDisk(place, place / _CATALOGUE, self._omit)

    def _live(
        self, rng: random.Random, disk: PowerDisk, world: World, steps: int, cuts: int = 0, heir: Path | None = None
    ) -> tuple[list[Cut], Killed | None]:
        """Live one life; return its power cuts, and its end. Without any the store is closed, and verified."""
        life = Life(rng, disk.home / _CATALOGUE, world, self.figures, disk)
        for _ in range(cuts):
            kind = rng.random()
            if kind < 0.4:
                disk.cut_at(int(2 ** rng.uniform(0, 9)), life.note_cut)
            elif kind < 0.6:
                # While it is being opened.
                disk.cut_at(rng.randint(1, 80), life.note_cut)
            else:
                disk.cut_at(rng.randint(1, 8), life.note_cut, *rng.choice(_MOMENTS))
        with _every_error_breaks_a_promise(life, disk):
            killed = asyncio.run(life.live(steps, cuts, heir))
            if not cuts and (findings := life.verify()):
                raise BrokenPromiseError(f"verify says: {findings[:3]}")
        self.figures["lives"] += 1
        self.figures["power cuts"] += len(life.cuts)
        return life.cuts, killed

    def _leave(self, rng: random.Random, cut: Cut, place: Path) -> World:
        """Make one of the states that a power cut may leave; return what must be in it."""
        fate: CatalogueFate = rng.choice(CATALOGUE_FATES) if rng.random() < _MORE_THAN_A_CUT else "kept"
        self.figures[f"states with the index {fate}"] += 1
        world = cut.world.copy()
        world.has_notes &= fate == "kept"
        place.with_name("cut.txt").write_text(f"before call {cut.power.call}, {cut.place}; index {fate}\n")
        path = cut.power.leave(rng, place, catalogue=fate)
        # While one store takes the place of another, `verify` says so and looks at neither.
        if world.has_notes and rng.random() < 0.3 and path.exists() and not is_replacing(log_folder(path)):
            disk = self._disk(place)
            life = Life(rng, path, world, self.figures, disk)
            with _every_error_breaks_a_promise(life, disk):
                if findings := life.verify():
                    raise BrokenPromiseError(f"verify says, before it is opened: {findings[:3]}")
        return world

    def _look(self, rng: random.Random, cut: Cut, place: Path) -> None:
        """Open one of the states that a power cut may leave, and use it a little."""
        place.mkdir()
        world = self._leave(rng, cut, place / "disk")
        self._live(rng, self._disk(place / "disk"), world, 3)
        shutil.rmtree(place)


@contextlib.contextmanager
def _every_error_breaks_a_promise(life: Life, disk: PowerDisk) -> Generator[None]:
    """Take every error for a broken promise: the disk never refuses, and nothing is damaged."""
    logger = logging.getLogger("logstore")
    logger.addHandler(life.errors)
    try:
        yield
        if logged := life.logged():
            raise BrokenPromiseError("errors were logged:\n" + "\n".join(logged))
    except (LogstoreError, OSError, sqlite3.Error, AssertionError, BrokenPromiseError) as error:
        calls = (f"{number} {call} {path}\n" for number, (call, path) in enumerate(disk.made, 1))
        disk.home.with_name("calls.txt").write_text("".join(calls))
        reason = str(error) if isinstance(error, BrokenPromiseError) else repr(error)
        raise BrokenPromiseError(f"{disk.home}: {reason}") from error
    finally:
        logger.removeHandler(life.errors)
