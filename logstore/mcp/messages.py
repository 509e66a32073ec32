"""Messages as bytes: what is stored is the JSON that goes over the wire.

A message is a JSON-RPC model of the SDK, a plain dict, or None, which is a priming event: stored so that its id can be
resumed from, never replayed. Whatever would not come back as it was given is refused before anything is written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any, Final

import msgspec
from mcp_types import (
    INTERNAL_ERROR,
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
)
from pydantic import TypeAdapter, ValidationError

from logstore.errors import InvalidMessageError
from logstore.mcp.sdk import split_transport_prefix
from logstore.storage import FLAG_FINAL, FLAG_MODEL, FLAG_PRIMING, Event
from logstore.storage.origin import split_origin
from logstore.storage.record import FLAG_IMPORTED

logger = logging.getLogger("logstore.mcp")

Message = JSONRPCMessage | dict[str, Any]
"""What a store takes and gives back."""

MAX_DEPTH: Final = 200
"""Levels of nesting in a plain dict: the parser that the SDK's client uses stops there."""

_ANSWERS: Final = (JSONRPCResponse, JSONRPCError)
_NO_ANSWERS: Final = (JSONRPCNotification, JSONRPCRequest)
_MODELS: Final = (*_NO_ANSWERS, *_ANSWERS)
_FIELDS: Final = frozenset(name for model in _MODELS for name in model.model_fields)
_ERROR_FIELDS: Final = frozenset(ErrorData.model_fields)
_JSON_TYPES: Final[frozenset[type]] = frozenset({dict, list, str, bool, int, float, type(None)})
_STR_ONLY: Final[frozenset[type]] = frozenset({str})
_LONGEST_KEY_SHOWN: Final = 40

# Straight to bytes: `model_dump_json` makes a str of them first, and takes twice as long.
_dump: Final = {model: TypeAdapter[JSONRPCMessage](model).serializer.to_json for model in _MODELS}
_parse_notification: Final = TypeAdapter[JSONRPCNotification](JSONRPCNotification).validator.validate_json
_NOTIFICATION_START: Final = b'{"jsonrpc":"2.0","method":'
"""How the SDK's serializer begins a notification; a request's id comes before its method."""
_SDK_BITS: Final = FLAG_MODEL | FLAG_IMPORTED
_encode_json = msgspec.json.Encoder().encode
_decode_json = msgspec.json.Decoder().decode


def encode(stream_id: str, message: Message | None) -> tuple[bytes, int]:
    """Return the payload and flags of a message.

    Args:
        stream_id: The stream it goes to; a response to the request of that name ends the request's stream.
        message: What to store.

    Raises:
        InvalidMessageError: It is not JSON, with the path of what is not.
    """
    if message is None:
        return b"", FLAG_PRIMING
    if isinstance(message, _NO_ANSWERS):
        return _encode_model(message), FLAG_MODEL
    if isinstance(message, _ANSWERS):
        return _encode_model(message), FLAG_MODEL | (FLAG_FINAL if _ends_stream(stream_id, message) else 0)
    return _encode_plain(message), 0


def encode_substitute(message: Message | None, problem: InvalidMessageError) -> tuple[bytes, int]:
    """Return what the transport's stream gets instead of a message that cannot be stored.

    A response becomes an error under the same request id: the request's stream must end, or a client waits for ever.
    Anything else becomes a priming event: the stream goes on without it.
    """
    reason = _printable(problem)
    if isinstance(message, _ANSWERS) and message.id is not None:
        logger.error("the response to request %r cannot be stored, an error takes its place: %s", message.id, reason)
        data = ErrorData(code=INTERNAL_ERROR, message=f"the result of this request cannot be sent as JSON: {reason}")
        return _encode_model(JSONRPCError(jsonrpc="2.0", id=message.id, error=data)), FLAG_MODEL | FLAG_FINAL
    method = getattr(message, "method", None)
    logger.error("a message (%r) cannot be stored and is left out: %s", method or type(message).__name__, reason)
    return b"", FLAG_PRIMING


def decode(event: Event) -> Message:
    """Return the message of an event; not for priming events.

    Most are notifications, whose JSON the SDK's own parser turns into the model in 1.3 us; read here and built without
    validation, as what is rarer is, one takes 3.5.

    Raises:
        InvalidMessageError: Something else is stored: the log takes any bytes, from an import too.
    """
    if event.flags & _SDK_BITS == FLAG_MODEL and event.payload.startswith(_NOTIFICATION_START):
        try:
            notification: JSONRPCNotification = _parse_notification(event.payload)
            return notification
        except ValidationError:
            # What is wrong with it is told below.
            pass
    fields = _fields_of(event)
    return _model_of(fields, event) if event.flags & FLAG_MODEL else fields


def on_one_line(event: Event) -> bytes:
    """Return the JSON of an event's message without line breaks; not for priming events.

    Raises:
        InvalidMessageError: As `decode`.
    """
    try:
        return bytes(_encode_json(_fields_of(event)))
    except (RecursionError, msgspec.MsgspecError) as error:
        raise InvalidMessageError("$", f"event {event.id} cannot be sent: {_printable(error)}") from error


def _fields_of(event: Event) -> dict[str, Any]:
    try:
        payload = split_origin(event.payload)[2] if event.flags & FLAG_IMPORTED else event.payload
        fields = _decode_json(payload)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidMessageError("$", f"event {event.id} holds no JSON: {_printable(error)}") from error
    if type(fields) is not dict:
        raise InvalidMessageError("$", f"event {event.id} holds a JSON {_name_of(fields)}, not an object")
    return fields


