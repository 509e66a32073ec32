"""One event as JSON, as an export holds it.

```
{"event_id": "…", "stream_id": "…", "timestamp": "2026-01-31T12:00:00.000000+00:00", "prev": "…", "kind": "model",
 "message": {…}, "final": true, "request": true, "imported": {"source": "…", "source_id": "…"}}
```

`kind` is `model` (a JSON-RPC message of the SDK), `dict` (another JSON object), `priming` (`message` is null), or
`bytes`: a payload that is none of these, in `payload_base64`, with its `flags` as they are. `prev` is null where the
writer did not know the stream's previous event; `final`, `request` and `imported` are there where they apply.
The bytes of a message are those that are stored, so that it comes back as it was.
"""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

import msgspec

from logstore.storage.ids import parse_event_id
from logstore.storage.origin import encode_origin, split_origin
from logstore.storage.record import (
    FLAG_FINAL,
    FLAG_IMPORTED,
    FLAG_MODEL,
    FLAG_PRIMING,
    FLAG_REQUEST,
    MAX_TIME_US,
    Event,
    check_stream_name,
)

EXPORT_FORMAT: Final = "logstore-export"
EXPORT_VERSION: Final = 1
MAX_DEPTH: Final = 200
"""Levels of nesting in a message: the parser that the SDK's client uses stops there."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_KIND_FLAGS: Final = {"model": FLAG_MODEL, "dict": 0, "priming": FLAG_PRIMING}
_MARKS: Final = FLAG_FINAL | FLAG_REQUEST | FLAG_IMPORTED
_ANY_FLAGS: Final = (1 << 31) - 1
_LINE_BREAK: Final = re.compile(rb"[\r\n]")


class Origin(msgspec.Struct, frozen=True):
    """Where an imported event came from."""

    source: str
    source_id: str


class ExportedEvent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The members of an event in an export; see above."""

    event_id: str
    stream_id: str
    timestamp: str
    prev: str | None
    kind: Literal["model", "dict", "priming", "bytes"]
    message: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    payload_base64: str | None = None
    flags: Annotated[int, msgspec.Meta(ge=0, le=_ANY_FLAGS)] = 0
    final: bool = False
    request: bool = False
    imported: Origin | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ExportedEvent).decode
_parse = msgspec.json.Decoder().decode
_NULL: Final = msgspec.Raw(b"null")


def iso_time(time_us: int) -> str:
    """Return a time, given in microseconds since 1970, as text."""
    return (_EPOCH + timedelta(microseconds=time_us)).isoformat(timespec="microseconds")


