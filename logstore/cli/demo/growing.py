"""Lists that grow while somebody waits for them."""

from __future__ import annotations

import asyncio
from typing import Final, Generic, TypeVar

_T = TypeVar("_T")

_PATIENCE_S: Final = 20.0


class StandstillError(Exception):
    """What the demonstration waits for does not come."""


class Growing(Generic[_T]):
    """A list of what arrived so far.

    Args:
        what: What is in it, in the plural, for the message when no more of it comes.

    Attributes:
        items: What arrived, in order.
    """

    def __init__(self, what: str) -> None:
        self.items: list[_T] = []
        self._what = what
        self._change = asyncio.Event()
        self._end: str | None = None

    def add(self, item: _T) -> None:
        """Append an item and wake who waits."""
        self.items.append(item)
        self._change.set()

    def end(self, reason: str) -> None:
        """Say that no more will come, and why."""
        self._end = reason
        self._change.set()

    async def reaches(self, count: int) -> None:
        """Wait until there are so many items.

        Raises:
            StandstillError: No more will come, or none did for 20 s.
        """
        while len(self.items) < count:
            if self._end is not None:
                raise StandstillError(f"{len(self.items)} of {count} {self._what}, then {self._end}")
            await self._changes(f"{len(self.items)} of {count} {self._what}")

    async def ends(self) -> None:
        """Wait until no more will come.

        Raises:
            StandstillError: None came for 20 s.
        """
        while self._end is None:
            await self._changes(f"{len(self.items)} {self._what}")

    async def _changes(self, so_far: str) -> None:
        self._change.clear()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._change.wait()
        except TimeoutError:
            raise StandstillError(f"{so_far}, then none for {_PATIENCE_S:.0f} s") from None