def _model_of(fields: dict[str, Any], event: Event) -> JSONRPCMessage:
    if not _FIELDS.issuperset(fields):
        # The SDK's parser drops them; here they could be taken for arguments.
        fields = {name: value for name, value in fields.items() if name in _FIELDS}
    if "method" in fields:
        if "id" in fields:
            return JSONRPCRequest.model_construct(**fields)
        return JSONRPCNotification.model_construct(**fields)
    if "error" in fields:
        error = fields["error"]
        if type(error) is not dict:
            raise InvalidMessageError("$.error", f"event {event.id} holds a JSON {_name_of(error)}, not an object")
        known = {name: value for name, value in error.items() if name in _ERROR_FIELDS}
        fields["error"] = ErrorData.model_construct(**known)
        return JSONRPCError.model_construct(**fields)
    return JSONRPCResponse.model_construct(**fields)


def _ends_stream(stream_id: str, message: JSONRPCResponse | JSONRPCError) -> bool:
    """Whether a response is the one that the stream of a request ends with.

    Other streams hold responses too, when somebody stores them there; they go on.
    """
    if message.id is None:
        return False
    request_id = str(message.id)
    return stream_id == request_id or split_transport_prefix(stream_id)[1] == request_id


def _encode_model(message: JSONRPCMessage) -> bytes:
    """Return exactly the JSON that the SDK sends.

    Leaving out what was not set keeps `"id": null` of an error, which `exclude_none` would drop, and adds no
    `"params": null`.
    """
    try:
        dump = _dump.get(type(message))
        if dump is None:
            return message.model_dump_json(by_alias=True, exclude_unset=True).encode()
        return dump(message, by_alias=True, exclude_unset=True)
    except Exception as error:
        # A serializer of a field may raise anything.
        raise InvalidMessageError("$", f"{type(error).__name__}: {_printable(error)}") from error


def _encode_plain(message: object) -> bytes:
    if type(message) is dict:
        try:
            if _has_json_types(message):
                payload = _encode_json(message)
                # The proof that it comes back; what equality overlooks, such as True and 1, the types have settled.
                if _decode_json(payload) == message:
                    return payload
        except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
            pass
    path, reason = _find_offender(message)
    raise InvalidMessageError(path, reason)


def _has_json_types(message: dict[str, Any]) -> bool:
    """Whether everything in a dict is exactly of a type that JSON has, and not too deep. Subclasses are not."""
    # Each container once a level: a list that holds itself twice must not double with every level.
    level: dict[int, Any] = {0: message}
    for _ in range(MAX_DEPTH):
        below: dict[int, Any] = {}
        for container in level.values():
            values: Iterable[Any] = container
            if type(container) is dict:
                if not set(map(type, container)) <= _STR_ONLY:
                    return False
                values = container.values()
            kinds = set(map(type, values))
            if not kinds <= _JSON_TYPES:
                return False
            if dict in kinds or list in kinds:
                below.update((id(value), value) for value in values if type(value) is dict or type(value) is list)
        if not below:
            return True
        level = below
    return False


def _find_offender(message: object) -> tuple[str, str]:
    """Return the path of what makes a message unfit, and why."""
    if type(message) is not dict:
        return "$", f"a message is a JSON-RPC model of the SDK, a plain dict or None, not {_name_of(message)}"
    found = _offender_in(message, "$", 0)
    return found or ("$", "it does not come back from JSON as it is")


def _offender_in(value: Any, path: str, depth: int) -> tuple[str, str] | None:
    if type(value) is dict or type(value) is list:
        if depth >= MAX_DEPTH:
            return path, f"nested deeper than {MAX_DEPTH} levels"
        items = value.items() if type(value) is dict else enumerate(value)
        for key, item in items:
            found = _problem_with_key(key, path) if type(value) is dict else None
            found = found or _offender_in(item, path + _step(key), depth + 1)
            if found is not None:
                return found
        return None
    reason = _problem_with_scalar(value)
    return None if reason is None else (path, reason)


def _problem_with_key(key: object, path: str) -> tuple[str, str] | None:
    if type(key) is not str:
        return path, f"the key {key!r} is {_name_of(key)}, not a str"
    reason = _problem_with_scalar(key)
    return None if reason is None else (path, f"a key {reason}")


def _problem_with_scalar(value: object) -> str | None:
    if type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"holds half of a surrogate pair at character {error.start}, which no JSON text can"
    elif type(value) is float:
        return None if math.isfinite(value) else f"{value} is not a JSON number"
    elif type(value) is int:
        try:
            _decode_json(_encode_json(value))
        except (ValueError, OverflowError, msgspec.MsgspecError):
            return "an integer of too many digits"
    elif type(value) not in _JSON_TYPES:
        return f"{_name_of(value)} is not a JSON type"
    return None


def _step(key: object) -> str:
    if type(key) is str and key.isidentifier() and len(key) <= _LONGEST_KEY_SHOWN:
        return f".{key}"
    if type(key) is str:
        return f"[{key[:_LONGEST_KEY_SHOWN]!a}]"
    return f"[{key}]"


def _printable(error: Exception) -> str:
    """Return an error's text without the half surrogates that it may quote: no log file or message can hold them."""
    return str(error).encode(errors="backslashreplace").decode()


def _name_of(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
