"""An import adds what is missing, once, and says what it left out and why."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec
import pytest
from click.testing import CliRunner
from mcp_persist.sqlite import SQLiteEventStore
from mcp_types import JSONRPCNotification, JSONRPCRequest, JSONRPCResponse

from logstore.cli import main
from logstore.errors import DamageError, FormatVersionError, LogstoreError, NotAStoreError, WriteFailedError
from logstore.mcp.messages import Message, decode
from logstore.ops.access import StoreView
from logstore.ops.compaction.compact import compact_at
from logstore.ops.transfer.event_json import write_event
from logstore.ops.transfer.export import export_events
from logstore.ops.transfer.import_notes import origin_of
from logstore.ops.transfer.importing import ImportResult, import_events
from logstore.ops.transfer.json_stream import BrokenJsonError
from logstore.storage import Log
from logstore.storage.ids import later
from logstore.storage.opening import OpenStore
from logstore.storage.options import Retention
from logstore.storage.record import FLAG_IMPORTED, FLAG_MODEL, FLAG_PRIMING, Event
from tests.engine import deadline, small
from tests.ops.backed_up import DyingDisk, every_call
from tests.ops.test_export import PAYLOADS, fill
from tests.storage.disks import Fault, FaultyDisk

HEAD = '{"format": "logstore-export", "version": 1}\n'


def contents(path: Path) -> list[Event]:
    """Return every event of a store, stream by stream."""
    with StoreView(path) as view:
        names = sorted(summary.stream for summary in view.summaries())
        found = [event for name in names for event in view.events(name)]
        ids = [event.id for event in found]
        assert len(set(ids)) == len(ids)
        assert sum(summary.events for summary in view.summaries()) == len(ids), "nothing is indexed twice"
    return found


def exported(path: Path) -> bytes:
    out = io.BytesIO()
    export_events(path, out, form="ndjson")
    return out.getvalue()


def imported(path: Path, source: str | bytes | Path) -> ImportResult:
    data = source.encode() if isinstance(source, str) else source
    return import_events(path, data if isinstance(data, Path) else io.BytesIO(data))


def ndjson(*events: Event) -> bytes:
    tail = json.dumps({"count": len(events), "gaps": []}).encode()
    return b"\n".join([HEAD.strip().encode(), *map(write_event, events), tail])


def some(count: int, stream: str = "s", first: int = 1) -> list[Event]:
    ids = [(first + each) << 30 for each in range(count)]
    return [
        Event(event_id, ids[place - 1] if place else 0, 1_600_000_000_000_000 + place, stream, 0, b'{"n":%d}' % place)
        for place, event_id in enumerate(ids)
    ]


# Events of a store like this one.


@pytest.mark.promise("import-keeps-events")
@pytest.mark.parametrize("form", ["json", "ndjson"])
async def test_a_store_is_moved_event_by_event(tmp_path: Path, form: str) -> None:
    old, new, file = tmp_path / "old.db", tmp_path / "new" / "events.db", tmp_path / "file"
    await fill(old, 3, 500)
    async with Log(old) as log:
        for payload, flags in PAYLOADS:
            await log.append("every kind", payload, flags)
    export_events(old, file, form="ndjson" if form == "ndjson" else "json")
    result = import_events(new, file)
    assert (result.added, result.complete) == (500 + len(PAYLOADS), True)
    assert contents(new) == contents(old)
    again = import_events(new, file)
    assert (again.added, again.already_there, again.complete) == (0, 500 + len(PAYLOADS), True)
    assert contents(new) == contents(old)
    # What is appended there later comes behind it.
    async with Log(new) as log:
        late = await log.append("s0", b"{}")
        assert [event.event_id for event in await log.read("s0")][-1] == late


async def test_an_export_that_other_programs_laid_out_anew_is_the_same(tmp_path: Path) -> None:
    old, new, file = tmp_path / "old.db", tmp_path / "new.db", tmp_path / "file"
    await fill(old, 3, 50, b'{"method":"m","params":{"b":[1,2.5],"a":{}}}')
    export_events(old, file)
    whole = json.loads(file.read_bytes())
    for indent in (None, 2):
        assert imported(new, json.dumps(whole, indent=indent)).complete
    assert imported(new, json.dumps(whole, indent=4, sort_keys=True)).already_there == 50
    assert imported(new, file).already_there == 50
    for one, other in zip(contents(new), contents(old), strict=True):
        assert (one.id, one.prev, one.time_us, one.stream, one.flags) == (
            other.id,
            other.prev,
            other.time_us,
            other.stream,
            other.flags,
        )
        assert json.loads(one.payload) == json.loads(other.payload)


def test_the_first_of_some_events_without_a_head_keeps_its_bytes(tmp_path: Path) -> None:
    payload = b'{"a":1.50,"b":"\\u00e9"}'
    lines = ndjson(*(msgspec.structs.replace(event, payload=payload) for event in some(2))).splitlines()[1:3]
    result = imported(tmp_path / "events.db", b"\n".join(lines))
    assert (result.added, result.complete) == (2, True)
    assert {event.payload for event in contents(tmp_path / "events.db")} == {payload}


@pytest.mark.promise("work-while-open")
async def test_an_export_comes_back_into_its_own_store_while_that_is_open(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    await fill(path, 2, 20)
    async with Log(path, small(checkpoint_interval_s=3600.0)) as log:
        # In a journal, in no segment.
        await log.append("s0", b'{"late":1}')
        data = exported(path)
        result = await asyncio.to_thread(imported, path, data)
        assert (result.added, result.already_there, result.complete) == (0, 21, True)
        other = data.replace(b'{"late":1}', b'{"late":2}')
        assert (await asyncio.to_thread(imported, path, other)).conflict_count == 1
    assert len(contents(path)) == 21


@pytest.mark.promise("import-keeps-events")
@pytest.mark.parametrize("page", [1, 3, 1000])
async def test_events_that_come_between_others_are_read_in_order(tmp_path: Path, page: int) -> None:
    path = tmp_path / "events.db"
    events = some(60)
    for part in (events[1::3], events[::3], events[2::3]):
        assert imported(path, ndjson(*part)).added == 20
    assert contents(path) == events
    async with Log(path) as log:
        found: list[Event] = []
        after = None
        while some_more := await log.read("s", after, page):
            found += some_more
            after = found[-1].event_id
        assert found == events
        assert await log.stream_of(events[30].event_id) == "s"


@pytest.mark.promise("import-conflicts")
async def test_other_content_under_the_same_id_is_a_conflict(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    one, two, three = some(3)
    imported(path, ndjson(one, two))
    others = [
        Event(two.id, two.prev, two.time_us, two.stream, two.flags, b'{"n":2}'),
        Event(two.id, two.prev, two.time_us + 1, two.stream, two.flags, two.payload),
        Event(two.id, 0, two.time_us, two.stream, two.flags, two.payload),
        Event(two.id, two.prev, two.time_us, "other", two.flags, two.payload),
        Event(two.id, two.prev, two.time_us, two.stream, FLAG_PRIMING, b""),
        Event(two.id, two.prev, two.time_us, two.stream, two.flags, b'{"n":true}'),
    ]
    for other in others:
        result = imported(path, ndjson(one, other, three))
        assert (result.already_there + result.added, result.conflict_count, result.complete) == (2, 1, False)
        assert result.conflicts[0].place == "line 3, event 2"
        assert f"another event with the id {two.id}" in result.conflicts[0].reason
    assert contents(path) == [one, two, three]


@pytest.mark.promise("import-conflicts")
def test_the_same_id_twice_in_one_file(tmp_path: Path) -> None:
    one, other = some(1)[0], Event(1 << 30, 0, 1_600_000_000_000_000, "s", 0, b'{"other":1}')
    for path in (tmp_path / "new.db", tmp_path / "new.db"):
        result = imported(path, ndjson(one, one, other))
        assert (result.added + result.already_there, result.conflict_count) == (2, 1)
    assert contents(tmp_path / "new.db") == [one]


@pytest.mark.promise("dropped-stays-dropped")
def test_events_that_retention_dropped_stay_away(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    events = some(10)
    rows = [("a", "s2", '{"method":"m"}', "2020-01-01 00:00:00")]
    original(tmp_path / "old.db", rows)
    imported(path, ndjson(*events))
    imported(path, tmp_path / "old.db")
    compact_at(path, Retention(max_age_s=3600.0))
    assert contents(path) == []
    result = imported(path, ndjson(*events))
    assert (result.added, result.dropped, result.complete) == (0, 10, True)
    result = imported(path, tmp_path / "old.db")
    assert (result.added, result.dropped, result.complete) == (0, 1, True)
    assert contents(path) == []


async def test_ids_of_a_time_to_come_are_refused_while_others_could_draw_them(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    soon = later(0, time.time_ns() // 1_000_000 + 3_600_000)
    event = Event(soon, 0, 1_600_000_000_000_000, "s", 0, b"{}")
    async with Log(path):
        result = await asyncio.to_thread(imported, path, ndjson(event))
        assert (result.added, result.invalid_count) == (0, 1)
        assert "ahead of the clock" in result.invalid[0].reason
    assert imported(path, ndjson(event)).added == 1
    async with Log(path) as log:
        assert int(await log.append("s", b"{}")) > soon
    far = Event((1 << 63) - 1, 0, 1_600_000_000_000_000, "s", 0, b"{}")
    assert imported(path, ndjson(far)).invalid_count == 1


@pytest.mark.promise("ids-never-twice")
def test_no_later_opening_can_draw_an_imported_id_even_if_the_index_is_lost(tmp_path: Path) -> None:
    disk = FaultyDisk()
    soon = later(0, time.time_ns() // 1_000_000 + 3_600_000)
    path, source = tmp_path / "events.db", tmp_path / "source"
    source.write_bytes(ndjson(Event(soon, 0, 1_600_000_000_000_000, "s", 0, b"{}")))
    assert import_events(path, source, disk=disk).added == 1
    names = [(kind, "segment" if name.endswith(".segment") else name) for kind, name in disk.calls]
    segment = names.index(("create", "segment"))
    # The reservation is on disk before the event is, and so does not hang on the index.
    opened = len(names) - 1 - names[::-1].index(("lock", "checkpoint.lock"), names[::-1].index(("create", "segment")))
    assert ("sync", "state") in names[opened:segment]


# Events of other stores.


def original(path: Path, rows: list[tuple[Any, ...]]) -> None:
    """Make a database of the original event store."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(
            """
            CREATE TABLE IF NOT EXISTS events (
                event_id TEXT PRIMARY KEY,
                stream_id TEXT NOT NULL,
                message_json TEXT NOT NULL,
                timestamp DATETIME DEFAULT CURRENT_TIMESTAMP,
                created_at DATETIME DEFAULT CURRENT_TIMESTAMP
            );
            CREATE INDEX IF NOT EXISTS idx_stream_timestamp ON events(stream_id, timestamp);
            CREATE INDEX IF NOT EXISTS idx_timestamp ON events(timestamp);
            """
        )
        connection.executemany(
            "INSERT INTO events (event_id, stream_id, message_json, timestamp) VALUES (?, ?, ?, ?)", rows
        )


