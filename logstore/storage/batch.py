"""What is committed together."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from logstore.storage.tail import StreamTail

_MOST_UNHEARD_BYTES: Final = 1 << 20
"""So much may be queued by who does not wait for it: a disk that is slow must not fill the memory."""
_EVENT_BYTES: Final = 400
"""What an event takes in the queue besides its frame."""


class Batch:
    """Events queued for one commit, in step, and who waits for it.

    Attributes:
        ids: Of the events.
        frames: Of the events.
        owners: Their streams.
        waiters: One for each append that waits.
        listeners: Of those who asked about an event for which no append waits.
        unheard: How many events nobody waited for when they were added.
        unheard_bytes: What these take.
        wanted_s: Since when it is to be committed as soon as can be, `time.monotonic`; 0 while nobody waits for it.
        is_decided: Whether the events are shown, or their file was given up.
    """

    __slots__ = (
        "frames",
        "ids",
        "is_decided",
        "listeners",
        "owners",
        "unheard",
        "unheard_bytes",
        "waiters",
        "wanted_s",
    )

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.frames: list[bytes] = []
        self.owners: list[StreamTail] = []
        self.waiters: list[asyncio.Future[None]] = []
        self.listeners: list[asyncio.Future[None]] = []
        self.unheard = 0
        self.unheard_bytes = 0
        self.wanted_s = 0.0
        self.is_decided = False

    @property
    def appends(self) -> int:
        """How many calls brought the events."""
        return len(self.waiters) + self.unheard

    def add(self, ids: list[int], frames: list[bytes], owners: list[StreamTail]) -> None:
        """Queue events."""
        self.ids += ids
        self.frames += frames
        self.owners += owners

    @property
    def is_wanted(self) -> bool:
        """Whether it is to be committed as soon as can be."""
        return self.wanted_s > 0

    def want(self) -> None:
        """Note that it is: somebody waits for it, or it has lingered."""
        if not self.wanted_s:
            self.wanted_s = time.monotonic()

    def takes_unheard(self, frame: bytes) -> bool:
        """Count an event for which nobody waits, unless there are too many."""
        self.unheard_bytes += len(frame) + _EVENT_BYTES
        if self.unheard_bytes > _MOST_UNHEARD_BYTES:
            return False
        self.unheard += 1
        return True

    def release(self, error: Exception | None = None) -> None:
        """Let the waiters go on; those that were cancelled have stopped waiting, their events are stored."""
        for waiter in (*self.waiters, *self.listeners):
            if not waiter.done():
                try:
                    if error is None:
                        waiter.set_result(None)
                    else:
                        waiter.set_exception(error)
                except RuntimeError:
                    # Its loop was closed while it waited.
                    continue
