"""What the tests of the whole engine share."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import Any, Final

from logstore.errors import GapError
from logstore.storage import Event, Log, LogOptions

DEADLINE_S: Final = 30.0
SMALL: Final[dict[str, Any]] = {
    "journal_file_bytes": 64 << 10,
    "journal_bytes": 256 << 10,
    "checkpoint_interval_s": 0.02,
    "segment_bytes": 64 << 10,
    "memory_bytes": 1 << 20,
    "cached_events_per_stream": 10,
}
"""Options with which rotations and checkpoints happen all the time."""


def small(**changes: Any) -> LogOptions:
    """Return options with which rotations and checkpoints happen all the time."""
    return LogOptions(**{**SMALL, **changes})


async def read_all(log: Log, stream: str, page: int = 1000) -> list[Event]:
    """Read a whole stream, page by page."""
    events: list[Event] = []
    after: str | None = None
    while found := await log.read(stream, after, page):
        events += found
        after = found[-1].event_id
    return events


async def payloads(log: Log, stream: str, page: int = 1000) -> list[bytes]:
    """Return what a stream holds, in order."""
    events = await read_all(log, stream, page)
    assert [event.id for event in events] == sorted({event.id for event in events})
    return [event.payload for event in events]


async def read_to_gap(log: Log, stream: str) -> tuple[list[bytes], GapError | None]:
    """Return what a stream holds up to its first gap, and the gap."""
    found: list[bytes] = []
    after: str | None = None
    try:
        while events := await log.read(stream, after):
            found += [event.payload for event in events]
            after = events[-1].event_id
    except GapError as error:
        return found, error
    return found, None


async def eventually(condition: Callable[[], object], what: str = "") -> None:
    """Return once a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what or condition}"
        await asyncio.sleep(0.002)


async def in_segments(log: Log) -> None:
    """Return once everything that was appended is in segments."""
    await eventually(lambda: log.stats().unsegmented_bytes == 0, "all in segments")


@contextlib.asynccontextmanager
async def deadline(seconds: float = DEADLINE_S) -> AsyncGenerator[None]:
    """Fail what hangs."""
    async with asyncio.timeout(seconds):
        yield


class Process:
    """A Python process that runs some lines; it speaks on its stdout, and listens on its stdin."""

    def __init__(self, script: str, *arguments: str | Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def line(self) -> str:
        """Return the next line that it says."""
        assert self._process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self._process.stdout.readline), DEADLINE_S)
        assert line, f"the process ended with {self._process.wait()}"
        return line.rstrip("\n")

    async def rest(self) -> list[str]:
        """Return what it says until it ends, well."""
        assert self._process.stdout is not None
        text = await asyncio.wait_for(asyncio.to_thread(self._process.stdout.read), DEADLINE_S)
        assert await asyncio.to_thread(self._process.wait, DEADLINE_S) == 0
        return text.splitlines()

    async def rest_after_kill(self) -> list[str]:
        """Return the whole lines that it had said when it was killed."""
        assert self._process.stdout is not None
        return (await asyncio.to_thread(self._process.stdout.read)).split("\n")[:-1]

    def say(self, line: str) -> None:
        """Give it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """End it as a crash does."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it, if it has not ended."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def process(script: str, *arguments: str | Path) -> Generator[Process]:
    """Run lines of Python in a process of their own, as long as the block lasts."""
    started = Process(script, *arguments)
    try:
        yield started
    finally:
        started.close()