def messages(path: Path) -> list[tuple[str, int, Message | None]]:
    """Return stream, time and message of every event of a store, in the order of their ids."""
    events = sorted(contents(path), key=lambda event: event.id)
    return [(event.stream, event.time_us, None if event.flags & FLAG_PRIMING else decode(event)) for event in events]


ROWS = [
    ("0f3e", "stream_1", '{"method": "tools/call", "params": {"name": "é"}}', "2024-01-01 00:00:00"),
    ("77aa", "stream_2", '{"jsonrpc": "2.0", "id": 1, "result": {"x": 1e2}}', "2024-01-01 00:00:01"),
    ("1111", "stream_1", '{"jsonrpc":"2.0","method":"note"}', "2024-01-01T00:00:02.000005+00:00"),
    ("2222", "stream_1", "null", "2024-01-01 00:00:03"),
]
START_US = 1_704_067_200_000_000
MESSAGES = [
    ("stream_1", START_US, {"method": "tools/call", "params": {"name": "é"}}),
    ("stream_2", START_US + 1_000_000, JSONRPCResponse(jsonrpc="2.0", id=1, result={"x": 100.0})),
    ("stream_1", START_US + 2_000_005, JSONRPCNotification(jsonrpc="2.0", method="note")),
    ("stream_1", START_US + 3_000_000, None),
]


