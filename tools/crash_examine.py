"""What is looked at when a process is gone: the store as it is, opened, written on, closed, and verified."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Generator
from pathlib import Path
from typing import Final

from crash_kill import BrokenPromiseError
from crash_life import read_stream
from crash_told import Contents, Told, payload_of
from crash_writer import DEADLINE_S, Call, Mark
from logstore.errors import LogstoreError
from logstore.ops.access import StoreView
from logstore.ops.verify.store import verify
from logstore.storage import Log

LAST_LIFE: Final = 1_000
_WHAT_TO_DO: Final = ("reindex", "opens it", "try again", "give the path")
"""What an error says that is no dead end."""


def look(path: Path) -> Contents:
    """Return what a store shows to who changes nothing.

    Raises:
        LogstoreError: It shows nothing, and the error says what to do.
    """
    with StoreView(path) as view:
        streams = sorted(summary.stream for summary in view.summaries())
        return {stream: [(event.id, event.payload) for event in view.events(stream)] for stream in streams}


def check_unopened(path: Path, told: Told, *, may_refuse: bool) -> None:
    """Look at a store as the dead process left it: what was acknowledged is shown, and nothing is damaged.

    Args:
        path: The catalogue.
        told: What was told.
        may_refuse: Whether it may be in a state that only an opening ends, and say so.

    Raises:
        BrokenPromiseError: With what is wrong.
    """
    try:
        contents = look(path)
        findings = verify(path).findings
    except LogstoreError as error:
        if not may_refuse or not any(words in str(error) for words in _WHAT_TO_DO):
            raise BrokenPromiseError(f"nothing can be seen of the unopened store: {error!r}") from error
        return
    told.check(contents)
    if findings and not (may_refuse and {each.kind for each in findings} <= {"index", "catalogue"}):
        raise BrokenPromiseError(f"verify of the unopened store: {findings[:3]}")


def check_opened(path: Path, told: Told, given_out: int = 0) -> int:
    """Open a store, compare, append an event, close it and verify.

    Args:
        path: The catalogue.
        told: What was told.
        given_out: An id that no new one may be below, beside those that were told.

    Returns:
        How many events were compared.

    Raises:
        BrokenPromiseError: With what is wrong.
    """
    errors = _Errors()
    with errors.heard():
        try:
            events = asyncio.run(_use(path, told, given_out))
            findings = verify(path).findings
        except (LogstoreError, OSError, sqlite3.Error) as error:
            raise BrokenPromiseError(f"the store cannot be opened and read: {error!r}") from error
    if findings:
        raise BrokenPromiseError(f"verify of the store that was opened and closed: {findings[:3]}")
    if odd := told.unexpected(errors.lines):
        raise BrokenPromiseError("errors were logged:\n" + "\n".join(odd))
    return events


async def _use(path: Path, told: Told, given_out: int) -> int:
    async with asyncio.timeout(DEADLINE_S), Log(path) as log:
        if log.health().status != "ok":
            raise BrokenPromiseError(f"after reopening: {log.health()}")
        summaries = {summary.stream: summary.events for summary in log.stream_summaries()}
        contents = {stream: await read_stream(log, stream) for stream in sorted(summaries)}
        told.check(contents)
        counts = {stream: len(events) for stream, events in contents.items()}
        if summaries != counts:
            raise BrokenPromiseError(f"the summaries say {summaries}, there are {counts}")
        for stream, events in contents.items():
            if events and (found := await log.stream_of(str(events[-1][0]))) != stream:
                raise BrokenPromiseError(f"event {events[-1][0]} of {stream} is said to be in {found}")
        await _check_sessions(log, told)
        stream = next(iter(contents), "first")
        mark = Mark(stream, Call(LAST_LIFE, 0, 0, len(told.stored)), 0, 1)
        highest = max(told.highest_id, given_out)
        event_id = int(await log.append(stream, payload_of(mark)))
        if event_id <= highest:
            raise BrokenPromiseError(f"id {event_id} was given out after {highest}")
        told.stored[mark] = event_id
        told.check({**contents, stream: await read_stream(log, stream)})
    return sum(counts.values())


async def _check_sessions(log: Log, told: Told) -> None:
    for key, states in told.sessions.items():
        session = await log.sessions.find(key)
        state = "none" if session is None else "released" if session.released else str(session.incarnation)
        if state not in states:
            raise BrokenPromiseError(f"session {key} is {state}, and was told to be {states}")
        if session is not None:
            taken = await log.sessions.take_over(key)
            if taken is None or taken.incarnation != await log.sessions.incarnation():
                raise BrokenPromiseError(f"session {key} cannot be taken over: {taken}")


class _Errors(logging.Handler):
    """Keeps what is logged as an error: nothing was damaged, so there must be none."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())

    @contextlib.contextmanager
    def heard(self) -> Generator[None]:
        """Listen as long as the block lasts."""
        loggers = [logging.getLogger(name) for name in ("logstore", "asyncio")]
        for logger in loggers:
            logger.addHandler(self)
            logger.propagate = False
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(self)
                logger.propagate = True
