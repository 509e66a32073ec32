"""What the catalogue and the journals tell of a store: how much it holds, and what was done to it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec

from logstore.errors import GapError
from logstore.ops.access import StoreView
from logstore.ops.index_errors import index_errors
from logstore.ops.transfer.event_json import iso_time
from logstore.storage.catalogue import Catalogue, StreamSummary


class Segments(msgspec.Struct, frozen=True, kw_only=True):
    """Segment files as the catalogue knows them.

    Attributes:
        files: How many there are.
        packs: How many of these hold many streams.
        dropped: How many are about to be removed, not counted in `files`.
        bytes: Their length.
        live_bytes: What of it is still in use; compaction gives back the rest.
    """

    files: int
    packs: int
    dropped: int
    bytes: int
    live_bytes: int


class Sessions(msgspec.Struct, frozen=True, kw_only=True):
    """MCP sessions, as of the last checkpoint."""

    open: int
    ended: int


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """A damaged place that was found; see the catalogue's table `damage`."""

    file: str
    offset: int
    length: int
    lost_events: int | None
    reason: str
    kept_in: str | None
    found: str


class Maintenance(msgspec.Struct, frozen=True, kw_only=True):
    """What a task of the maintenance did when it last did something."""

    task: str
    pid: int
    started: str
    finished: str
    summary: Any


class StreamFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Totals of one stream; ids as text, times in ISO form."""

    stream: str
    events: int
    bytes: int
    first_event_id: str
    last_event_id: str
    first_time: str
    last_time: str


def stream_figures(view: StoreView) -> list[StreamFigures]:
    """Return the totals of every stream, the newest last.

    Raises:
        DamageError: The catalogue cannot be read.
    """
    with index_errors(view.path):
        summaries = view.summaries()
    summaries.sort(key=lambda summary: int(summary.last_id))
    return list(map(_stream, summaries))


def _stream(summary: StreamSummary) -> StreamFigures:
    return StreamFigures(
        stream=summary.stream,
        events=summary.events,
        bytes=summary.bytes,
        first_event_id=summary.first_id,
        last_event_id=summary.last_id,
        first_time=iso_time(summary.first_time_us),
        last_time=iso_time(summary.last_time_us),
    )


INDEXED: Final = (
    "total_events",
    "total_streams",
    "first_event_id",
    "first_time",
    "last_event_id",
    "last_time",
    "segments",
    "sessions",
    "damage",
    "maintenance",
    "streams",
)


class _Tables(Catalogue):
    """The catalogue, asked in SQL."""

    def rows(self, sql: str, arguments: Sequence[Any] = ()) -> list[Any]:
        """Return all rows of a statement.

        Raises:
            sqlite3.Error: The file is damaged or gone.
        """
        return self._query(sql, arguments)


def indexed_figures(view: StoreView, *, per_stream: bool) -> dict[str, Any]:
    """Return what `INDEXED` names.

    Args:
        view: The store.
        per_stream: Whether to give the totals of every stream.

    Raises:
        DamageError: The catalogue cannot be read.
    """
    view.indexed()
    tables = _Tables(view.path)
    with index_errors(view.path), contextlib.closing(tables):
        tables.look()
        return {
            **_totals(view, tables),
            "segments": _segments(tables),
            "sessions": Sessions(**_row(tables, "open", "ended", sql=_SESSIONS)),
            "damage": _damage(tables),
            "maintenance": _maintenance(tables),
            "streams": stream_figures(view) if per_stream else None,
        }


def _damage(tables: _Tables) -> list[Damage]:
    return [
        Damage(
            file=row[0],
            offset=row[1],
            length=row[2],
            lost_events=row[3],
            reason=row[4],
            kept_in=row[5],
            found=_iso_of(row[6]),
        )
        for row in tables.rows("SELECT * FROM damage ORDER BY found_at DESC, file, offset")
    ]


def _maintenance(tables: _Tables) -> list[Maintenance]:
    return [
        Maintenance(
            task=task,
            pid=pid,
            started=_iso_of(started),
            finished=_iso_of(finished),
            summary=json.loads(summary or "null"),
        )
        for task, pid, started, finished, summary in tables.rows("SELECT * FROM maintenance ORDER BY task")
    ]


_SESSIONS: Final = "SELECT coalesce(sum(ended_at IS NULL), 0), coalesce(sum(ended_at IS NOT NULL), 0) FROM sessions"


def _row(tables: _Tables, *names: str, sql: str) -> dict[str, Any]:
    return dict(zip(names, tables.rows(sql)[0], strict=True))


def _segments(tables: _Tables) -> Segments:
    return Segments(
        **_row(
            tables,
            "files",
            "packs",
            "dropped",
            "bytes",
            "live_bytes",
            sql="""
            SELECT coalesce(sum(NOT dropped), 0), coalesce(sum(NOT dropped AND stream_id IS NULL), 0),
                   coalesce(sum(dropped), 0), coalesce(sum(bytes * NOT dropped), 0),
                   (SELECT coalesce(sum(length), 0) FROM extents)
            FROM segments
            """,
        )
    )


class _Ends(NamedTuple):
    """Totals of the events in segments."""

    streams: int
    events: int
    first_id: int | None
    first_time_us: int | None
    last_id: int | None
    last_time_us: int | None


def _totals(view: StoreView, tables: _Tables) -> dict[str, Any]:
    """Return how much there is, counting once what a checkpoint is moving just now."""
    fresh = view.streams_in_journals()
    # Asked after the journals, and in one statement, so that it is about one moment.
    rows = tables.rows(
        """
        SELECT name, 0, 0, 0, 0, max(last_id), 0 FROM streams JOIN extents USING (stream_id)
        WHERE name IN (SELECT value FROM json_each(?)) GROUP BY stream_id
        UNION ALL
        SELECT NULL, count(DISTINCT stream_id), coalesce(sum(events), 0), min(first_id), min(first_time_us),
               max(last_id), max(last_time_us)
        FROM extents
        """,
        (json.dumps(list(fresh)),),
    )
    ends = next(_Ends(*row[1:]) for row in rows if row[0] is None)
    known = {row[0]: row[5] for row in rows if row[0] is not None}
    waiting = {stream: [each for each in ids if each > known.get(stream, 0)] for stream, ids in fresh.items()}
    waiting = {stream: ids for stream, ids in waiting.items() if ids}
    first_id, first_time_us, last_id, last_time_us = ends[2:]
    if waiting:
        oldest = min(waiting, key=lambda stream: waiting[stream][0])
        newest = max(waiting, key=lambda stream: waiting[stream][-1])
        if first_id is None or waiting[oldest][0] < first_id:
            first_id, first_time_us = waiting[oldest][0], _time_of(view, oldest, waiting[oldest][0])
        if last_id is None or waiting[newest][-1] > last_id:
            last_id, last_time_us = waiting[newest][-1], _time_of(view, newest, waiting[newest][-1])
    return {
        "total_events": ends.events + sum(map(len, waiting.values())),
        "total_streams": ends.streams + len(waiting.keys() - known.keys()),
        "first_event_id": None if first_id is None else str(first_id),
        "first_time": None if first_time_us is None else iso_time(first_time_us),
        "last_event_id": None if last_id is None else str(last_id),
        "last_time": None if last_time_us is None else iso_time(last_time_us),
    }


def _time_of(view: StoreView, stream: str, event_id: int) -> int | None:
    try:
        return next((event.time_us for event in view.read(stream, event_id - 1, 1)), None)
    except GapError:
        # Retention was faster.
        return None


def _iso_of(text: str) -> str:
    """Return a time of the catalogue, which is UTC, in ISO form with its zone."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).isoformat()