def as_members(row: tuple[str, str, str, str]) -> dict[str, Any]:
    return {"event_id": row[0], "stream_id": row[1], "message": json.loads(row[2]), "timestamp": row[3]}


@pytest.mark.promise("import-once", "import-foreign")
def test_the_original_s_database_is_imported_once_from_wherever_it_lies(tmp_path: Path) -> None:
    path, old, copy = tmp_path / "events.db", tmp_path / "old.db", tmp_path / "copy.db"
    original(old, ROWS)
    before = old.read_bytes()
    result = imported(path, old)
    assert (result.added, result.complete) == (4, True)
    assert messages(path) == MESSAGES
    assert (old.read_bytes(), sorted(tmp_path.glob("old.db*"))) == (before, [old])
    copy.write_bytes(before)
    for again in (old, copy):
        result = imported(path, again)
        assert (result.added, result.already_there) == (0, 4)
    # The database went on: it lost its oldest event, and has a new one.
    with closing(sqlite3.connect(copy)) as connection, connection:
        connection.execute("DELETE FROM events WHERE event_id = '0f3e'")
    original(copy, [("3333", "stream_1", '{"method":"new"}', "2024-01-02 00:00:00")])
    result = imported(path, copy)
    assert (result.added, result.already_there) == (1, 3)
    of_stream = [event for event in contents(path) if event.stream == "stream_1"]
    assert [event.prev for event in of_stream] == [0, *(event.id for event in of_stream[:-1])]
    origins = [origin_of(event) for event in of_stream]
    assert [origin and (origin[0], origin[1].partition("#")[0]) for origin in origins] == [
        ("event-store", name) for name in ("0f3e", "1111", "2222", "3333")
    ]
    assert all(event.flags & FLAG_IMPORTED for event in of_stream)


