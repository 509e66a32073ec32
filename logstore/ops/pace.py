"""How long work on a store leaves the interpreter and the disk to the appends of the same process.

A thread that compacts or copies takes the interpreter lock from commits that are done, the disk from those that are
not, and of two processors one: it left 128 writers 0.4 of their rate. So it rests for twice the time that it worked,
which leaves them 0.8, and takes three times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from logstore.storage.log import is_serving
from logstore.storage.opening import OpenStore

_WORK_S: Final = 0.000_5
"""Work after which a rest is due, a tenth of the time between commits of 128 writers. Less gains nothing."""
_RESTS: Final = 2
"""Rest, as a multiple of the work before it."""
_LONGEST_REST_S: Final = 1.0
"""Rest after a statement or a sync that took seconds: appends gain nothing by more."""


class Pace:
    """Lets long work rest in proportion to the time it takes; used by one thread.

    The time on the clock counts, not that on the processor: waiting for a sync is work for the disk.

    Args:
        rest: Sleeps for so many seconds, less once the work is to end early; None does without rests.
        clock_s: Tells the time in seconds.
    """

    def __init__(self, rest: Callable[[float], object] | None, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._rest = rest
        self._clock_s = clock_s
        self._since_s = clock_s()

    @classmethod
    def of(cls, store: OpenStore) -> Pace:
        """Return the pace for work on a store: without rests unless a log is open in this process."""
        return cls(store.stopping.wait if is_serving() else None)

    def step(self) -> None:
        """Rest if that is due. To be called often, and where no lock is held that anybody waits for."""
        if self._rest is None:
            return
        worked_s = self._clock_s() - self._since_s
        if worked_s >= _WORK_S:
            self._rest(min(_RESTS * worked_s, _LONGEST_REST_S))
            # What passed until this thread got the interpreter back was the appends'.
            self._since_s = self._clock_s()
