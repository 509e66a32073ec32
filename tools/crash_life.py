"""A life of a store in a child: what it does is told before and after, and errors that are injected are dealt with."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import random
import sqlite3
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from crash_told import LARGE_CALL, mark_of, payload_of
from crash_writer import Call, Mark
from logstore.errors import IndexReplacedError, LogstoreError, WriteFailedError
from logstore.storage import Log, LogOptions

Until = Literal["once", "mended", "closed"]
"""How long an injected fault lasts: for one call, until the life has noticed, or to its end."""

WRITERS: Final = 3
_POLL_S: Final = 0.002
_PATIENCE_S: Final = 20.0
_CLEAR: Final = (LogstoreError, OSError, sqlite3.Error)

_T = TypeVar("_T")


Job = Callable[[Log, "Hand"], Awaitable[None]]
"""Work with an open log."""


class EndedError(Exception):
    """The disk fails to the end, and what was to be done cannot be."""


class Hand:
    """What a life tells with, and what it does when something fails.

    Args:
        say: Where a line goes.
        until: How long the injected fault lasts; None when nothing may fail.
    """

    def __init__(self, say: Callable[[str], None], until: Until | None = None) -> None:
        self._say = say
        self._until = until

    @property
    def may_fail(self) -> bool:
        """Whether a fault is injected."""
        return self._until is not None

    @property
    def mends(self) -> bool:
        """Whether everything works in the end."""
        return self._until != "closed"

    def tell(self, what: str, *fields: Any) -> None:
        """Say a line that `Told.hear` understands, or whoever watches."""
        self._say(json.dumps([what, *fields]))

    def begin(self) -> None:
        """Have calls counted from here on."""
        self.tell("begin")

    def mend(self) -> None:
        """Have everything work from here on, unless the fault is to last."""
        if self.mends:
            self.tell("mend")

    def do(self, job: Callable[[], _T], clear: tuple[type[Exception], ...] = _CLEAR) -> _T:
        """Do something; where that fails, and the fault mends, it must succeed the second time.

        Raises:
            EndedError: It failed, with a clear error, and the fault lasts.
        """
        try:
            return job()
        except clear as error:
            self._failed(error)
        try:
            return job()
        except IndexReplacedError:
            # The first try found the index damaged, since it could not be read: the second made it again.
            return job()

    async def do_async(self, job: Callable[[], Awaitable[_T]], clear: tuple[type[Exception], ...] = _CLEAR) -> _T:
        """As `do`, on the loop."""
        try:
            return await job()
        except clear as error:
            self._failed(error)
        return await job()

    def _failed(self, error: Exception) -> None:
        if self._until is None:
            raise error
        self.tell("error", f"{type(error).__name__}: {error}")
        if not self.mends:
            raise EndedError from error
        self.mend()

    @contextlib.contextmanager
    def closing(self) -> Generator[None]:
        """Close something in the block; a disk that fails is no reason not to."""
        try:
            yield
        except _CLEAR as error:
            if self._until is None:
                raise
            self.tell("error", f"{type(error).__name__}: {error}")

    def watch(self) -> None:
        """Tell what nobody else would: errors that are logged, exceptions that nobody catches."""
        for name in ("logstore", "asyncio"):
            logger = logging.getLogger(name)
            logger.addHandler(_Errors(self, heeded=name == "asyncio" or not self.may_fail))
            logger.propagate = False
        threading.excepthook = lambda args: self.tell("odd", f"in a thread: {args.exc_value!r}")
        sys.unraisablehook = lambda args: self.tell("odd", f"not raised: {args.exc_value!r}")


class _Errors(logging.Handler):
    """Tells what is logged as an error; it is odd where nothing failed, and from the event loop always."""

    def __init__(self, hand: Hand, *, heeded: bool) -> None:
        super().__init__(logging.ERROR)
        self._hand = hand
        self._heeded = heeded

    def emit(self, record: logging.LogRecord) -> None:
        """Tell a line."""
        if self._heeded:
            self._hand.tell("odd", f"logged: {record.getMessage()}")


@dataclasses.dataclass(frozen=True)
class Life:
    """What one process does with an open store.

    Attributes:
        number: Which life of the store it is: later lives' events come after earlier ones'.
        options: How the store is opened.
        rounds: Of each round, how many events each call of a writer has; of the large ones the first alone makes one.
        streams: How many streams there are.
        seed: What streams are chosen by.
        prefix: What their names begin with.
        segmented: Whether each round waits until all is in segments.
    """

    number: int
    options: LogOptions
    rounds: Sequence[Sequence[int]]
    streams: int = 6
    seed: int = 0
    prefix: str = "stream"
    segmented: bool = False

    async def write(self, log: Log, hand: Hand) -> None:
        """Append from several tasks, round after round."""
        numbers = [0] * WRITERS
        for round_ in self.rounds:
            async with asyncio.TaskGroup() as tasks:
                for writer in range(WRITERS):
                    tasks.create_task(self._write(log, hand, writer, numbers[writer], round_))
            numbers = [number + len(round_) for number in numbers]
            if self.segmented:
                await eventually(lambda: _is_segmented(log, hand), "in segments")

    async def _write(self, log: Log, hand: Hand, writer: int, first: int, counts: Sequence[int]) -> None:
        rng = random.Random(f"{self.seed} {self.number} {writer} {first}")
        names = [f"{self.prefix}{number}" for number in range(self.streams)]
        for number, wanted in enumerate(counts, first):
            call = Call(self.number, 0, writer, number)
            count = 1 if wanted >= LARGE_CALL and writer else wanted
            streams = rng.choices(names, k=count) if count < LARGE_CALL else [names[0]] * count
            marks = [Mark(stream, call, place, count) for place, stream in enumerate(streams)]
            hand.tell("begun", call)
            try:
                ids = await _append(log, marks)
            except WriteFailedError:
                if not hand.may_fail or log.options.on_write_failure != "raise":
                    raise
                hand.tell("refused", call)
            else:
                certain = not hand.may_fail or (log.options.durability == "always" and log.health().status == "ok")
                hand.tell("stored" if certain else "kept", call, list(zip(streams, ids, strict=True)))
            # In the modes without a sync an append may not suspend at all.
            await asyncio.sleep(0)


def _is_segmented(log: Log, hand: Hand) -> bool:
    """Whether all is in segments, or cannot be brought there while something fails."""
    try:
        return log.stats().unsegmented_bytes == 0 or (hand.may_fail and log.health().status != "ok")
    except _CLEAR as error:
        if not hand.may_fail:
            raise
        hand.tell("error", f"{type(error).__name__}: {error}")
        return True


async def _append(log: Log, marks: Sequence[Mark]) -> list[str]:
    if len(marks) == 1:
        return [await log.append(marks[0].stream, payload_of(marks[0]))]
    return await log.append_many([(mark.stream, payload_of(mark), 0) for mark in marks])


async def live(
    path: Path,
    hand: Hand,
    life: Life,
    *,
    begin: Literal["opening", "writing", "written"] = "writing",
    first: Job | None = None,
    then: Job | None = None,
    end: Callable[[], None] | None = None,
) -> None:
    """Open a store, write, see that all is well, and close it.

    Args:
        path: The catalogue.
        hand: What tells.
        life: What is written.
        begin: Before what calls begin to be counted; the last is `then`.
        first: What is done before anything is written.
        then: What is done after it.
        end: Ends the process instead of closing the store.
    """
    log = Log(path, life.options)
    if begin == "opening":
        hand.begin()
    # A store that cannot be opened, or not be worked with, is closed all the same.
    with contextlib.suppress(EndedError):
        await hand.do_async(log.open, (LogstoreError,))
        if begin == "writing":
            hand.begin()
        if first is not None:
            await first(log, hand)
        await life.write(log, hand)
        if begin == "written":
            hand.begin()
        if then is not None:
            await then(log, hand)
        await _settle(log, hand)
    if end is not None:
        end()
    with hand.closing():
        await log.close()


async def _settle(log: Log, hand: Hand) -> None:
    """Wait until the store says that all is well, and show what it holds."""
    hand.mend()
    if not hand.mends:
        return
    await eventually(lambda: log.health().status == "ok" and not log.health().volatile_events, "well again")
    hand.tell("well")
    for stream in sorted(summary.stream for summary in hand.do(log.stream_summaries)):
        events = await hand.do_async(functools.partial(read_stream, log, stream))
        hand.tell("shown", stream, [_shown(*event) for event in events])


def _shown(event_id: int, payload: bytes) -> list[Any]:
    mark = mark_of(payload)
    if mark is None:
        raise ValueError(f"event {event_id} was never stored: {payload[:80]!r}")
    return [event_id, *mark[1:]]


async def read_stream(log: Log, stream: str) -> list[tuple[int, bytes]]:
    """Return `(id, payload)` of all events of a stream."""
    found: list[tuple[int, bytes]] = []
    after: str | None = None
    while events := await log.read(stream, after, 500):
        found += [(event.id, event.payload) for event in events]
        after = events[-1].event_id
    return found


async def eventually(condition: Callable[[], object], what: str) -> None:
    """Return once a condition holds.

    Raises:
        TimeoutError: It does not, for long.
    """
    patience = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > patience:
            raise TimeoutError(f"not {what} within {_PATIENCE_S:.0f} s")
        await asyncio.sleep(_POLL_S)