def layouts() -> Iterator[str]:
    members = list(map(as_members, ROWS))
    yield json.dumps(members)
    yield json.dumps(members, indent=2)
    yield "\ufeff" + json.dumps({"exported_at": "x", "total": 4, "events": members, "more": {"a": [1]}})
    yield "\n".join(map(json.dumps, members))
    texts = [{**each, "message_json": row[2]} for each, row in zip(members, ROWS, strict=True)]
    for each in texts:
        del each["message"]
        each["created_at"] = each.pop("timestamp")
    yield json.dumps(texts)


@pytest.mark.promise("import-foreign")
@pytest.mark.parametrize("layout", range(len(list(layouts()))))
def test_the_original_s_json_is_imported_and_is_the_same_as_its_database(tmp_path: Path, layout: int) -> None:
    path, old = tmp_path / "events.db", tmp_path / "old.db"
    text = list(layouts())[layout]
    result = imported(path, text)
    assert (result.added, result.invalid, result.ended) == (4, [], None)
    assert messages(path) == MESSAGES
    original(old, ROWS)
    assert imported(path, old).already_there == 4
    assert imported(path, text).already_there == 4


def test_two_databases_that_number_their_events_alike_do_not_hide_each_other(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    for number in range(2):
        original(tmp_path / f"{number}.db", [("1", "1", f'{{"method":"m{number}"}}', "2024-01-01 00:00:00")])
        assert imported(path, tmp_path / f"{number}.db").added == 1
    assert [message for _, _, message in messages(path)] == [{"method": "m0"}, {"method": "m1"}]


@pytest.mark.promise("import-foreign")
@pytest.mark.parametrize("compression", [None, "gzip"])
async def test_a_database_of_mcp_persist_is_imported_once(tmp_path: Path, compression: str | None) -> None:
    path, old = tmp_path / "events.db", tmp_path / "old.db"
    sent = [
        JSONRPCRequest(jsonrpc="2.0", id=7, method="m", params={"text": "x" * 2000}),
        JSONRPCNotification(jsonrpc="2.0", method="n"),
        None,
        JSONRPCResponse(jsonrpc="2.0", id=7, result={}),
    ]
    before = time.time()
    async with SQLiteEventStore.create(str(old), ttl=3600, compression=compression) as store:
        for message in sent:
            await store.store_event("a:7", message)
        # While it is open: its write-ahead log holds them.
        result = await asyncio.to_thread(imported, path, old)
        assert (result.added, result.complete) == (4, True)
    found = messages(path)
    assert [(stream, message) for stream, _, message in found] == [("a:7", message) for message in sent]
    assert all(before - 1 <= time_us / 1e6 <= time.time() for _, time_us, _ in found)
    assert [origin and origin[0] for origin in map(origin_of, contents(path))] == ["mcp-persist"] * 4
    assert contents(path)[0].flags == FLAG_MODEL | FLAG_IMPORTED
    assert imported(path, old).already_there == 4


def test_what_mcp_persist_compressed_or_encrypted_otherwise_is_listed(tmp_path: Path) -> None:
    path, old = tmp_path / "events.db", tmp_path / "old.db"
    payloads = ["zs:AAAA", "en:k:AAAA", "ea:k:AAAA", "gz:AAAA", "gz:?", b"\x00", '{"jsonrpc"', "[]", '{"x":1}']
    with closing(sqlite3.connect(old)) as connection, connection:
        connection.execute(
            "CREATE TABLE other_name (event_id INTEGER PRIMARY KEY, stream_id TEXT, payload TEXT, created_at REAL)"
        )
        connection.executemany("INSERT INTO other_name VALUES (NULL, 's', ?, 1.5)", [(each,) for each in payloads])
    result = imported(path, old)
    assert (result.added, result.invalid_count) == (1, 8)
    assert [each.place for each in result.invalid] == [f"row {number} of other_name" for number in range(1, 9)]
    reasons = "\n".join(each.reason for each in result.invalid)
    assert all(word in reasons for word in ("zstd", "encrypted", "decompressed", "bytes, not text", "list"))
    assert messages(path) == [("s", 1_500_000, {"x": 1})]


@pytest.mark.promise("import-once")
def test_importing_twice_adds_nothing_when_the_catalogue_was_lost_between(tmp_path: Path) -> None:
    path, old = tmp_path / "events.db", tmp_path / "old.db"
    original(old, ROWS)
    imported(path, old)
    moved = tmp_path / "moved.db"
    assert imported(moved, exported(path)).added == 4
    for store in (path, moved):
        store.unlink()
        assert imported(store, old).already_there == 4
        assert imported(store, old).already_there == 4
        assert len(contents(store)) == 4


def test_where_an_event_came_from_is_noted_before_the_event_is_there(tmp_path: Path) -> None:
    path, old = tmp_path / "events.db", tmp_path / "old.db"
    original(old, ROWS)

    def counts() -> tuple[int, int]:
        with closing(sqlite3.connect(path)) as connection:
            row = connection.execute("SELECT (SELECT count(*) FROM imports), (SELECT count(*) FROM events)").fetchone()
            return row[0], row[1]

    disk = FaultyDisk()
    disk.fail(Fault("create", name=".segment"))
    with pytest.raises(WriteFailedError, match="after 0 events were added"):
        import_events(path, old, disk=disk)
    assert counts() == (4, 0)
    assert import_events(path, old).added == 4
    assert counts() == (4, 4)


@pytest.mark.promise("import-once")
def test_two_who_import_the_same_at_once_add_it_once(tmp_path: Path) -> None:
    path, old = tmp_path / "events.db", tmp_path / "old.db"
    original(old, [(f"e{each}", f"s{each % 3}", '{"method":"m"}', 1.5 + each) for each in range(12_000)])

    async def both() -> list[ImportResult]:
        async with deadline():
            return await asyncio.gather(*(asyncio.to_thread(import_events, path, old) for _ in range(2)))

    results = asyncio.run(both())
    assert sum(result.added for result in results) == 12_000
    assert sum(result.already_there for result in results) == 12_000
    assert len(contents(path)) == 12_000


@pytest.mark.promise("work-while-open")
async def test_whoever_has_the_store_open_sees_what_was_imported(tmp_path: Path) -> None:
    path, old = tmp_path / "events.db", tmp_path / "old.db"
    original(old, ROWS)
    async with deadline(), Log(path, small(checkpoint_interval_s=3600.0)) as log:
        # In memory whole, so that it would be read from there alone.
        own = await log.append("stream_1", b"{}")
        assert [event.event_id for event in await log.read("stream_1", own)] == []
        follower = log.follow("stream_1", own)
        waiting = asyncio.ensure_future(anext(follower))
        await asyncio.sleep(0)
        assert (await asyncio.to_thread(import_events, path, old)).added == 4
        assert (await waiting).time_us == START_US
        assert len(await log.read("stream_1", own)) == 3


# What is wrong with a source.

GOOD = {"event_id": str(1 << 30), "stream_id": "s", "timestamp": "2024-01-01", "prev": None, "kind": "dict"}
BAD_MEMBERS: list[tuple[dict[str, Any], str]] = [
    ({"event_id": 5}, "event_id"),
    ({"event_id": "05"}, "not an event id"),
    ({"event_id": "9" * 19}, "not an event id"),
    ({"event_id": "-1"}, "not an event id"),
    ({"prev": str(1 << 30)}, "does not come before"),
    ({"prev": 4}, "prev"),
    ({"stream_id": ""}, "1 to 512 bytes"),
    ({"stream_id": "a\nb"}, "control character"),
    ({"stream_id": "x" * 513}, "1 to 512 bytes"),
    ({"stream_id": None}, "stream_id"),
    ({"timestamp": "soon"}, "soon"),
    ({"timestamp": 5}, "timestamp"),
    ({"timestamp": "1969-12-31T23:59:59.999999+00:00"}, "not between the years"),
    ({"timestamp": "0001-01-01"}, "not between the years"),
    ({"timestamp": "9999-12-31T23:59:59-00:01"}, "not between the years"),
    ({"kind": "model"}, "no JSON-RPC"),
    ({"kind": "priming"}, "priming"),
    ({"kind": "other"}, "other"),
    ({"kind": "bytes"}, "payload_base64"),
    ({"kind": "bytes", "payload_base64": "?"}, "ase64"),
    ({"kind": "bytes", "payload_base64": "", "flags": -1}, "flags"),
    ({"kind": "bytes", "payload_base64": "", "flags": 1 << 40}, "flags"),
    ({"message": [1]}, "not an object"),
    ({"message": "text"}, "not an object"),
    ({"message": {"a": float("nan")}}, "malformed"),
    ({"final": "yes"}, "final"),
    ({"imported": {"source": 1}}, "imported"),
]


@pytest.mark.promise("import-lists-what-is-none")
@pytest.mark.parametrize(("members", "reason"), BAD_MEMBERS)
def test_an_event_that_is_none_is_listed_and_the_others_are_added(
    tmp_path: Path, members: dict[str, Any], reason: str
) -> None:
    bad = json.dumps({**GOOD, "message": {}, **members})
    good = json.dumps({**GOOD, "message": {}, "event_id": str(2 << 30)})
    result = imported(tmp_path / "events.db", f'{HEAD}{bad}\n{good}\n{{"count":2,"gaps":[]}}')
    assert (result.added, result.invalid_count, result.complete) == (1, 1, False)
    assert result.invalid[0].place == "line 2, event 1"
    assert reason in result.invalid[0].reason


@pytest.mark.promise("import-lists-what-is-none")
@pytest.mark.parametrize(
    "bad",
    [
        "5",
        '"text"',
        "[]",
        "{}",
        '{"event_id":"1"}',
        '{"event_id":"1","stream_id":"s"}',
        '{"event_id":"1","stream_id":"s","timestamp":"2024-01-01"}',
        '{"event_id":[],"stream_id":"s","timestamp":"2024-01-01","message":{}}',
        '{"event_id":"1","stream_id":7,"timestamp":"2024-01-01","message":{}}',
        '{"event_id":"1","stream_id":"s","timestamp":[],"message":{}}',
        '{"event_id":"1","stream_id":"s","timestamp":"1969-12-31T23:59:59","message":{}}',
        '{"event_id":"1","stream_id":"s","timestamp":"9999-12-31T23:59:59-12:00","message":{}}',
        '{"event_id":"1","stream_id":"s","timestamp":1e300,"message":{}}',
        '{"event_id":"1","stream_id":"s","timestamp":NaN,"message":{}}',
        '{"event_id":"1","stream_id":"s","timestamp":true,"message":{}}',
        '{"event_id":"1","stream_id":"s","timestamp":"2024-01-01","message":{"a":NaN}}',
        '{"event_id":"1","stream_id":"s","timestamp":"2024-01-01","message":{"a":1e999}}',
        '{"event_id":"1","stream_id":"s","timestamp":"2024-01-01","message":{"a":"\\ud800"}}',
        '{"event_id":"1","stream_id":"\\ud800","timestamp":"2024-01-01","message":{}}',
        '{"event_id":"1","stream_id":"s","timestamp":"2024-01-01","message_json":"{"}',
        '{"event_id":"1","stream_id":"s","timestamp":"2024-01-01","message_json":7}',
        '{"event_id":"1","stream_id":"s","timestamp":"2024-01-01","message":' + '{"a":' * 300 + "1" + "}" * 301,
        '{"event_id":"1","stream_id":"s","timestamp":"2024-01-01","message":{"a":' + "1" * 5000 + "}}",
    ],
)
def test_a_foreign_event_that_is_none_is_listed_and_the_others_are_added(tmp_path: Path, bad: str) -> None:
    good = json.dumps(as_members(ROWS[0]))
    result = imported(tmp_path / "events.db", f"[{bad},{good}]")
    assert (result.added, result.invalid_count, result.ended) == (1, 1, None)
    assert result.invalid[0].place == "line 1, event 1"
    result.invalid[0].reason.encode()
    assert messages(tmp_path / "events.db") == MESSAGES[:1]


@pytest.mark.promise("import-lists-what-is-none")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "text",
        "5",
        "[" * 10_000_000,
        '{"a":' * 1_000_000,
        "[5",
        "{",
        '{"a"',
        "{5:1}",
        '{"events":',
        '{"events":[{"a":',
        "\x00" * 1000,
        '"' + "x" * 1000,
    ],
    ids=lambda text: text[:10],
)
def test_a_file_that_does_not_even_begin_is_refused_and_no_store_is_made(tmp_path: Path, text: str) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    result = CliRunner().invoke(main, ["import", str(tmp_path / "events.db"), str(file)])
    if text == "[5":
        assert "no object" in result.output
    else:
        assert list(tmp_path.iterdir()) == [file]
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "file is no JSON any more at line " in result.output or text == "[5"
    assert len(result.output) < 500


