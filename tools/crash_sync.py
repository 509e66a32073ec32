"""A stand-in for the kernel's sync, of disks that are not the real one: their own, in a later turn of the loop."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import NamedTuple

from logstore.storage.kernel_sync import Done, KernelSync


class _Asked(NamedTuple):
    """A sync that has not ended."""

    fd: int
    done: Done


class SyncInTurn(KernelSync):
    """Syncs when its turn comes, so that everything which can happen beside a sync can happen before this one.

    Args:
        sync: The disk's.

    Attributes:
        is_held: Whether no sync is done until `let_go` is called.
        begun: How many were asked for.
        watches: Whether the loops can watch descriptors.
    """

    def __init__(self, sync: Callable[[int], None]) -> None:
        self._sync = sync
        self._asked: _Asked | None = None
        self.is_held = False
        self.begun = 0
        self.watches = True

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Go on with this loop."""
        if not self.watches:
            raise NotImplementedError
        self._loop = loop
        if self._asked is not None:
            loop.call_soon(self._turn)

    def start(self, fd: int, path: str, done: Done) -> bool:
        """Take a sync."""
        assert self._asked is None
        assert self._loop is not None
        self.begun += 1
        self._asked = _Asked(fd, done)
        self._loop.call_soon(self._turn)
        return True

    def let_go(self) -> None:
        """Do what is held, and hold nothing more."""
        self.is_held = False
        self._turn()

    def _turn(self) -> None:
        if self._asked is None or self.is_held:
            return
        (fd, done), self._asked = self._asked, None
        found: OSError | None = None
        try:
            self._sync(fd)
        except OSError as error:
            found = error
        done(found)

    def close(self) -> None:
        """Tell who waits that the end is not known."""
        asked, self._asked = self._asked, None
        if asked is not None:
            asked.done(OSError(errno.EIO, "it is not known whether a sync has ended"))
