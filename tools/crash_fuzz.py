"""The fuzz campaign: everything that reads bytes from disk, or from a client, is fed what nobody would write.

Inputs are valid samples made by the real writers, damaged at random; or forged: built field by field from values that
do harm, with checksums that match, as an attacker would who knows the format. Each is drawn from the seed, the parser
and its number alone.

What must hold: a parser takes an input or refuses it with an error of this project; within its time and memory; and
what it takes after damage is what was written.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from crash_fuzz_feeding import TOLD, Failure, draw, feed
from crash_fuzz_files import FILE_TARGETS
from crash_fuzz_http import HTTP_TARGETS
from crash_fuzz_imports import IMPORT_TARGETS
from crash_fuzz_inputs import Target
from crash_fuzz_lanes import LANE_TARGETS
from crash_fuzz_names import NAME_TARGETS
from crash_fuzz_peers import PEER_TARGETS
from crash_fuzz_records import RECORD_TARGETS
from crash_fuzz_settings import SETTING_TARGETS
from crash_fuzz_stores import STORE_TARGETS
from crash_kill import BrokenPromiseError

TARGETS: Final[Mapping[str, type[Target]]] = {
    target.name: target
    for target in (
        *FILE_TARGETS,
        *LANE_TARGETS,
        *RECORD_TARGETS,
        *IMPORT_TARGETS,
        *NAME_TARGETS,
        *PEER_TARGETS,
        *HTTP_TARGETS,
        *SETTING_TARGETS,
        *STORE_TARGETS,
    )
}
ALL: Final = "all"


class FuzzCampaign:
    """Feeds one parser after another.

    Args:
        folder: Where inputs that break something are kept.
        seed: What everything is drawn from.
        inputs: How many a run, of a parser that is quick.
        first: Number of the first input, to repeat one.
        target: Name of the parser, or `all`.

    Attributes:
        figures: Counts for the report.
    """

    def __init__(self, folder: Path, seed: int, inputs: int = 2_000, first: int = 0, target: str = ALL) -> None:
        if target != ALL and target not in TARGETS:
            raise SystemExit(f"there is no parser {target!r}; there are {', '.join((ALL, *TARGETS))}")
        self.figures: Counter[str] = Counter(inputs=0)
        self._folder = folder
        self._seed = seed
        self._inputs = inputs
        self._first = first
        self._names = list(TARGETS) if target == ALL else [target]
        self._seconds: dict[str, float] = {}
        self._broken: list[str] = []

    def run(self, number: int) -> None:
        """Feed the next parser; what it breaks is told at the end, when the others were fed too."""
        name = self._names[number % len(self._names)]
        count = int(self._inputs * TARGETS[name].share) or int(len(self._names) == 1)
        if not count:
            # Too slow for so short a campaign.
            return
        started = time.monotonic()
        outcome = feed(TARGETS[name], self._seed, self._first + number // len(self._names) * count, count)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started
        self.figures["inputs"] += count
        self.figures[f"{name}: taken"] += outcome.taken
        self.figures[f"{name}: refused"] += outcome.refused
        fed = self.figures[f"{name}: taken"] + self.figures[f"{name}: refused"]
        self.figures[f"{name}: a second"] = round(fed / self._seconds[name])
        if outcome.failures:
            self.figures[f"{name}: failures"] += len(outcome.failures)
            self._broken.append(self._told(name, outcome.failures))

    def finish(self) -> None:
        """Tell what was broken.

        Raises:
            BrokenPromiseError: A promise was.
        """
        if self._broken:
            raise BrokenPromiseError("\n\n".join(self._broken))

    def _told(self, name: str, failures: list[Failure]) -> str:
        lines = [f"{name}: {len(failures)} inputs broke something"]
        told: Counter[str] = Counter()
        self._folder.mkdir(parents=True, exist_ok=True)
        for failure in failures:
            told[failure.kind] += 1
            if told[failure.kind] > TOLD:
                continue
            place = self._folder / f"{name}-{failure.number}.input"
            with contextlib.closing(TARGETS[name]()) as target:
                given = draw(target, self._seed, failure.number)
            place.write_bytes(given.data)
            lines += [
                "",
                f"input {failure.number}: {failure.text.strip()}",
                f"{len(given.data)} bytes, in {place}; forged: {given.forged}; told: {given.numbers}",
                f"again: python tools/crash.py fuzz --seed {self._seed} --target {name} --first {failure.number} "
                "--inputs 1 --runs 1",
            ]
        lines += [f"{count} times: {kind}" for kind, count in told.most_common()]
        return "\n".join(lines)