@pytest.mark.promise("import-lists-what-is-none")
def test_a_file_that_breaks_off_is_imported_up_to_there_and_after_mending_whole(tmp_path: Path) -> None:
    events = some(3)
    for number, whole in enumerate((ndjson(*events), b'{"events":[\n' + ndjson(*events)[44:-24] + b"\n]}")):
        path = tmp_path / f"{number}.db"
        for length in range(0, len(whole) - 2, 31):
            try:
                result = imported(path, whole[:length])
            except BrokenJsonError:
                continue
            assert not result.complete, whole[:length]
            assert contents(path) == events[: len(contents(path))]
        if number == 0:
            assert imported(path, whole).complete
            assert contents(path) == events


def test_the_place_where_a_file_breaks_is_told(tmp_path: Path) -> None:
    one, two = map(write_event, some(2))
    text = HEAD.encode() + one + b"\n" + two.replace(b"}", b"", 1)
    result = imported(tmp_path / "events.db", text)
    assert result.added == 1
    assert result.ended is not None
    assert "line 3" in result.ended
    text = HEAD.encode() + one + b"\n"
    assert "not whole: 1 events were found" in (imported(tmp_path / "events.db", text).ended or "")


def test_an_event_longer_than_any_is_refused(tmp_path: Path) -> None:
    class Endless(io.RawIOBase):
        """A text that never ends."""

        asked = 0

        def read(self, size: int = -1) -> bytes:
            Endless.asked += size
            return b'[{"a":"' if Endless.asked == size else b"x" * size

    endless: Any = Endless()
    with pytest.raises(BrokenJsonError, match="line 1: an event is longer than"):
        import_events(tmp_path / "events.db", endless)
    assert Endless.asked < 300 << 20


