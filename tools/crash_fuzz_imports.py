"""The parsers of what is imported: exports of this store as JSON, and the SQLite databases of other event stores."""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import io
import json
import random
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from crash_fuzz_files import SEED
from crash_fuzz_inputs import MIB, Input, Target, altered_json, damaged, hostile_json
from crash_kill import BrokenPromiseError
from logstore.errors import LogstoreError
from logstore.ops.transfer.event_json import read_event, write_event
from logstore.ops.transfer.foreign_databases import ForeignEvent
from logstore.ops.transfer.import_sources import Found, ImportSource, LeftOut
from logstore.storage.origin import encode_origin
from logstore.storage.record import FLAG_IMPORTED, FLAG_MODEL, FLAG_PRIMING, Event, encode_frame, frame_at

_TIME_US: Final = 1_790_000_000_000_000
_ID: Final = 3_770_000_000_000_000_000
_HEAD: Final = {"format": "logstore-export", "version": 1, "store_id": "1", "exported_at": "2026-01-31T12:00:00+00:00"}


def check_found(each: Found | LeftOut) -> bool:
    """Check that what is taken can be stored, read and exported again; return whether it was taken.

    Raises:
        BrokenPromiseError: It cannot.
    """
    if isinstance(each, LeftOut):
        (each.place + each.reason).encode()
        return False
    event = each.event
    if isinstance(event, ForeignEvent):
        payload = encode_origin(event.source, event.source_id) + event.payload
        event = Event(_ID, 0, event.time_us, event.stream, event.flags | FLAG_IMPORTED, payload)
    stored = encode_frame(event, SEED)
    if frame_at(stored, 0, SEED) != stored:
        raise BrokenPromiseError(f"an event is imported that cannot be read: {event}")
    if read_event(write_event(event)) != event:
        raise BrokenPromiseError(f"an event is imported that is another one once it is exported: {event}")
    return True


def some_events() -> list[Event]:
    """Return events of all kinds that an export has."""
    payloads = [
        (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"a":[1,2.5,null,"\xc3\xa9"]}}', FLAG_MODEL),
        (b'{"jsonrpc":"2.0","id":1,"result":{}}', FLAG_MODEL | 4 | 8),
        (b'{"jsonrpc":"2.0","id":null,"error":{"code":1,"message":"?"}}', FLAG_MODEL),
        (b'{"method":"x","a":{"b":[[],{}]}}', 0),
        (b"", FLAG_PRIMING),
        (b"\x00\xff bytes", 0),
        (encode_origin("event-store", "7#ab") + b'{"method":"m"}', FLAG_IMPORTED),
    ]
    return [
        Event(_ID + place, _ID + place - 1 if place else 0, _TIME_US + place, "a stream", flags, payload)
        for place, (payload, flags) in enumerate(payloads)
    ]


