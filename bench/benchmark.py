"""One benchmark: what is measured, and what must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.claims import Claim, Verdict
from bench.turns import Round, Task

Draw = Callable[[list[Round], Path], list[Path]]
"""Draws pictures of the rounds into a folder and returns their paths."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: The module's.
        title: What is measured, in a sentence.
        tasks: Returns the tasks by name, those of a quick run or those of a full one.
        claims: What must hold, meant for a full run.
        quick_rounds: Turns in a quick run of the tasks that a claim needs.
        full_rounds: The same in a full run.
        draw: Draws the results.
    """

    name: str
    title: str
    tasks: Callable[[bool], Mapping[str, Task]]
    claims: Sequence[Claim] = ()
    quick_rounds: int = 1
    full_rounds: int = 3
    draw: Draw | None = None

    def rounds(self, tasks: Mapping[str, Task], full: bool, asked: int | None) -> dict[str, int]:
        """Return how many turns each task has; those that no claim needs have one less.

        Args:
            tasks: Those that are run.
            full: Whether the run is a full one.
            asked: The number that the user asked for, if any.
        """
        most = asked or (self.full_rounds if full else self.quick_rounds)
        needed = {name for claim in self.claims for name in claim.tasks}
        return {name: most if name in needed else max(1, most - 1) for name in tasks}

    def verdicts(self, rounds: Sequence[Round]) -> list[Verdict]:
        """Return what became of each claim."""
        return [Verdict(claim, claim.values(rounds)) for claim in self.claims]
