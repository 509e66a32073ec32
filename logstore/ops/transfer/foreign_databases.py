"""Events that other event stores wrote, as this one can take them.

Known are the SQLite tables of the original event store, `events(event_id, stream_id, message_json, timestamp,
created_at)`, and of mcp-persist, `mcp_events(event_id, stream_id, payload, created_at)`, of whatever name; and the
original's JSON, objects of the members `event_id stream_id message timestamp created_at`, or `message_json` as text.

A foreign event is known again by its id there together with a hash of its stream, time and message: so it is the same
event in a copy of the database, in the export of it and after the oldest ones were deleted there, and event 1 of one
server is not that of another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from logstore.errors import DamageError, NotAStoreError
from logstore.ops.transfer.event_json import event_time_us, is_json_rpc, message_of
from logstore.storage.database import connect
from logstore.storage.record import FLAG_MODEL, FLAG_PRIMING, MAX_BODY_BYTES, check_stream_name
from logstore.storage.schema import APPLICATION_ID

ORIGINAL: Final = "event-store"
"""The source of events of the original event store."""
MCP_PERSIST: Final = "mcp-persist"
"""The source of events of mcp-persist."""
SQLITE_MAGIC: Final = b"SQLite format 3\0"

_DIGEST_DIGITS: Final = 16
_LATEST_S: Final = 253_402_300_799
"""The last second of the year 9999."""
_GZIP: Final = "gz:"
_UNREADABLE: Final = {"zs:": "compressed with zstd", "en:": "encrypted", "ea:": "encrypted"}
_GZIP_WINDOW: Final = zlib.MAX_WBITS | 16


class ForeignEvent(NamedTuple):
    """An event of another store.

    Attributes:
        source: Which kind of store.
        source_id: Its id there, and what tells it from an event of that id elsewhere.
        stream: Name of the stream.
        time_us: When it was recorded, microseconds since 1970.
        flags: `FLAG_MODEL` for a message that the SDK could have sent; the end of a request's stream is not marked,
            since streams of these stores may hold those of several sessions.
        payload: The message.
    """

    source: str
    source_id: str
    stream: str
    time_us: int
    flags: int
    payload: bytes


class ForeignRow(NamedTuple):
    """A row of a foreign database.

    Attributes:
        place: Where it is.
        source: Which kind of store.
        members: Its columns.
    """

    place: str
    source: str
    members: dict[str, Any]


def foreign_rows(path: Path) -> Iterator[ForeignRow]:
    """Yield the events of a foreign SQLite database, which is left as it is.

    Raises:
        NotAStoreError: It holds no events that are known, or is a store of ours.
        DamageError: SQLite cannot read it.
    """
    at_rest = not path.with_name(f"{path.name}-wal").exists()
    try:
        with closing(connect(path, write=False, immutable=at_rest)) as connection:
            # A text that is no UTF-8 spoils its own row, and no other.
            connection.text_factory = lambda data: data.decode(errors="surrogateescape")
            # One moment, whatever the database's owner writes meanwhile.
            connection.execute("BEGIN")
            for table, source, columns in _tables(connection, path):
                listed = ", ".join(map(_quoted, columns))
                for rowid, *values in connection.execute(
                    f"SELECT rowid, {listed} FROM {_quoted(table)} ORDER BY rowid"
                ):
                    yield ForeignRow(f"row {rowid} of {table}", source, dict(zip(columns, values, strict=True)))
    except sqlite3.Error as error:
        raise DamageError(path, 0, 0, f"SQLite says: {error}") from error


def _tables(connection: sqlite3.Connection, path: Path) -> list[tuple[str, str, list[str]]]:
    """Return name, kind and columns of each table that holds events."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application == APPLICATION_ID:
        raise NotAStoreError(
            f"{path} is the catalogue of a store like this one, which holds no events itself; export that store with "
            f"`logstore export {path} FILE`, and import the file"
        )
    names = [str(name) for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found: list[tuple[str, str, list[str]]] = []
    for name in names:
        columns = {str(row[1]) for row in connection.execute(f"PRAGMA table_info({_quoted(name)})")}
        if columns >= {"event_id", "stream_id", "message_json"}:
            known = ["event_id", "stream_id", "message_json", "timestamp", "created_at"]
            found.append((name, ORIGINAL, [column for column in known if column in columns]))
        elif columns >= {"event_id", "stream_id", "payload", "created_at"}:
            found.append((name, MCP_PERSIST, ["event_id", "stream_id", "payload", "created_at"]))
    if not found:
        raise NotAStoreError(
            f"{path} holds no events that can be imported (tables: {', '.join(sorted(names)) or 'none'}); wanted is "
            "events(event_id, stream_id, message_json, timestamp, created_at), or a table of mcp-persist"
        )
    return found


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def foreign_event(source: str, members: dict[str, Any]) -> ForeignEvent:
    """Return an event of another store, given its members.

    Raises:
        ValueError: It cannot be stored, with the reason.
    """
    event_id, stream = members.get("event_id"), members.get("stream_id")
    if type(event_id) is int:
        event_id = str(event_id)
    if not isinstance(event_id, str) or not event_id:
        raise ValueError("event_id is missing, or neither text nor an integer")
    if not isinstance(stream, str):
        raise ValueError("stream_id is missing, or no text")
    check_stream_name(stream)
    time_us = _time_us(members)
    message = _message(members)
    payload = b"" if message is None else msgspec.json.encode(message)
    flags = FLAG_PRIMING if message is None else FLAG_MODEL if is_json_rpc(message) else 0
    digest = hashlib.sha256(msgspec.json.encode((stream, time_us)) + _canonical(message)).hexdigest()
    # Half of a surrogate pair has no bytes.
    shown = event_id.encode(errors="backslashreplace").decode()
    return ForeignEvent(source, f"{shown}#{digest[:_DIGEST_DIGITS]}", stream, time_us, flags, payload)


def _canonical(message: dict[str, Any] | None) -> bytes:
    """Return the same bytes for the same message, however it was written."""
    return json.dumps(message, sort_keys=True, separators=(",", ":")).encode()


def _time_us(members: dict[str, Any]) -> int:
    """Return the time of an event in microseconds since 1970; text without a zone is UTC, a number is seconds."""
    for name in ("timestamp", "created_at"):
        moment = members.get(name)
        if moment is None:
            continue
        if isinstance(moment, str):
            return event_time_us(moment)
        if type(moment) in (int, float) and 0 <= moment <= _LATEST_S:
            return round(float(moment) * 1_000_000)
        raise ValueError(f"{name} is no time: {str(moment)[:40]}")
    raise ValueError("neither timestamp nor created_at says when it was recorded")


def _message(members: dict[str, Any]) -> dict[str, Any] | None:
    """Return the message of an event, None for a priming event."""
    if "message" in members:
        # Once more through the parser that will read it: Python's takes what is no JSON.
        text = json.dumps(members["message"])
    elif "payload" in members:
        text = _unpacked(members["payload"])
    elif "message_json" in members:
        text = members["message_json"]
    else:
        raise ValueError("the message is missing")
    if not isinstance(text, str):
        raise ValueError(f"the message is a {type(text).__name__}, not text")
    return None if text in ("", "null") else message_of(text.encode())


def _unpacked(payload: object) -> str:
    """Return a payload of mcp-persist as text.

    Source: `mcp_persist/compression.py` and `encryption.py` mark payloads by their first three characters.
    """
    if not isinstance(payload, str):
        raise ValueError(f"the payload is a {type(payload).__name__}, not text")
    if payload[:3] in _UNREADABLE:
        raise ValueError(f"the payload is {_UNREADABLE[payload[:3]]}; copy the database without that first")
    if not payload.startswith(_GZIP):
        return payload
    try:
        packed = base64.b64decode(payload[len(_GZIP) :], validate=True)
        unpacker = zlib.decompressobj(wbits=_GZIP_WINDOW)
        data = unpacker.decompress(packed, MAX_BODY_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"the payload cannot be decompressed: {error}") from error
    if not unpacker.eof:
        raise ValueError(f"the compressed payload is cut off, or larger than {MAX_BODY_BYTES} bytes")
    return data.decode()