class _Pieces(io.RawIOBase):
    """Gives its bytes a few at a time, as a pipe may."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data = data
        self._size = size
        self._at = 0

    def read(self, size: int = -1, /) -> bytes:
        size = self._size if size < 0 else min(size, self._size)
        piece = self._data[self._at : self._at + size]
        self._at += len(piece)
        return piece


class ExportTarget(Target):
    """An export as JSON, whole or an event a line, of this store or of the original."""

    name = "export"
    share = 0.5

    def __init__(self) -> None:
        self._events = [json.loads(write_event(event)) for event in some_events()]
        self._foreign = [
            {"event_id": str(number), "stream_id": "s", "message": {"method": "m"}, "timestamp": "2026-01-31T12:00:00"}
            for number in range(4)
        ]
        self._tail = {"count": len(self._events), "gaps": []}

    def draw(self, rng: random.Random) -> Input:
        events = [dict(each) for each in rng.choice((self._events, self._foreign))]
        head = _HEAD if events[0].get("kind") else {}
        if rng.random() < 0.5:
            tree = {**head, "events": events, **(self._tail if head else {})} if rng.random() < 0.8 else events
            data = altered_json(tree, rng)
        else:
            rows = [head, *events, self._tail] if head and rng.random() < 0.8 else events
            data = b"\n".join(
                altered_json(row, rng) if rng.random() < 0.2 else json.dumps(row).encode() for row in rows
            )
        if rng.random() < 0.2:
            data = damaged(data, rng)
        if rng.random() < 0.1:
            data = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b" \n" * 9, b"\0")) + data
        return Input(data, False, (rng.choice((1, 3, 7, 50)),))

    def feed(self, given: Input) -> bool:
        whole = self._read(io.BytesIO(given.data))
        pieces = self._read(_Pieces(given.data, given.numbers[0]))
        if whole[0] != pieces[0] or (whole[1] is None) != (pieces[1] is None):
            raise BrokenPromiseError(f"read in pieces of {given.numbers[0]} it is something else: {whole}; {pieces}")
        return bool(whole[0])

    def _read(self, stream: Any) -> tuple[list[Found | LeftOut], str | None]:
        try:
            with contextlib.closing(ImportSource(stream)) as source:
                found = list(source.events())
                for each in found:
                    check_found(each)
                return found, source.ended
        except LogstoreError as error:
            return [], str(error)


class DatabaseTarget(Target):
    """The database of another event store."""

    name = "database"
    share = 0.1
    memory_bytes = 384 * MIB

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="logstore-fuzz-"))
        self._path = self._folder / "theirs.db"
        rng = random.Random(1)
        self._samples = [_database(rng, harm=0.0) for _ in range(4)]

    def draw(self, rng: random.Random) -> Input:
        if rng.random() < 0.5:
            return Input(_database(rng, harm=0.3), True)
        return Input(damaged(rng.choice(self._samples), rng, self._samples))

    def feed(self, given: Input) -> bool:
        self._path.write_bytes(given.data)
        with contextlib.closing(ImportSource(self._path)) as source:
            return sum(check_found(each) for each in source.events()) > 0

    def close(self) -> None:
        shutil.rmtree(self._folder)


_ORIGINAL: Final = (
    "CREATE TABLE events (event_id TEXT, stream_id TEXT, message_json TEXT, timestamp TEXT, created_at TEXT)"
)
_PERSIST: Final = "CREATE TABLE mcp_events (event_id TEXT, stream_id TEXT, payload TEXT, created_at REAL)"
_COLUMNS: Final = "event_id, stream_id, message_json, timestamp, created_at"
_ODD: Final = (
    f"CREATE TABLE events ({_COLUMNS}, PRIMARY KEY (event_id)) WITHOUT ROWID; "
    "INSERT INTO events VALUES (1, 2, 3, 4, 5)",
    f"CREATE TABLE events (rowid TEXT, oid TEXT, _rowid_ TEXT, {_COLUMNS}); INSERT INTO events (event_id) VALUES (1)",
    "CREATE TABLE events (event_id, stream_id, timestamp); INSERT INTO events VALUES (1, 2, '2026-01-31'); "
    "ALTER TABLE events ADD COLUMN message_json AS (hex(zeroblob(400000000)))",
    "CREATE VIEW events AS WITH RECURSIVE n(event_id) AS (SELECT 1 UNION ALL SELECT event_id + 1 FROM n) "
    "SELECT event_id, event_id AS stream_id, 1 AS message_json, 2 AS timestamp, 3 AS created_at FROM n",
    'CREATE TABLE "a""b\n; DROP TABLE x" (event_id, stream_id, payload, created_at); '
    "INSERT INTO \"a\"\"b\n; DROP TABLE x\" VALUES (1, 's', '{}', 5)",
    f"CREATE TABLE events ({_COLUMNS}); PRAGMA writable_schema = ON; "
    "UPDATE sqlite_master SET name = CAST(x'ff' AS TEXT), tbl_name = CAST(x'ff' AS TEXT)",
    f"CREATE TABLE events ({_COLUMNS}); PRAGMA writable_schema = ON; UPDATE sqlite_master SET name = NULL",
    f"CREATE TABLE events ({_COLUMNS}); PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = 'CREATE TABLE x(y'",
    f"CREATE TABLE events ({_COLUMNS}); PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = 1",
    "PRAGMA application_id = 1280264019",
)


def _database(rng: random.Random, *, harm: float) -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as made:
        made.execute(f"PRAGMA page_size = {rng.choice((512, 1024, 4096))}")
        if rng.random() < harm / 2:
            made.executescript(rng.choice(_ODD))
        else:
            made.execute(rng.choice((_ORIGINAL, _PERSIST)))
            ours = made.execute("SELECT name FROM sqlite_master").fetchone()[0] == "events"
            for number in range(rng.randrange(1, 12)):
                row: list[Any] = [
                    str(number),
                    "stream",
                    '{"method": "m", "params": {}}',
                    "2026-01-31T12:00:00",
                    "2026-01-31",
                ]
                if not ours:
                    row[2] = rng.choice((row[2], _packed(rng)))
                    row[3:] = [1_790_000_000.5]
                if rng.random() < harm:
                    row[rng.randrange(len(row))] = _VALUES[rng.randrange(len(_VALUES))](rng)
                marks = ", ".join(
                    "CAST(? AS TEXT)" if type(each) is bytes and rng.random() < 0.5 else "?" for each in row
                )
                made.execute(f"INSERT INTO {'events' if ours else 'mcp_events'} VALUES ({marks})", row)
        made.commit()
        return bytes(made.serialize())


def _packed(rng: random.Random) -> str:
    data = rng.choice((b'{"method": "m"}', b"{}", hostile_json(rng), b'{"a":"' + b"x" * rng.choice((9, MIB)) + b'"}'))
    packed = gzip.compress(data, mtime=0)
    if rng.random() < 0.2:
        packed = damaged(packed, rng)
    return rng.choice(("gz:", "gz:", "gz:", "zs:", "en:", "")) + base64.b64encode(packed).decode()


@functools.cache
def _bomb(mebibytes: int) -> str:
    """Return a payload of which a few thousand characters become very many bytes."""
    packer = zlib.compressobj(1, wbits=31)
    packed = b"".join(packer.compress(bytes(MIB)) for _ in range(mebibytes)) + packer.flush()
    return "gz:" + base64.b64encode(packed).decode()


_VALUES: Final[tuple[Callable[[random.Random], object], ...]] = (
    lambda _: None,
    lambda rng: rng.choice((0, -1, (1 << 63) - 1, -(1 << 63), 10**12)),
    lambda rng: rng.choice((1e308, -1e308, 253_402_300_800.0, 0.0, -0.5, float("inf"))),
    lambda rng: rng.randbytes(9),
    lambda _: b"\xff\xfe\x00\xed\xa0\x80",
    lambda rng: rng.choice(
        ("", "\0", "x" * 600, "\n", "null", "gz:", "gz:!!", "0001-01-01", "9999-12-31T23:59:59-23:59")
    ),
    lambda rng: hostile_json(rng).decode(errors="replace"),
    lambda rng: hostile_json(rng).decode(errors="replace"),
    _packed,
    lambda rng: _bomb(rng.choice((8, 70, 400))),
)


class LongJsonTarget(Target):
    """JSON of megabytes that is made to take a parser as long, or as much memory, as can be."""

    name = "long-json"
    share = 0.01
    cpu_s = 40.0
    memory_bytes = 768 * MIB

    def draw(self, rng: random.Random) -> Input:
        size = rng.choice((1, 4)) * MIB
        return Input(_LONG[rng.randrange(len(_LONG))](size), True)

    def feed(self, given: Input) -> bool:
        with contextlib.closing(ImportSource(io.BytesIO(given.data))) as source:
            return sum(isinstance(each, Found) for each in source.events()) > 0


_LONG: Final[tuple[Callable[[int], bytes], ...]] = (
    lambda size: b"[" * size,
    lambda size: b'{"a":' * (size // 5),
    lambda size: b"[" + b"1," * (size // 2),
    lambda size: b"[" + b"{}," * (size // 3) + b"{}]",
    lambda size: b'["' + b"x" * size,
    lambda size: b'["' + b'\\"' * (size // 2),
    lambda size: b"[" + b"9" * size + b"]",
    lambda size: b" " * size + b"[]",
    lambda size: b"\n" * size,
    lambda size: b"{}" * (size // 2),
    lambda size: b'{"events":[' + b'{"kind":"dict"},' * (size // 16),
    lambda size: b"{" + b",".join(b'"%d":0' % number for number in range(size // 10)) + b"}",
    lambda size: b'{"format":"logstore-export","version":1,"x":[' + b"[],{}," * (size // 6) + b"0]}",
    lambda size: b"\xff" * size,
    lambda size: b"[" + b'"\xff' * (size // 2) + b"]",
    lambda size: (
        b'{"event_id":"1","stream_id":"s","message":' + b"[[]," * (size // 4) + b"0" + b"]" * (size // 4) + b"}"
    ),
)


IMPORT_TARGETS: Final[tuple[type[Target], ...]] = (ExportTarget, DatabaseTarget, LongJsonTarget)
