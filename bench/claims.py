"""What must hold: a figure, or the ratio of two that were measured in the same round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tabulate import tabulate

from bench.turns import Place, Round


@dataclass(frozen=True)
class Claim:
    """A bound on a figure.

    Attributes:
        words: What is bounded.
        of: The figure.
        relation: Whether it must not exceed the bound, or reach it.
        must: The bound that must hold.
        goal: The bound that is aimed at, None when it is the same.
        to: What the figure is divided by, None for the figure itself.
    """

    words: str
    of: Place
    relation: Literal["<=", ">="]
    must: float
    goal: float | None = None
    to: Place | None = None

    @property
    def tasks(self) -> set[str]:
        """The tasks that it needs."""
        return {place.task for place in (self.of, self.to) if place is not None}

    def values(self, rounds: Sequence[Round]) -> list[float]:
        """Return what was measured, one value a round in which all of it was."""
        found: list[float] = []
        for results in rounds:
            value = self.of.value(results)
            base = 1.0 if self.to is None else self.to.value(results)
            if value is not None and base is not None:
                found.append(value / base)
        return found

    def holds(self, value: float, bound: float) -> bool:
        """Whether a value is within a bound."""
        return value <= bound if self.relation == "<=" else value >= bound


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: The claim.
        values: What was measured, one value a round; none when it could not be.
    """

    claim: Claim
    values: list[float]

    @property
    def value(self) -> float | None:
        """The median over the rounds, None when nothing was measured."""
        return statistics.median(self.values) if self.values else None

    @property
    def word(self) -> str:
        """Whether it holds: `yes`, `goal` when the goal is reached as well, `NO`, or `not measured`."""
        if self.value is None:
            return "not measured"
        if not self.claim.holds(self.value, self.claim.must):
            return "NO"
        goal = self.claim.goal
        return "goal" if goal is not None and self.claim.holds(self.value, goal) else "yes"


def claims_table(verdicts: Sequence[Verdict]) -> str:
    """Return what must hold, and whether it does."""
    rows = [
        [
            verdict.claim.words,
            f"{verdict.claim.relation} {verdict.claim.must:,g}",
            "" if verdict.claim.goal is None else f"{verdict.claim.relation} {verdict.claim.goal:,g}",
            "" if verdict.value is None else shown(verdict.value),
            "" if not verdict.values else f"{shown(min(verdict.values))} to {shown(max(verdict.values))}",
            verdict.word,
        ]
        for verdict in verdicts
    ]
    return tabulate(rows, headers=["", "must be", "goal", "is", "in the rounds", "holds"], disable_numparse=True)


def shown(value: float) -> str:
    """Return a figure in three digits or more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
