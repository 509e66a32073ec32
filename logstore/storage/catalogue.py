"""The catalogue: a SQLite index over the segments, made to be opened with other tools.

It is derived: journals, segments and the registry restore all of it. Only the holder of the store's checkpoint lock
writes it, and only that holder moves SQLite's own write-ahead log into the database: SQLite up to 3.51.2 can corrupt
a database when two connections do that and write at the same moment.

Its tables are in `schema`; the statements that insert a row an event are plain SQL.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from array import array
from collections.abc import Generator, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from logstore.storage.database import connect, has_wal, is_damage
from logstore.storage.record import FLAG_FINAL, FLAG_REQUEST
from logstore.storage.schema import migrate

_WAL_BYTES: Final = 4 << 20
_ROWS_A_STATEMENT: Final = 250
_FILLING_CACHE_KIB: Final = 16 << 10


class EventRow(NamedTuple):
    """Where one event lies."""

    event_id: int
    stream_id: int
    segment_id: int
    offset: int
    length: int


class Extent(NamedTuple):
    """A contiguous run of one stream in one segment."""

    stream_id: int
    first_id: int
    last_id: int
    segment_id: int
    offset: int
    length: int
    events: int
    first_time_us: int
    last_time_us: int
    last_flags: int


class SegmentRow(NamedTuple):
    """A segment as the checkpoint leaves it."""

    segment_id: int
    stream_id: int | None
    file: str
    bytes: int
    events: int
    first_id: int
    last_id: int
    sealed: bool
    sha256: str | None


class StreamRuns(NamedTuple):
    """Where a stream's events lie, at one moment.

    Attributes:
        extents: Runs that reach beyond the id asked for, in the order of their first ids.
        dropped_id: Highest id that retention dropped; events up to there are gone, whatever a file still holds.
        whole: Whether these are all of them, and not only as many as were asked for.
    """

    extents: list[Extent]
    dropped_id: int
    whole: bool


class StreamSummary(NamedTuple):
    """Totals of one stream; ids as text, times in microseconds since 1970."""

    stream: str
    events: int
    first_id: str
    last_id: str
    first_time_us: int
    last_time_us: int
    bytes: int


def iso_now() -> str:
    """Return the time as the catalogue writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


