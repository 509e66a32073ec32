"""Waking those who follow a stream, whoever writes it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator, Sequence
from concurrent.futures import Executor
from typing import Final

from logstore.storage.foreign import Foreign
from logstore.storage.tail import StreamTail

_LOOK_S: Final = 0.02
"""How often a process with followers looks whether other lanes have grown: a few mapped words, microseconds."""


class Followers:
    """The followers of one open log, by stream. Used on the event loop.

    Args:
        foreign: The other lanes.
        read_thread: The one thread that reads them.
    """

    def __init__(self, foreign: Foreign, read_thread: Executor) -> None:
        self._foreign = foreign
        self._read_thread = read_thread
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._moves = foreign.moves()
        self._looking = False
        self._closed = False

    def bind(self) -> None:
        """Serve the running loop: an earlier one took its look at the other lanes with it."""
        self._looking = False
        self._look()

    @contextlib.contextmanager
    def subscribed(self, stream: str) -> Generator[asyncio.Event]:
        """Give an event that is set whenever the stream may have grown, from before the first read on."""
        wake = asyncio.Event()
        self._waiting.setdefault(stream, set()).add(wake)
        try:
            self._look()
            yield wake
        finally:
            self._waiting[stream].discard(wake)
            if not self._waiting[stream]:
                del self._waiting[stream]

    def grown(self, owners: Sequence[StreamTail]) -> None:
        """Wake the followers of streams that this process has written to."""
        if self._waiting:
            self._wake({owner.name for owner in owners})

    def close(self) -> None:
        """Wake everybody, to find the log closed."""
        self._closed = True
        self._wake(set(self._waiting))

    def _wake(self, streams: set[str]) -> None:
        for stream in streams & self._waiting.keys():
            for wake in self._waiting[stream]:
                wake.set()

    def _look(self) -> None:
        """Wake the followers of streams that other processes have written to, as long as there are any."""
        if self._looking or self._closed or not self._waiting:
            return
        self._looking = True
        loop = asyncio.get_running_loop()
        try:
            moves = self._foreign.moves()
        except OSError:
            # Out of descriptors, say: whoever reads gets the error, and the next look may do.
            self._wake(set(self._waiting))
            moves = self._moves
        if moves == self._moves:
            loop.call_later(_LOOK_S, self._look_again)
            return
        self._moves = moves
        loop.run_in_executor(self._read_thread, self._foreign.news).add_done_callback(self._looked)

    def _looked(self, found: asyncio.Future[tuple[set[str], bool]]) -> None:
        if self._closed or found.cancelled():
            return
        if found.exception() is None:
            streams, missed = found.result()
        else:
            # Whoever reads gets the error; nobody may sleep through it.
            streams, missed = set(), True
        self._wake(set(self._waiting) if missed else streams)
        asyncio.get_running_loop().call_later(_LOOK_S, self._look_again)

    def _look_again(self) -> None:
        self._looking = False
        self._look()
