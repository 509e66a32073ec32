"""The tables and views of the catalogue.

Made and migrated with sqlite-utils, so that `sqlite-utils tables events.db` or Datasette show something pleasant.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from sqlite_utils import Database, Migrations

APPLICATION_ID: Final = 0x4C4F4753
"""`LOGS`: marks the SQLite file as ours, see `PRAGMA application_id`."""
SCHEMA_VERSION: Final = 2

_migrations = Migrations("logstore")


@_migrations(name="0001_tables")
def _make_tables(db: Database) -> None:
    db.table("streams").create(
        {"stream_id": int, "name": str, "created_at": str}, pk="stream_id", not_null={"name"}
    ).create_index(["name"], unique=True)
    db.table("segments").create(
        {
            "segment_id": int,
            "stream_id": int,
            "file": str,
            "bytes": int,
            "events": int,
            "first_id": int,
            "last_id": int,
            "sealed": int,
            "sha256": str,
            "created_at": str,
        },
        pk="segment_id",
        foreign_keys=[("stream_id", "streams", "stream_id")],
    )
    db.table("events").create(
        {"event_id": int, "stream_id": int, "segment_id": int, "offset": int, "length": int},
        pk="event_id",
        foreign_keys=[("stream_id", "streams", "stream_id"), ("segment_id", "segments", "segment_id")],
    )
    # Read by `last_id`; `first_id` in the key makes room for runs that overlap after a reindex. Without a rowid, which
    # `create` cannot say, the table is its own index: half the work for each of many small streams.
    db.execute(
        """
        CREATE TABLE extents (
            stream_id INTEGER REFERENCES streams(stream_id),
            first_id INTEGER,
            last_id INTEGER,
            segment_id INTEGER REFERENCES segments(segment_id),
            offset INTEGER,
            length INTEGER,
            events INTEGER,
            first_time_us INTEGER,
            last_time_us INTEGER,
            PRIMARY KEY (stream_id, last_id, first_id)
        ) WITHOUT ROWID
        """
    )
    db.table("journals").create({"lane": int, "ordinal": int}, pk=("lane", "ordinal"))
    db.table("sessions").create(
        {"session_hash": str, "incarnation": int, "opened_at": str, "ended_at": str}, pk="session_hash"
    )
    db.table("damage").create(
        {"file": str, "offset": int, "length": int, "lost_events": int, "reason": str, "kept_in": str, "found_at": str},
        pk=("file", "offset"),
    )
    db.create_view(
        "stream_summary",
        """
        select streams.stream_id, streams.name, sum(extents.events) as events, sum(extents.length) as bytes,
               min(extents.first_id) as first_id, max(extents.last_id) as last_id,
               datetime(min(extents.first_time_us) / 1000000, 'unixepoch') as first_event,
               datetime(max(extents.last_time_us) / 1000000, 'unixepoch') as last_event
        from streams join extents using (stream_id) group by streams.stream_id
        """,
    )
    db.create_view(
        "segment_health",
        """
        select segments.segment_id, segments.file, segments.bytes, segments.events, segments.sealed,
               coalesce(streams.name, '(pack)') as stream,
               coalesce((select sum(length) from extents where extents.segment_id = segments.segment_id), 0)
                   as live_bytes
        from segments left join streams using (stream_id)
        """,
    )


@_migrations(name="0002_operating")
def _add_operating(db: Database) -> None:
    db.table("streams").add_column("dropped_id", int, not_null_default=0).add_column("dropped_at", str)
    db.table("extents").add_column("last_flags", int, not_null_default=0)
    db.table("segments").add_column("dropped", int, not_null_default=0)
    db.table("sessions").add_column("stream_prefix", str, not_null_default="")
    db.table("maintenance").create(
        {"task": str, "pid": int, "started_at": str, "finished_at": str, "summary": str}, pk="task"
    )
    db.table("imports").create({"source": str, "source_id": str, "event_id": int}, pk=("source", "source_id"))


_VIEWS: Final = {
    "stream_summary": """
        select streams.stream_id, streams.name, coalesce(sum(extents.events), 0) as events,
               coalesce(sum(extents.length), 0) as bytes,
               min(extents.first_id) as first_id, max(extents.last_id) as last_id,
               datetime(min(extents.first_time_us) / 1000000, 'unixepoch') as first_event,
               datetime(max(extents.last_time_us) / 1000000, 'unixepoch') as last_event,
               strftime('%s', 'now') - max(extents.last_time_us) / 1000000 as age_s,
               count(distinct extents.segment_id) as segments,
               streams.dropped_id, streams.dropped_at
        from streams left join extents using (stream_id) group by streams.stream_id
        """,
    "segment_health": """
        select segments.segment_id, segments.file, coalesce(streams.name, '(pack)') as stream,
               coalesce(live.streams, 0) as streams, segments.bytes, coalesce(live.bytes, 0) as live_bytes,
               segments.events, coalesce(live.events, 0) as live_events,
               round(100.0 * coalesce(live.events, 0) / segments.events, 1) as live_percent,
               segments.sealed, segments.dropped,
               datetime(live.first_time_us / 1000000, 'unixepoch') as first_event,
               datetime(live.last_time_us / 1000000, 'unixepoch') as last_event,
               strftime('%s', 'now') - live.last_time_us / 1000000 as age_s,
               segments.created_at
        from segments left join streams using (stream_id) left join (
            select segment_id, count(distinct stream_id) as streams, sum(length) as bytes, sum(events) as events,
                   min(first_time_us) as first_time_us, max(last_time_us) as last_time_us
            from extents group by segment_id
        ) as live using (segment_id)
        """,
    # The character after the last one that a name can begin with ends the range, so that the index on names serves.
    "session_summary": """
        select sessions.session_hash, case when sessions.ended_at is null then 'open' else 'ended' end as state,
               sessions.opened_at, sessions.ended_at,
               strftime('%s', coalesce(sessions.ended_at, 'now')) - strftime('%s', sessions.opened_at) as lasted_s,
               strftime('%s', 'now') - max(extents.last_time_us) / 1000000 as age_s,
               count(distinct extents.stream_id) as streams, coalesce(sum(extents.events), 0) as events,
               coalesce(sum(extents.length), 0) as bytes, sessions.stream_prefix, sessions.incarnation
        from sessions
        left join streams on sessions.stream_prefix != '' and streams.name >= sessions.stream_prefix
            and streams.name < sessions.stream_prefix || char(1114111)
        left join extents using (stream_id)
        group by sessions.session_hash
        """,
    "store_summary": """
        select (select count(*) from (select distinct stream_id from extents)) as streams,
               coalesce(sum(extents.events), 0) as events,
               datetime(min(extents.first_time_us) / 1000000, 'unixepoch') as first_event,
               datetime(max(extents.last_time_us) / 1000000, 'unixepoch') as last_event,
               strftime('%s', 'now') - max(extents.last_time_us) / 1000000 as age_s,
               (select count(*) from segments where not dropped) as segments,
               (select coalesce(sum(bytes), 0) from segments where not dropped) as segment_bytes,
               coalesce(sum(extents.length), 0) as live_bytes,
               (select count(*) from sessions where ended_at is null) as open_sessions,
               (select count(*) from sessions where ended_at is not null) as ended_sessions,
               (select count(*) from damage) as damaged_places
        from extents
        """,
}
"""Sizes in bytes, times in UTC, `age_s` in seconds since the newest event."""


@_migrations(name="0003_views")
def _make_views(db: Database) -> None:
    for name, sql in _VIEWS.items():
        db.execute(f"drop view if exists {name}")
        db.create_view(name, sql)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a database that is empty, or of an older release, to this schema."""
    database = Database(connection)
    if _migrations.pending(database):
        # Before the first table: a database with tables and without this is another program's.
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        _migrations.apply(database)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
