"""Questions to the index of a store that others may be writing, without writing anything."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from logstore.storage.database import connect

_KEYS_A_STATEMENT: Final = 250
_PATIENCE: Final = 100
"""Looks at an index that is closed and opened by others all the time."""

_T = TypeVar("_T")
_K = TypeVar("_K")


class Index:
    """The catalogue, asked one question at a time; each sees one moment.

    A question is a function of a connection. It may be asked twice, so it changes nothing elsewhere.

    Args:
        path: The catalogue.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        # SQLite makes `-wal` and `-shm` beside a database that it only reads, unless it is told that nobody writes it.
        self._at_rest = False

    def ask(self, question: Callable[[sqlite3.Connection], _T]) -> _T:
        """Return the answer, as of one moment.

        Raises:
            sqlite3.Error: The index is damaged or gone.
            OSError: It is gone.
        """
        for _ in range(_PATIENCE):
            connection = self._current()
            try:
                connection.execute("BEGIN")
                answer = question(connection)
            except sqlite3.Error:
                if self._is_stale():
                    self.close()
                    continue
                raise
            finally:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            if not self._is_stale():
                return answer
            # Somebody has opened it since, and may have written under our eyes.
            self.close()
        raise sqlite3.OperationalError(f"{self._path} is opened and closed by others all the time; try again")

    def _current(self) -> sqlite3.Connection:
        inode = self._path.stat().st_ino
        if self._connection is None or self._inode != inode:
            self.close()
            self._inode = inode
            self._at_rest = not self._has_wal()
            self._connection = connect(self._path, write=False, immutable=self._at_rest)
            # A name with a damaged byte is to be compared and shown, not to end the look.
            self._connection.text_factory = _lenient
        return self._connection

    def _has_wal(self) -> bool:
        return self._path.with_name(f"{self._path.name}-wal").exists()

    def _is_stale(self) -> bool:
        return self._at_rest and self._has_wal()

    def close(self) -> None:
        """Close the connection; the next question opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _lenient(data: bytes) -> str:
    return data.decode(errors="replace")


def batches(keys: Iterable[_K]) -> Iterator[list[_K]]:
    """Yield keys in parts that fit a statement."""
    rest = iter(keys)
    while part := list(islice(rest, _KEYS_A_STATEMENT)):
        yield part


def marks(part: list[Any]) -> str:
    """Return the placeholders of a statement for so many keys."""
    return ", ".join("?" * len(part))


Place = tuple[int, int, int, int, int]
"""Where an event lies: its id, stream, segment, offset, length."""


def places(connection: sqlite3.Connection, ids: Iterable[int]) -> dict[int, Place]:
    """Return where the index has each of the given events that it has."""
    found: dict[int, Place] = {}
    for part in batches(ids):
        rows = connection.execute(f"SELECT * FROM events WHERE event_id IN ({marks(part)})", part)
        found.update({row[0]: row for row in rows})
    return found


def streams(connection: sqlite3.Connection, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return number and highest dropped id of each of the given streams that the index has."""
    found: dict[str, tuple[int, int]] = {}
    for part in batches(names):
        rows = connection.execute(
            f"SELECT name, stream_id, dropped_id FROM streams WHERE name IN ({marks(part)})", part
        )
        # What is no number is damage, which the check of the table reports.
        found.update((name, (number, dropped if isinstance(dropped, int) else 0)) for name, number, dropped in rows)
    return found


class SegmentRow(NamedTuple):
    """What the index says of a segment as a whole."""

    bytes: int
    sealed: int
    sha256: str | None
    dropped: int
    events: int
    first_id: int
    last_id: int
    stream_id: int | None
    file: str


def segment_row(connection: sqlite3.Connection, number: int) -> SegmentRow | None:
    """Return what the index says of a segment, None when it does not know it."""
    row = connection.execute(
        """
        SELECT bytes, sealed, sha256, dropped, events, first_id, last_id, stream_id, file FROM segments
        WHERE segment_id = ?
        """,
        (number,),
    ).fetchone()
    return None if row is None else SegmentRow(*row)


class IndexedEvent(NamedTuple):
    """A row of the index that names a segment."""

    event_id: int
    stream: str
    offset: int
    length: int


def rows_of(connection: sqlite3.Connection, number: int) -> Iterator[IndexedEvent]:
    """Yield the events that the index has in a segment, but those that retention dropped; a pass over all rows."""
    rows = connection.execute(
        """
        SELECT event_id, coalesce(name, ''), offset, length FROM events LEFT JOIN streams USING (stream_id)
        WHERE segment_id = ? AND event_id > coalesce(dropped_id, 0) ORDER BY offset
        """,
        (number,),
    )
    return map(IndexedEvent._make, rows)