class Catalogue:
    """The index of one open store.

    Two connections: one that only the checkpoint's thread uses and writes with, one for reads by any thread.

    Attributes:
        suspect: Whether SQLite found the file damaged; the holder of the checkpoint lock is to make it again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.suspect = False
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._read_lock = threading.Lock()
        self._write_inode = 0
        self._read_inode = 0
        # Of a database that nobody had open when the reader was opened: its length and time then.
        self._at_rest: tuple[int, int] | None = None
        # Readers of a file that is gone from the path, closed after its writer: see `_close`.
        self._retired: list[sqlite3.Connection] = []

    def open(self) -> None:
        """Open the database, make or migrate its tables; the caller holds the checkpoint lock.

        When it is open already, the file that is at the path now takes the place of the one before. One that is gone
        is not made here: to others it would pass for the index, empty.

        Raises:
            sqlite3.Error: The file is damaged or gone, or the disk refuses.
        """
        with contextlib.ExitStack() as undo:
            writer = undo.enter_context(contextlib.closing(connect(self.path, write=True)))
            writer.execute("PRAGMA journal_mode = WAL")
            migrate(writer)
            reader = undo.enter_context(contextlib.closing(connect(self.path, write=False)))
            reader.execute("SELECT count(*) FROM sqlite_master").fetchall()
            undo.pop_all()
        with self._read_lock:
            self._close()
            self._writer, self._reader = writer, reader
            self._write_inode = self._read_inode = self.path.stat().st_ino
            self.suspect = False

    def look(self) -> None:
        """Open the database for reading alone; nothing on disk is changed, and no file made beside it.

        Raises:
            sqlite3.Error: The file is damaged or gone.
        """
        with self._read_lock:
            self._reconnect()

    def _reconnect(self) -> None:
        # Asked before the file is opened: one that comes after it is seen by the next query.
        self._read_inode = self._inode()
        # SQLite makes `-wal` and `-shm` beside a database that it only reads, unless it is told that nobody writes it.
        self._at_rest = self._stamp() if self._writer is None and not has_wal(self.path) else None
        reader = connect(self.path, write=False, immutable=self._at_rest is not None)
        if self._reader is not None:
            self._retired.append(self._reader)
        self._reader = reader

    def close(self) -> None:
        """Close both connections; the caller holds the checkpoint lock, since SQLite may end its WAL here."""
        with self._read_lock:
            self._close()

    def _close(self) -> None:
        """Close all connections, so that SQLite does not remove a WAL that is not its own.

        The last connection that may write folds the WAL into the database and removes it, by name. When another file
        has come to the path, the WAL beside it is that file's: then a reader must be the last.
        """
        readers = [*self._retired, *([self._reader] if self._reader else [])]
        writers = [self._writer] if self._writer else []
        for connection in writers + readers if self.replaced else readers + writers:
            connection.close()
        self._retired.clear()
        self._reader = self._writer = None

    @property
    def inode(self) -> int:
        """Tells the file that is open for writing from another one that took its place, which may order things anew."""
        return self._write_inode

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection that writes, for statements of a `transaction` that only one caller has."""
        return self._write

    @property
    def replaced(self) -> bool:
        """Whether the path holds another file than the one that is open for writing, or none."""
        return self._inode() != self._write_inode

    def _inode(self) -> int:
        try:
            return self.path.stat().st_ino
        except FileNotFoundError:
            return 0

    @property
    def _write(self) -> sqlite3.Connection:
        assert self._writer is not None, "the catalogue is not open"
        return self._writer

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """Commit what the block wrote: on return it is on disk; an error undoes all of it."""
        connection = self._write
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield
            connection.execute("COMMIT")
        except BaseException as error:
            self.suspect |= is_damage(error)
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _insert(self, table: str, rows: Iterable[Sequence[Any]], width: int, known: str = "IGNORE") -> int:
        """Insert whole rows and return how many; those that are there already stay, or go first (`REPLACE`).

        Many rows a statement: `executemany` gives up and takes back the interpreter lock for every row, which costs
        the event loop more than the rows themselves, 10 against 1 µs of its time.
        """
        values = f"({', '.join('?' * width)})"
        rows = iter(rows)
        new = 0
        while part := list(islice(rows, _ROWS_A_STATEMENT)):
            new += self._write.execute(
                f"INSERT OR {known} INTO {table} VALUES {', '.join(repeat(values, len(part)))}",
                list(chain.from_iterable(part)),
            ).rowcount
        return new

    def add_streams(self, names: Sequence[str]) -> dict[str, int]:
        """Return the numbers of streams, adding those that are new."""
        now = iso_now()
        self._insert("streams (name, created_at)", ((name, now) for name in names), 2)
        numbers: dict[str, int] = {}
        rest = iter(names)
        while part := list(islice(rest, _ROWS_A_STATEMENT)):
            marks = ", ".join("?" * len(part))
            numbers.update(self._write.execute(f"SELECT name, stream_id FROM streams WHERE name IN ({marks})", part))
        return numbers

    def add_events(self, rows: Iterable[tuple[int, int, int, int, int]]) -> int:
        """Add rows `(event_id, stream_id, segment_id, offset, length)`; ids that are there already stay.

        Returns:
            How many were new.
        """
        return self._insert("events", rows, 5)

    def move_events(self, rows: Iterable[tuple[int, int, int, int, int]]) -> None:
        """Say where events lie now; rows as of `add_events`."""
        self._insert("events", rows, 5, "REPLACE")

    def indexed(self, ids: Sequence[int]) -> dict[int, int]:
        """Return the segment of each of the given events that are in the index."""
        found: dict[int, int] = {}
        (highest,) = self._write.execute("SELECT max(event_id) FROM events").fetchone()
        # Events are mostly asked for when they are new.
        rest = (event_id for event_id in ids if event_id <= (highest or 0))
        while part := list(islice(rest, _ROWS_A_STATEMENT)):
            marks = ", ".join("?" * len(part))
            found.update(
                self._write.execute(f"SELECT event_id, segment_id FROM events WHERE event_id IN ({marks})", part)
            )
        return found

    def add_extents(self, extents: Iterable[Extent]) -> None:
        """Add runs; one that is there already stays."""
        self._insert("extents", extents, 10)

    def put_segments(self, rows: Iterable[SegmentRow]) -> None:
        """Add segments, or say how they have grown."""
        now = iso_now()
        self._write.executemany(
            """
            INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0) ON CONFLICT (segment_id) DO UPDATE SET
            bytes = excluded.bytes, events = excluded.events, first_id = min(first_id, excluded.first_id),
            last_id = max(last_id, excluded.last_id), sealed = excluded.sealed, sha256 = excluded.sha256
            """,
            ((*row, now) for row in rows),
        )

    def forget_segment(self, segment_id: int) -> None:
        """Drop all rows of a segment; a look at every row, for the rare case that one is indexed again."""
        for table in ("extents", "events", "segments"):
            self._write.execute(f"DELETE FROM {table} WHERE segment_id = ?", (segment_id,))

    def seal_segments(self, rows: Iterable[tuple[int, str]]) -> None:
        """Note `(segment_id, sha256)` of segments that will not grow any more."""
        self._write.executemany(
            "UPDATE segments SET sealed = 1, sha256 = ? WHERE segment_id = ?",
            ((digest, number) for number, digest in rows),
        )

    def add_journals(self, journals: Iterable[tuple[int, int]]) -> None:
        """Note `(lane, ordinal)` of journal files whose events are all in segments."""
        self._write.executemany("INSERT OR IGNORE INTO journals VALUES (?, ?)", journals)

    def forget_journals(self, journals: Iterable[tuple[int, int]]) -> None:
        """Drop the notes of journal files that are surely gone from the disk."""
        self._write.executemany("DELETE FROM journals WHERE lane = ? AND ordinal = ?", journals)

    def checkpointed_journals(self, lane: int) -> set[int]:
        """Return the ordinals of a lane's journal files whose events are all in segments."""
        return {row[0] for row in self._write.execute("SELECT ordinal FROM journals WHERE lane = ?", (lane,))}

    def add_damage(self, file: str, offset: int, length: int, lost: int | None, reason: str, kept_in: str) -> None:
        """Note a damaged place."""
        self._write.execute(
            "INSERT OR REPLACE INTO damage VALUES (?, ?, ?, ?, ?, ?, ?)",
            (file, offset, length, lost, reason, kept_in, iso_now()),
        )

    def put_sessions(self, rows: Iterable[tuple[str, int, int, int | None, str]]) -> None:
        """Copy sessions `(session_hash, incarnation, opened_us, ended_us, stream_prefix)` from the registry."""
        self._write.executemany(
            """
            INSERT OR REPLACE INTO sessions
            VALUES (?, ?, datetime(? / 1000000, 'unixepoch'), datetime(? / 1000000, 'unixepoch'), ?)
            """,
            rows,
        )

    def shrink_wal(self) -> None:
        """Move SQLite's write-ahead log into the database once it is long; the caller holds the checkpoint lock."""
        wal = self.path.with_name(f"{self.path.name}-wal")
        if wal.exists() and wal.stat().st_size > _WAL_BYTES:
            self._write.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _query(self, sql: str, arguments: Sequence[Any] = ()) -> list[Any]:
        with self._read_lock:
            assert self._reader is not None, "the catalogue is not open"
            if self._inode() not in (0, self._read_inode):
                # Another process made the index again.
                self._reconnect()
            try:
                return self._fetch(sql, arguments)
            except UnicodeEncodeError:
                # Half of a surrogate pair: nothing of that name was ever stored.
                return []
            except sqlite3.Error as error:
                self.suspect |= is_damage(error)
                raise

    def _fetch(self, sql: str, arguments: Sequence[Any]) -> list[Any]:
        while True:
            assert self._reader is not None
            try:
                rows = self._reader.execute(sql, arguments).fetchall()
            except sqlite3.DatabaseError:
                if not self._was_disturbed():
                    raise
            else:
                if not self._was_disturbed():
                    return rows
            # Somebody has opened it since, and may have written under our eyes: what was read does not count.
            self._reconnect()

    def _was_disturbed(self) -> bool:
        """Whether a database that was opened as one that nobody writes has been opened by somebody since."""
        return self._at_rest is not None and (has_wal(self.path) or self._stamp() != self._at_rest)

    def _stamp(self) -> tuple[int, int]:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_size, status.st_mtime_ns

    def last_id(self) -> int:
        """Return the highest event id in the index, 0 when it is empty."""
        return int(self._query("SELECT coalesce(max(event_id), 0) FROM events")[0][0])

    def stream_of(self, event_id: int) -> str | None:
        """Return the stream of an event."""
        rows = self._query("SELECT name FROM events JOIN streams USING (stream_id) WHERE event_id = ?", (event_id,))
        return str(rows[0][0]) if rows else None

    def runs(self, stream: str, after: int, limit: int) -> StreamRuns:
        """Return up to `limit` runs of a stream that reach beyond the id `after`."""
        # One statement, so one moment: runs that are gathered into one between two would be seen in neither form.
        rows = self._query(
            """
            SELECT streams.dropped_id, extents.* FROM streams
            LEFT JOIN extents ON extents.stream_id = streams.stream_id AND last_id > ?
            WHERE streams.name = ? ORDER BY first_id LIMIT ?
            """,
            (after, stream, limit),
        )
        extents = [Extent(*row[1:]) for row in rows if row[1] is not None]
        return StreamRuns(extents, rows[0][0] if rows else 0, len(extents) < limit)

    def newest_runs(self, stream: str, below: int, limit: int) -> list[Extent]:
        """Return up to `limit` runs of a stream that end below an id, the newest first."""
        rows = self._query(
            """
            SELECT extents.* FROM extents JOIN streams USING (stream_id)
            WHERE streams.name = ? AND last_id < ? ORDER BY last_id DESC LIMIT ?
            """,
            (stream, below, limit),
        )
        return [Extent(*row) for row in rows]

    def holds(self, extent: Extent) -> bool:
        """Whether a run is still where it was."""
        key = (extent.stream_id, extent.last_id, extent.first_id, extent.segment_id)
        sql = "SELECT 1 FROM extents WHERE stream_id = ? AND last_id = ? AND first_id = ? AND segment_id = ?"
        return bool(self._query(sql, key))

    def event(self, event_id: int) -> EventRow | None:
        """Return where an event lies."""
        rows = self._query("SELECT * FROM events WHERE event_id = ?", (event_id,))
        return EventRow(*rows[0]) if rows else None

    def unanswered(self, prefix: str) -> list[tuple[str, int]]:
        """Return the streams of requests without their answer, and each one's last id, whose names begin so."""
        return self._query(
            f"""
            SELECT name, last_id FROM (
                SELECT name, extents.last_id, extents.last_flags,
                       row_number() OVER (PARTITION BY stream_id ORDER BY extents.last_id DESC) AS age
                FROM streams JOIN extents USING (stream_id)
                WHERE name >= ? AND name < ? || char(1114111)
            )
            WHERE age = 1 AND last_flags & {FLAG_REQUEST | FLAG_FINAL} = {FLAG_REQUEST}
            """,
            (prefix, prefix),
        )

    def segment_sizes(self) -> dict[int, int]:
        """Return the committed length in bytes of every segment, those included that are on their way out."""
        return dict(self._query("SELECT segment_id, bytes FROM segments"))

    def summaries(self) -> list[StreamSummary]:
        """Return the totals of every stream in segments."""
        rows = self._query(
            """
            SELECT name, sum(events), min(first_id), max(last_id), min(first_time_us), max(last_time_us), sum(length)
            FROM streams JOIN extents USING (stream_id) GROUP BY stream_id
            """
        )
        return [StreamSummary(row[0], row[1], str(row[2]), str(row[3]), *row[4:]) for row in rows]

    def totals(self) -> tuple[int, int, int]:
        """Return the number of streams, of events, and the bytes of the segments."""
        row = self._query(
            """
            SELECT (SELECT count(*) FROM streams), (SELECT coalesce(sum(events), 0) FROM extents),
                   (SELECT coalesce(sum(bytes), 0) FROM segments WHERE dropped = 0)
            """
        )[0]
        return int(row[0]), int(row[1]), int(row[2])

    # What making the index again needs.

    @contextlib.contextmanager
    def filling(self) -> Generator[None]:
        """Make writes in the block fast and not durable, for a new file that nobody else has open.

        Synced after it is closed, the file is whole; one that a crash left before that is to be thrown away.
        """
        with self._read_lock:
            # SQLite leaves its write-ahead log, for the block, only with a single connection.
            assert self._reader is not None, "the catalogue is not open"
            self._reader.close()
            self._reader = None
            self._write.execute("PRAGMA journal_mode = MEMORY")
            self._write.execute("PRAGMA synchronous = OFF")
            self._write.execute(f"PRAGMA cache_size = {-_FILLING_CACHE_KIB}")
            self._reconnect()
        yield
        self._write.execute("PRAGMA journal_mode = WAL")

    def fold_wal(self) -> None:
        """Move SQLite's write-ahead log into the database; the caller holds the checkpoint lock."""
        self._write.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def copy_notes(self, path: Path) -> set[int]:
        """Copy what no file but another catalogue tells: what retention dropped, damage, imports, maintenance.

        Returns:
            The segments that it knows.

        Raises:
            sqlite3.Error: The other one is damaged; nothing is copied.
        """
        self._write.execute("ATTACH ? AS other", (f"file:{quote(os.fsencode(path.absolute()))}?mode=ro",))
        try:
            with self.transaction():
                self._write.execute(
                    """
                    INSERT INTO streams (name, created_at, dropped_id, dropped_at)
                    SELECT name, created_at, dropped_id, dropped_at FROM other.streams WHERE dropped_id > 0
                    """
                )
                self._write.execute("INSERT INTO segments SELECT * FROM other.segments WHERE dropped = 1")
                for table in ("damage", "imports", "maintenance"):
                    self._write.execute(f"INSERT INTO {table} SELECT * FROM other.{table}")
            return {row[0] for row in self._write.execute("SELECT segment_id FROM other.segments")}
        finally:
            self._write.execute("DETACH other")

    def add_columns(
        self, ids: array[int], streams: Sequence[int], segment_id: int, offsets: array[int], lengths: array[int]
    ) -> int:
        """Add the events of a segment, given as columns; ids that are there already stay.

        Returns:
            How many were new.
        """
        new = 0
        for start in range(0, len(ids), _ROWS_A_STATEMENT):
            part = slice(start, start + _ROWS_A_STATEMENT)
            rows = len(ids[part])
            # No row is made in Python, as a tuple or otherwise: that takes a fifth of the time of the whole.
            values = [segment_id] * (5 * rows)
            values[0::5] = ids[part]
            values[1::5] = streams[part]
            values[3::5] = offsets[part]
            values[4::5] = lengths[part]
            marks = ", ".join(repeat("(?, ?, ?, ?, ?)", rows))
            new += self._write.execute(f"INSERT OR IGNORE INTO events VALUES {marks}", values).rowcount
        return new

    def dropped_segments(self) -> set[int]:
        """Return the segments that are on their way out."""
        return {row[0] for row in self._query("SELECT segment_id FROM segments WHERE dropped = 1")}

    def highest_dropped(self) -> int:
        """Return the highest event id that retention dropped, of any stream; 0 for none."""
        return int(self._query("SELECT coalesce(max(dropped_id), 0) FROM streams")[0][0])

    def dropped_ids(self, names: Sequence[str]) -> dict[str, int]:
        """Return up to which id retention dropped the events of each of the given streams, where it did."""
        sql = "SELECT name, dropped_id FROM streams WHERE dropped_id > 0 AND name IN"
        return dict(self._look_up(sql, names))

    def places(self, ids: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Return segment and offset of each of the given events that are in the index."""
        sql = "SELECT event_id, segment_id, offset FROM events WHERE event_id IN"
        return {row[0]: row[1:] for row in self._look_up(sql, ids)}

    def forget_places(self, ids: Sequence[int], segments: Iterable[int]) -> None:
        """Drop the rows of those of the given events that are in one of the given segments."""
        numbers = ", ".join(map(str, segments))
        rest = iter(ids)
        while part := list(islice(rest, _ROWS_A_STATEMENT)):
            marks = ", ".join("?" * len(part))
            self._write.execute(f"DELETE FROM events WHERE event_id IN ({marks}) AND segment_id IN ({numbers})", part)

    def drop_empty(self, segments: Iterable[int]) -> None:
        """Drop the runs of the given segments none of whose events has a row there, and the segments without a run."""
        keys = [(number,) for number in segments]
        self._write.executemany(
            """
            DELETE FROM extents WHERE segment_id = ? AND NOT EXISTS (
                SELECT 1 FROM events WHERE event_id BETWEEN extents.first_id AND extents.last_id
                AND events.stream_id = extents.stream_id AND events.segment_id = extents.segment_id)
            """,
            keys,
        )
        self._write.executemany(
            """
            UPDATE segments SET dropped = 1 WHERE segment_id = ?
            AND NOT EXISTS (SELECT 1 FROM extents WHERE extents.segment_id = segments.segment_id)
            """,
            keys,
        )

    def _look_up(self, sql: str, keys: Sequence[Any]) -> Iterator[Any]:
        """Yield what the writing connection finds for keys that may be many."""
        rest = iter(keys)
        while part := list(islice(rest, _ROWS_A_STATEMENT)):
            yield from self._write.execute(f"{sql} ({', '.join('?' * len(part))})", part)