def test_an_event_that_the_store_cannot_take_is_listed(tmp_path: Path) -> None:
    big = Event(1 << 30, 0, 1_600_000_000_000_000, "s", 0, b'{"x":"%s"}' % (b"y" * (64 << 20)))
    result = imported(tmp_path / "events.db", ndjson(big))
    assert (result.added, result.invalid_count) == (0, 1)
    assert "larger than the largest" in result.invalid[0].reason


def test_what_is_no_database_of_events_is_refused(tmp_path: Path) -> None:
    path, other, damaged = tmp_path / "events.db", tmp_path / "other.db", tmp_path / "damaged.db"
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("CREATE TABLE things (a, b)")
    with pytest.raises(NotAStoreError, match="tables: things"):
        imported(path, other)
    original(damaged, ROWS)
    data = bytearray(damaged.read_bytes())
    data[100:] = b"\xff" * (len(data) - 100)
    damaged.write_bytes(data)
    with pytest.raises(DamageError, match="SQLite says"):
        imported(path, damaged)
    with pytest.raises(FileNotFoundError):
        imported(path, tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        imported(path, tmp_path)
    with pytest.raises(FormatVersionError, match="upgrade"):
        imported(path, HEAD.replace("1", "2") + '{"a":1}')
    assert not path.exists()
    imported(path, "[]")
    with pytest.raises(NotAStoreError, match="logstore export"):
        imported(path, path)


def test_rows_that_are_no_events_are_listed(tmp_path: Path) -> None:
    path, old = tmp_path / "events.db", tmp_path / "old.db"
    original(old, [*ROWS, ("x", "s", "{", None), ("y", 5, "{}", "2024-01-01"), (None, "s", "{}", "2024-01-01")])
    with closing(sqlite3.connect(old)) as connection, connection:
        connection.execute("INSERT INTO events VALUES ('z', CAST(x'ff' AS TEXT), '{}', '2024-01-01', NULL)")
        connection.execute("INSERT INTO events VALUES ('w', 's', x'00', '2024-01-01', NULL)")
    result = imported(path, old)
    # SQLite makes text of the 5.
    assert (result.added, result.invalid_count) == (5, 4)
    assert [each.place for each in result.invalid] == [f"row {number} of events" for number in (5, 7, 8, 9)]


# Crashes, and a disk that fails.


def sources(folder: Path) -> list[Path]:
    ours, old = folder / "ours.ndjson", folder / "old.db"
    ours.write_bytes(ndjson(*some(40), *some(40, "t", first=1000)))
    original(old, [(f"e{each}", f"f{each % 2}", '{"method":"m"}', 1.5 + each) for each in range(80)])
    return [ours, old]


def calls_of_opening(path: Path) -> int:
    """Return how many calls of the disk it takes to make a store; what comes then is the import's."""
    disk = FaultyDisk()
    store = OpenStore(disk, path, 1 << 20)
    calls = len(disk.calls)
    store.close(empty=True)
    return calls


@pytest.mark.promise("import-once")
@pytest.mark.parametrize("once", [True, False])
def test_after_a_disk_that_failed_importing_again_adds_the_rest(tmp_path: Path, once: bool) -> None:
    for source in sources(tmp_path):
        for at in every_call(start=calls_of_opening(tmp_path / source.stem / "events.db")):
            path = tmp_path / f"{source.stem}-{at}" / "events.db"
            disk = DyingDisk(at, once=once)
            try:
                result = import_events(path, source, disk=disk)
            except (WriteFailedError, OSError):
                pass
            else:
                assert result.added == 80
            again = import_events(path, source)
            assert (again.added + again.already_there, again.complete) == (80, True)
            assert len(contents(path)) == 80
            assert import_events(path, source).already_there == 80
            if not disk.died:
                break


DYING = """
import os, sys
from pathlib import Path
from logstore.ops.transfer import importing
from logstore.storage.files import Disk
from tests.storage.disks import Fault, FaultyDisk

importing._BATCH_EVENTS = 30

class Dying(FaultyDisk):
    def _ask(self, kind, path):
        self.calls.append((kind, path.name))
        if len(self.calls) >= int(sys.argv[3]):
            os._exit(9)

importing.import_events(Path(sys.argv[1]), Path(sys.argv[2]), disk=Dying())
print("done")
"""


@pytest.mark.promise("import-once")
@pytest.mark.slow
def test_after_a_death_at_any_call_importing_again_adds_the_rest(tmp_path: Path) -> None:
    for source in sources(tmp_path):
        for at in every_call(start=calls_of_opening(tmp_path / source.stem / "events.db"), step=3):
            path = tmp_path / f"{source.stem}-{at}" / "events.db"
            ran = subprocess.run(
                [sys.executable, "-c", DYING, str(path), str(source), str(at)],
                capture_output=True,
                check=False,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            assert ran.returncode in (0, 9), ran.stderr
            again = import_events(path, source)
            assert (again.added + again.already_there, again.complete) == (80, True)
            assert len(contents(path)) == 80
            if ran.returncode == 0:
                break


def test_each_batch_is_durable_before_the_index_has_it(tmp_path: Path) -> None:
    disk = FaultyDisk()
    import_events(tmp_path / "events.db", sources(tmp_path)[0], disk=disk)
    segment = next(
        place for place, (kind, name) in enumerate(disk.calls) if (kind, name[-8:]) == ("create", ".segment")
    )
    after = disk.calls[segment + 1 :]
    assert [kind for kind, name in after if name.endswith(".segment") or name == "segments"][:4] == [
        "write",
        "write",
        "sync",
        "sync_folder",
    ]


@pytest.mark.promise("transfer-memory")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_events(tmp_path: Path) -> None:
    class Made(io.RawIOBase):
        """An export that is made as it is read."""

        def __init__(self, events: int) -> None:
            self._events = iter(some(events))
            self._head = HEAD.encode()
            self._tail = json.dumps({"count": events, "gaps": []}).encode()

        def read(self, size: int = -1) -> bytes:
            if self._head:
                data, self._head = self._head, b""
                return data
            lines = [write_event(event) + b"\n" for event in islice(self._events, 500)]
            if not lines:
                lines, self._tail = [self._tail], b""
            return b"".join(lines)

    peaks: list[int] = []
    for events in (10_000, 40_000):
        source: Any = Made(events)
        stream: IO[bytes] = source
        tracemalloc.start()
        try:
            assert import_events(tmp_path / f"{events}.db", stream).added == events
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    # The events themselves, which the test holds, are some 200 bytes each.
    assert peaks[1] - peaks[0] < 30_000 * 400 + (4 << 20)


# The command.


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    path, file = tmp_path / "events.db", tmp_path / "file"
    file.write_bytes(ndjson(*some(3)))
    result = CliRunner().invoke(main, ["import", str(path), str(file)])
    assert (result.exit_code, result.output) == (0, "3 events added, 0 were there already\n")
    result = CliRunner().invoke(main, ["import", str(path), "-", "--json"], input=file.read_bytes())
    assert result.exit_code == 0
    assert json.loads(result.output) == {
        "added": 0,
        "already_there": 3,
        "dropped": 0,
        "conflict_count": 0,
        "conflicts": [],
        "invalid_count": 0,
        "invalid": [],
        "ended": None,
    }


@pytest.mark.promise("shown-escaped")
def test_the_command_exits_with_1_when_something_was_left_out(tmp_path: Path) -> None:
    path, file = tmp_path / "events.db", tmp_path / "file"
    one, two = some(2)
    imported(path, ndjson(one))
    other = Event(one.id, 0, one.time_us, "s", 0, b'{"other":1}')
    bad = b'{"event_id":"\\u001b[31m"}'
    file.write_bytes(HEAD.encode() + b"\n".join([write_event(other), bad, write_event(two), b"{"]))
    result = CliRunner().invoke(main, ["import", str(path), str(file)])
    assert result.exit_code == 1
    assert "1 events added, 0 were there already" in result.output
    assert "1 events are in conflict" in result.output
    assert "line 2, event 1: the store has another event" in result.output
    assert "1 events cannot be stored" in result.output
    assert "line 3, event 2" in result.output
    assert "line 5" in result.output
    assert "\x1b" not in result.output


def test_a_library_error_is_one_of_ours(tmp_path: Path) -> None:
    with pytest.raises(LogstoreError):
        imported(tmp_path / "events.db", "nothing")
