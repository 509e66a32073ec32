"""Which events an operation is about: by stream, by session, by the time they were recorded."""

from __future__ import annotations

import hashlib
import heapq
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from datetime import date, datetime, timedelta
from typing import Final, NamedTuple

from logstore.errors import ConfigurationError, DamageError
from logstore.ops.access import StoreView
from logstore.ops.transfer.event_json import time_us_of
from logstore.storage.database import connect

Moment = str | datetime | None
"""A time: ISO 8601 text, UTC when it names no zone, or a `datetime`."""

_NAMES: Final = 1_000
_SESSION: Final = """
SELECT stream_prefix FROM sessions
WHERE (session_hash IN (?, ?) OR stream_prefix = ?) AND stream_prefix != '' LIMIT 1
"""


class Selection(NamedTuple):
    """Which events; None selects all.

    Attributes:
        stream: Only this stream.
        session: Only the streams of this session: its id, the hash of its id, or what its streams begin with.
        start: Only events recorded at or after this time.
        end: Only events recorded at or before this time; text that ends in a day or a second means all of it.
    """

    stream: str | None = None
    session: str | None = None
    start: Moment = None
    end: Moment = None

    def times_us(self) -> tuple[int | None, int | None]:
        """Return the first and the last time, in microseconds since 1970.

        Raises:
            ConfigurationError: A time is none.
        """
        return _time_us(self.start, last=False), _time_us(self.end, last=True)

    def streams(self, view: StoreView) -> Iterable[str]:
        """Return the streams that may hold such events, ascending by name; in constant memory.

        Raises:
            ConfigurationError: The store does not know the session.
            DamageError: The catalogue cannot be read.
        """
        prefix = "" if self.session is None else _prefix_of(view, self.session)
        if self.stream is not None:
            return [self.stream] if self.stream.startswith(prefix) else []
        # Asked before the catalogue: what is checkpointed in between is in both.
        fresh = sorted(name for name in view.streams_in_journals() if name.startswith(prefix))
        return _without_repeats(heapq.merge(fresh, _names_in_segments(view, prefix)))


def _without_repeats(names: Iterable[str]) -> Iterator[str]:
    last = None
    for name in names:
        if name != last:
            yield name
        last = name


def _names_in_segments(view: StoreView, prefix: str) -> Iterator[str]:
    """Yield the streams in the catalogue, page by page: there may be millions."""
    start = prefix
    sql = "SELECT name FROM streams WHERE name >= ? ORDER BY name LIMIT ?"
    while page := [str(row[0]) for row in _ask(view, sql, (start, _NAMES))]:
        for name in page:
            if not name.startswith(prefix):
                return
            yield name
        # The smallest name behind it.
        start = f"{page[-1]}\0"


def _ask(view: StoreView, sql: str, arguments: tuple[object, ...]) -> list[tuple[object, ...]]:
    """Ask the catalogue, and leave no file beside it."""
    view.indexed()
    wal = view.path.with_name(f"{view.path.name}-wal")
    try:
        if not wal.exists():
            with closing(connect(view.path, write=False, immutable=True)) as connection:
                rows = connection.execute(sql, arguments).fetchall()
            if not wal.exists():
                return rows
        # Somebody has it open, or has opened it under our eyes.
        with closing(connect(view.path, write=False)) as connection:
            return connection.execute(sql, arguments).fetchall()
    except UnicodeEncodeError:
        # Half of a surrogate pair: nothing of that name was ever stored.
        return []
    except sqlite3.Error as error:
        raise DamageError(view.path, 0, 0, f"SQLite says: {error}") from error


def _prefix_of(view: StoreView, session: str) -> str:
    """Return what the names of a session's streams begin with."""
    key = hashlib.sha256(session.encode("latin-1", "replace")).hexdigest()
    rows = _ask(view, _SESSION, (session, key, session))
    if not rows:
        raise ConfigurationError(
            f"the store knows no session {session[:8]!r}… with streams of its own; give its id, or a session_hash or "
            f"stream_prefix that `sqlite-utils rows {view.path} sessions` shows"
        )
    return str(rows[0][0])


def _time_us(moment: Moment, *, last: bool) -> int | None:
    """Return a time in microseconds since 1970; as the end of a range, the last one that the text may mean."""
    if moment is None:
        return None
    if isinstance(moment, datetime):
        return time_us_of(moment)
    try:
        parsed = datetime.fromisoformat(moment)
        if last:
            parsed += _meant_by(moment) - timedelta(microseconds=1)
        return time_us_of(parsed)
    except (ValueError, OverflowError):
        raise ConfigurationError(
            f"{moment[:40]!r} is not a time; write 2024-01-31, 2024-01-31T12:00:00 (UTC) or 2024-01-31T12:00:00+02:00"
        ) from None


def _meant_by(moment: str) -> timedelta:
    """Return how long the time is that a text names: a day, a second, or a microsecond."""
    try:
        date.fromisoformat(moment)
    except ValueError:
        return timedelta(microseconds=1) if "." in moment else timedelta(seconds=1)
    return timedelta(days=1)