def time_us_of(moment: datetime) -> int:
    """Return microseconds since 1970; a time without a zone is UTC."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // _MICROSECOND


def event_time_us(text: str) -> int:
    """Return the time of an event that is given in ISO form.

    Raises:
        ValueError: It is no time, or none that an event can have.
    """
    time_us = time_us_of(datetime.fromisoformat(text))
    if not 0 <= time_us <= MAX_TIME_US:
        raise ValueError(f"the time {text} is not between the years 1970 and 9999")
    return time_us


def write_event(event: Event) -> bytes:
    """Return an event as JSON on one line."""
    exported = ExportedEvent(
        event_id=event.event_id,
        stream_id=event.stream,
        timestamp=iso_time(event.time_us),
        prev=str(event.prev) if event.prev else None,
        kind="bytes",
        final=bool(event.flags & FLAG_FINAL),
        request=bool(event.flags & FLAG_REQUEST),
    )
    if not _put_message(exported, event):
        exported.payload_base64 = base64.b64encode(event.payload).decode()
        exported.flags = event.flags
    return _encode(exported)


def _put_message(exported: ExportedEvent, event: Event) -> bool:
    """Put the payload into an export as a person reads it, if that keeps all there is to it."""
    payload, imported = event.payload, None
    if event.flags & FLAG_IMPORTED:
        try:
            source, source_id, payload = split_origin(payload)
        except ValueError:
            return False
        imported = Origin(source, source_id)
        if encode_origin(source, source_id) + payload != event.payload:
            return False
    kind = event.flags & ~_MARKS
    if kind == FLAG_PRIMING and not payload:
        exported.kind, exported.message = "priming", _NULL
    elif kind in (FLAG_MODEL, 0) and not _LINE_BREAK.search(payload):
        try:
            message = message_of(payload)
        except ValueError:
            return False
        if kind and not is_json_rpc(message):
            return False
        exported.kind, exported.message = ("model" if kind else "dict"), msgspec.Raw(payload)
    else:
        return False
    exported.imported = imported
    return True


def read_event(data: bytes) -> Event:
    """Return the event that an export holds as JSON.

    Raises:
        ValueError: It is not one, with the reason.
    """
    exported = _decode(data)
    event_id, prev = _id_of(exported.event_id), 0 if exported.prev is None else _id_of(exported.prev)
    if prev >= event_id:
        raise ValueError(f"prev is {prev}, which does not come before the event itself")
    check_stream_name(exported.stream_id)
    payload, flags = _payload_of(exported)
    time_us = event_time_us(exported.timestamp)
    return Event(event_id, prev, time_us, exported.stream_id, flags, payload)


def _id_of(text: str) -> int:
    event_id = parse_event_id(text)
    if event_id is None:
        raise ValueError(f"{text[:40]!r} is not an event id")
    return event_id


def _payload_of(exported: ExportedEvent) -> tuple[bytes, int]:
    if exported.kind == "bytes":
        if exported.payload_base64 is None:
            raise ValueError("payload_base64 is missing")
        return base64.b64decode(exported.payload_base64, validate=True), exported.flags
    if isinstance(exported.message, msgspec.UnsetType):
        raise ValueError("the message is missing")
    payload = b"" if exported.kind == "priming" else bytes(exported.message)
    if exported.kind == "priming":
        if bytes(exported.message) != b"null":
            raise ValueError("a priming event has a message")
    else:
        if _LINE_BREAK.search(payload):
            # Laid out by another program; what was stored is on one line.
            payload = msgspec.json.format(payload, indent=-1)
        message = message_of(payload)
        if exported.kind == "model" and not is_json_rpc(message):
            raise ValueError("the message is no JSON-RPC request, notification or response")
    flags = _KIND_FLAGS[exported.kind] | FLAG_FINAL * exported.final | FLAG_REQUEST * exported.request
    if exported.imported is not None:
        payload = encode_origin(exported.imported.source, exported.imported.source_id) + payload
        flags |= FLAG_IMPORTED
    return payload, flags


def message_of(payload: bytes) -> dict[str, Any]:
    """Return the JSON object that a payload is.

    Raises:
        ValueError: It is no JSON, or no object, or nested too deeply to be sent.
    """
    try:
        message = _parse(payload)
    except RecursionError:
        raise ValueError(f"the message is nested deeper than {MAX_DEPTH} levels") from None
    except msgspec.MsgspecError as error:
        # A ValueError only in later releases of msgspec.
        raise ValueError(str(error)) from error
    if type(message) is not dict:
        raise ValueError(f"the message is a JSON {type(message).__name__}, not an object")
    if _is_deep(message):
        raise ValueError(f"the message is nested deeper than {MAX_DEPTH} levels")
    return message


def _is_deep(message: dict[str, Any]) -> bool:
    level: list[Any] = [message]
    for _ in range(MAX_DEPTH):
        values = [value for each in level for value in (each.values() if type(each) is dict else each)]
        level = [value for value in values if type(value) is dict or type(value) is list]
        if not level:
            return False
    return True


def is_json_rpc(message: dict[str, Any]) -> bool:
    """Whether a JSON object is a message that the SDK could have sent."""
    if message.get("jsonrpc") != "2.0" or type(message.get("id", 0)) not in (str, int, type(None)):
        return False
    if "method" in message:
        params = message.get("params")
        return (
            type(message["method"]) is str
            and (params is None or type(params) is dict)
            and message.get("id", 0) is not None
        )
    if "error" in message:
        error = message["error"]
        return (
            "id" in message
            and type(error) is dict
            and type(error.get("code")) is int
            and type(error.get("message")) is str
        )
    return type(message.get("result")) is dict and message.get("id") is not None
