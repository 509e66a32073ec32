"""One thing that the mutation campaign takes out of the durability code, and the proofs of which one must fail then."""

from __future__ import annotations

from typing import Final, NamedTuple

Proof = tuple[str, ...]
"""A campaign, `("crash", name, …options)`, or what pytest is to run."""


class Mutation(NamedTuple):
    """One thing that is taken out.

    Attributes:
        name: What is missing then.
        file: Below `logstore/`.
        old: Text that stands there once.
        new: What takes its place.
        proofs: One of them must fail; the likeliest first.
    """

    name: str
    file: str
    old: str
    new: str
    proofs: tuple[Proof, ...]


POWER: Final[Proof] = ("crash", "power", "--runs", "60")
DAMAGE: Final[Proof] = ("crash", "damage", "--runs", "40")
PROCESSES: Final[Proof] = ("crash", "processes", "--events", "20000", "--kills", "6")


def tests(*names: str) -> Proof:
    """Return a proof of files with tests."""
    return tuple(f"tests/{name}.py" for name in names)


CUTS: Final = tests("test_power_cuts")
