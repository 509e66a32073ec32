"""How long operations say how far they are."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""Called now and then with what is being done, how much of it is, and how much there is (None: not known)."""


def silent(what: str, done: int, total: int | None) -> None:
    """Say nothing."""
