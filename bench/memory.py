"""How much memory a process has."""

from __future__ import annotations

import asyncio
import re
import resource
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_STATUS: Final = Path("/proc/self/status")
_UNIT: Final = 1 if sys.platform == "darwin" else 1024
_LOOK_S: Final = 0.25


def resident_mb() -> float:
    """Return what is resident now, in MB; where the system does not tell, the most that ever was."""
    return _of_status("VmRSS") if _STATUS.exists() else peak_mb()


def peak_mb() -> float:
    """Return the most that this process ever had resident, interpreter and libraries included, in MB."""
    if _STATUS.exists():
        # Not ru_maxrss here: Linux hands it down from the parent.
        return _of_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT / 1e6


def children_peak_mb() -> float:
    """Return the most that one of this process's children ever had resident, in MB; 0 without any."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _UNIT / 1e6


def _of_status(field: str) -> float:
    return int(re.findall(rf"{field}:\s+(\d+) kB", _STATUS.read_text())[0]) * 1024 / 1e6


class Course:
    """What was noted now and then.

    Attributes:
        seconds: When, since the beginning.
        memory_mb: Resident memory.
        events: Events by then.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.memory_mb: list[float] = []
        self.events: list[float] = []

    @property
    def growth(self) -> float:
        """How many times as much memory there is in the last quarter as in the second: 1 when it is flat."""
        quarter = max(1, len(self.memory_mb) // 4)
        before, after = self.memory_mb[quarter : 2 * quarter] or self.memory_mb, self.memory_mb[-quarter:]
        return sum(after) / len(after) / (sum(before) / len(before))

    def note(self, began_s: float, events: int) -> None:
        """Note how things are."""
        self.seconds.append(time.perf_counter() - began_s)
        self.memory_mb.append(resident_mb())
        self.events.append(events)


@contextmanager
def watched(events: Callable[[], int]) -> Generator[Course]:
    """Note memory and events from time to time while the block runs; on a running event loop."""
    course = Course()
    began_s = time.perf_counter()

    async def look() -> None:
        while True:
            course.note(began_s, events())
            await asyncio.sleep(_LOOK_S)

    looking = asyncio.get_running_loop().create_task(look())
    try:
        yield course
    finally:
        looking.cancel()
        course.note(began_s, events())
