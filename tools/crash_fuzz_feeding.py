"""Feeding a parser in a child process, with a bound on its memory and on the time of each input.

A crash of the interpreter, a hang and an allocation without end are seen, and told with the input that caused them; the
rest of the inputs is fed to the next child.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import random
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Final, NamedTuple

import msgspec

from crash_fuzz_inputs import Input, Target
from crash_kill import BrokenPromiseError
from logstore.errors import LogstoreError

SILENCE_S: Final = 60.0
"""A child that does not get on for this long, or ten times what an input may take, hangs where no signal reaches it."""
TOLD: Final = 2
"""How many failures of one kind are told of; the others are counted."""
_LOOK_S: Final = 0.5
_NOT_MADE: Final = "could not begin"
_ARENA_MAX: Final = -8
"""`M_ARENA_MAX` of mallopt(3)."""
_COUNTS: Final = struct.Struct("=3Q")
_MEMORY_FOLDER: Final = Path("/dev/shm")


class TooSlowError(BaseException):
    """An input took more time than it may; no `except Exception` of the parser catches it."""


class Failure(msgspec.Struct, frozen=True):
    """A broken promise.

    Attributes:
        number: Of the input.
        kind: What tells failures of one cause from those of another.
        text: What happened.
    """

    number: int
    kind: str
    text: str


class Outcome(NamedTuple):
    """What became of some inputs of one target."""

    taken: int
    refused: int
    failures: list[Failure]


def draw(target: Target, seed: int, number: int) -> Input:
    """Return an input of a target: the same one whenever it is asked for."""
    return target.draw(random.Random(f"{seed} {target.name} {number}"))


def feed(make: type[Target], seed: int, first: int, count: int) -> Outcome:
    """Feed inputs to a parser in child processes, one after another until all are done.

    Args:
        make: The target.
        seed: Of the campaign.
        first: Number of the first input.
        count: How many.

    Raises:
        BrokenPromiseError: The target cannot even be made.
    """
    failures: list[Failure] = []
    taken = refused = 0
    end = first + count
    # In memory where there is such a place: files are written thousands of times. What a child leaves goes with it.
    place = _MEMORY_FOLDER if _MEMORY_FOLDER.is_dir() else None
    with (
        tempfile.TemporaryDirectory(prefix="logstore-fuzz-", dir=place) as scratch,
        mmap.mmap(-1, _COUNTS.size) as seen,
    ):
        while first < end:
            seen[:] = _COUNTS.pack(first, 0, 0)
            ended, told = _child(make, seed, range(first, end), seen, scratch)
            failures += told
            first, now_taken, now_refused = _COUNTS.unpack(seen[:])
            taken, refused = taken + now_taken, refused + now_refused
            if ended == _NOT_MADE:
                raise BrokenPromiseError(f"{make.name}: there are no samples to begin with, see above")
            if ended:
                failures.append(Failure(first, ended, f"the process {ended}"))
                first += 1
    return Outcome(taken, refused, failures)


def _child(make: type[Target], seed: int, numbers: range, seen: mmap.mmap, scratch: str) -> tuple[str, list[Failure]]:
    """Run a child to its end; return how it died, empty when it did not, and what it told."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            tempfile.tempdir = scratch
            feeder = _Feeder(make(), seed, seen, writing)
            status = 2
            feeder.run(numbers)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    data, ended = _listen(reading, pid, seen, max(SILENCE_S, 10 * make.cpu_s))
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    if not ended and os.WIFSIGNALED(status):
        ended = f"was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    elif not ended and os.WEXITSTATUS(status):
        ended = _NOT_MADE if os.WEXITSTATUS(status) == 1 else "could not go on"
    return ended, [msgspec.json.decode(line, type=Failure) for line in data.splitlines()]


def _listen(reading: int, pid: int, seen: mmap.mmap, silence_s: float) -> tuple[bytes, str]:
    """Return what a child says, and why it was ended, if it was."""
    said: list[bytes] = []
    before, since_s = b"", time.monotonic()
    while True:
        if select.select([reading], [], [], _LOOK_S)[0]:
            piece = os.read(reading, 1 << 16)
            if not piece:
                return b"".join(said), ""
            said.append(piece)
        now = seen[:]
        if now != before:
            before, since_s = now, time.monotonic()
        elif time.monotonic() - since_s > silence_s:
            os.kill(pid, signal.SIGKILL)
            return b"".join(said), f"did not get on for {silence_s:.0f} s"


class _Feeder:
    """Feeds inputs, in the child.

    Args:
        target: The parser.
        seed: Of the campaign.
        seen: Where the parent looks: the number of the input, how many were taken, and how many refused.
        writing: Where failures are told.
    """

    def __init__(self, target: Target, seed: int, seen: mmap.mmap, writing: int) -> None:
        self._target = target
        self._seed = seed
        self._seen = seen
        self._writing = writing
        self._told: Counter[str] = Counter()

    def run(self, numbers: range) -> None:
        _watch_logs()
        signal.signal(signal.SIGPROF, _too_slow)
        _bound_memory(self._target.memory_bytes)
        taken = 0
        for done, number in enumerate(numbers):
            self._seen[:] = _COUNTS.pack(number, taken, done - taken - self._told.total())
            taken += self._one(number)
        self._seen[:] = _COUNTS.pack(numbers.stop, taken, len(numbers) - taken - self._told.total())
        self._target.close()

    def _one(self, number: int) -> bool:
        """Feed one input; return whether it was taken."""
        given = draw(self._target, self._seed, number)
        try:
            signal.setitimer(signal.ITIMER_PROF, self._target.cpu_s)
            try:
                return self._target.feed(given)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except LogstoreError:
            return False
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._tell(number, error)
            return False

    def _tell(self, number: int, error: BaseException) -> None:
        kind = f"{type(error).__name__} at {_place(error)}"
        self._told[kind] += 1
        text = "".join(traceback.format_exception(error)[-12:])[-3_000:] if self._told[kind] <= TOLD else ""
        failure = Failure(number, kind, text.encode(errors="backslashreplace").decode())
        os.write(self._writing, msgspec.json.encode(failure) + b"\n")


def _place(error: BaseException) -> str:
    """Return where in this project an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [each for each in frames if "/logstore/" in each.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} in {ours[-1].name}" if ours else "?"


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise TooSlowError("more processor time than this input may take")


def _bound_memory(growth: int) -> None:
    """Bound what this process may have of memory; an allocation beyond that is refused, as on a small machine."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        # Only Linux tells how much there is, and only there the bound means anything.
        return
    # The GNU allocator answers a refused allocation with an arena of 64 MiB more, where one happens to fit: most of the
    # bound would be gone, and the inputs that follow would be blamed for it.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    limit = pages * resource.getpagesize() + growth
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class _LogCheck(logging.Handler):
    """Sees to it that whatever is logged can be written to a file; paths that are no text are as Python has them."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage().encode(errors="surrogateescape")
        if record.exc_info is not None and record.exc_info[1] is not None:
            raise BrokenPromiseError(f"logged with a traceback: {record.getMessage()}") from record.exc_info[1]


def _watch_logs() -> None:
    for name in ("logstore", "logstore.mcp"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.handlers = [_LogCheck()]
        logger.setLevel(logging.WARNING)
