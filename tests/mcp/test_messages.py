"""Messages come back as they were given, or are refused by the path of what cannot."""

from __future__ import annotations

import math
from collections import OrderedDict
from datetime import date
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp_types import (
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    jsonrpc_message_adapter,
)

from logstore.errors import InvalidMessageError
from logstore.mcp.messages import MAX_DEPTH, Message, decode, encode, encode_substitute, on_one_line
from logstore.storage.origin import encode_origin, split_origin
from logstore.storage.record import FLAG_FINAL, FLAG_IMPORTED, FLAG_MODEL, FLAG_PRIMING, Event

text = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=20)
objects = st.dictionaries(text, values)
request_ids = text | st.integers()

models: st.SearchStrategy[JSONRPCMessage] = st.one_of(
    st.builds(JSONRPCRequest, jsonrpc=st.just("2.0"), id=request_ids, method=text, params=objects),
    st.builds(JSONRPCRequest, jsonrpc=st.just("2.0"), id=request_ids, method=text),
    st.builds(JSONRPCNotification, jsonrpc=st.just("2.0"), method=text, params=st.none() | objects),
    st.builds(JSONRPCNotification, jsonrpc=st.just("2.0"), method=text),
    st.builds(JSONRPCResponse, jsonrpc=st.just("2.0"), id=request_ids, result=objects),
    st.builds(
        JSONRPCError,
        jsonrpc=st.just("2.0"),
        id=st.none() | request_ids,
        error=st.builds(ErrorData, code=st.integers(), message=text, data=values)
        | st.builds(ErrorData, code=st.integers(), message=text),
    ),
)


def stored(message: Message | None, stream_id: str = "s") -> Event:
    payload, flags = encode(stream_id, message)
    return Event(1, 0, 0, stream_id, flags, payload)


def same_types(left: object, right: object) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same_types(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_types, left, right))
    return left == right


@pytest.mark.promise("message-comes-back")
@given(objects)
def test_a_plain_dict_comes_back_with_its_values_types_and_order(message: dict[str, Any]) -> None:
    event = stored(message)
    assert event.flags == 0
    assert same_types(decode(event), message)


@pytest.mark.promise("message-comes-back")
@given(models)
def test_a_model_comes_back_equal_as_the_sdk_parses_and_sends_it(message: JSONRPCMessage) -> None:
    event = stored(message)
    wire = message.model_dump_json(by_alias=True, exclude_unset=True)
    assert event.payload == wire.encode()
    back = decode(event)
    assert not isinstance(back, dict)
    assert back == jsonrpc_message_adapter.validate_json(wire)
    assert back.model_dump_json(by_alias=True, exclude_unset=True) == wire


@pytest.mark.promise("message-comes-back")
def test_an_error_without_an_id_keeps_its_null() -> None:
    error = JSONRPCError(jsonrpc="2.0", id=None, error=ErrorData(code=-32700, message="?"))
    assert b'"id":null' in stored(error).payload
    assert decode(stored(error)) == error


@pytest.mark.promise("import-foreign")
@given(models | objects, text, text)
def test_an_imported_message_comes_back_without_where_it_came_from(
    message: Message, source: str, source_id: str
) -> None:
    event = stored(message)
    payload = encode_origin(source, source_id) + event.payload
    imported = Event(1, 0, 0, "s", event.flags | FLAG_IMPORTED, payload)
    assert decode(imported) == decode(event)
    assert split_origin(payload) == (source, source_id, event.payload)


@pytest.mark.parametrize("length", [0, 31, 32, 255, 256, 65_535, 65_536])
def test_an_origin_of_any_length_is_split_off(length: int) -> None:
    source_id = "x" * length
    assert split_origin(encode_origin("s", source_id) + b"{}") == ("s", source_id, b"{}")


@pytest.mark.parametrize(
    "payload", [b"", b"{}", b"\x92", b"\x92\xa1a", b"\x92\x01\x02", b"\x92\xa1a\xa5b", b"\x92\xd9"]
)
def test_an_imported_payload_without_origin_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="imported event"):
        split_origin(payload)


def test_a_priming_event_has_no_payload() -> None:
    assert encode("s", None) == (b"", FLAG_PRIMING)


class Colour(IntEnum):
    RED = 1


class Word(StrEnum):
    YES = "yes"


class Text(str):
    __slots__ = ()


def nested(levels: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(levels - 1):
        value = [value]
    return {"a": value}


knot: list[Any] = []
knot += [knot, knot]


@pytest.mark.promise("not-json-refused")
@pytest.mark.parametrize(
    ("message", "path", "reason"),
    [
        ({"a": math.nan}, "$.a", "nan is not a JSON number"),
        ({"a": {"b": [1, -math.inf]}}, "$.a.b[1]", "-inf is not"),
        ({"a": b"x"}, "$.a", "bytes is not a JSON type"),
        ({"a": [{"b c": (1, 2)}]}, "$.a[0]['b c']", "tuple is not"),
        ({"a": {1: 2}}, "$.a", "the key 1 is int, not a str"),
        ({1: 2}, "$", "the key 1 is int"),
        ({True: 2}, "$", "the key True is bool"),
        ({Text("a"): 2}, "$", "not a str"),
        ({"a": {1, 2}}, "$.a", "set is not"),
        ({"a": date(2026, 1, 1)}, "$.a", "datetime.date is not"),
        ({"a": Decimal(1)}, "$.a", "decimal.Decimal is not"),
        ({"a": Colour.RED}, "$.a", "Colour is not"),
        ({"a": Word.YES}, "$.a", "Word is not"),
        ({"a": Text("x")}, "$.a", "Text is not"),
        ({"a": OrderedDict(b=1)}, "$.a", "OrderedDict is not"),
        (OrderedDict(b=1), "$", "not collections.OrderedDict"),
        ({"a": object()}, "$.a", "object is not"),
        ({"a": "x\udc80"}, "$.a", "half of a surrogate pair at character 1"),
        ({"a": {"\udc80": 1}}, "$.a", "a key holds half of a surrogate pair"),
        ({"a": 10**5000}, "$.a", "an integer of too many digits"),
        (nested(MAX_DEPTH + 1), "$.a" + "[0]" * (MAX_DEPTH - 1), f"deeper than {MAX_DEPTH} levels"),
        (nested(100_000), "$.a" + "[0]" * (MAX_DEPTH - 1), "deeper than"),
        ({"a": knot}, "$.a" + "[0]" * (MAX_DEPTH - 1), "deeper than"),
        ([1], "$", "a plain dict or None, not list"),
        ("text", "$", "not str"),
        (ErrorData(code=1, message="not a message"), "$", "not mcp_types"),
    ],
)
def test_what_is_not_json_is_refused_by_its_path(message: Any, path: str, reason: str) -> None:
    with pytest.raises(InvalidMessageError) as caught:
        encode("s", message)
    assert caught.value.path == path
    assert reason in str(caught.value)
    str(caught.value).encode()


def test_the_deepest_dict_that_is_taken_comes_back() -> None:
    message = nested(MAX_DEPTH)
    assert decode(stored(message)) == message


def test_a_list_that_stands_in_two_places_is_no_circle() -> None:
    shared = [1, [2]]
    assert decode(stored({"a": shared, "b": [shared, shared]})) == {"a": [1, [2]], "b": [[1, [2]], [1, [2]]]}


def test_a_model_that_cannot_be_sent_is_refused() -> None:
    message = JSONRPCNotification(jsonrpc="2.0", method="m", params={"text": "\udc80"})
    with pytest.raises(InvalidMessageError, match="surrogates not allowed"):
        encode("s", message)


def response(request_id: int | str, result: dict[str, Any] | None = None) -> JSONRPCResponse:
    return JSONRPCResponse(jsonrpc="2.0", id=request_id, result=result or {})


@pytest.mark.promise("replay-ends-at-response")
@pytest.mark.parametrize(
    ("stream_id", "message", "final"),
    [
        ("1", response(1), True),
        ("1", response("1"), True),
        ("4:abcd:1", response(1), True),
        ("4:abcd:1", response("4:abcd:1"), True),
        ("1", JSONRPCError(jsonrpc="2.0", id=1, error=ErrorData(code=1, message="")), True),
        ("_GET_stream", JSONRPCError(jsonrpc="2.0", id=None, error=ErrorData(code=1, message="")), False),
        ("None", JSONRPCError(jsonrpc="2.0", id=None, error=ErrorData(code=1, message="")), False),
        ("1", response(2), False),
        ("1", JSONRPCRequest(jsonrpc="2.0", id=1, method="m"), False),
        ("1", JSONRPCNotification(jsonrpc="2.0", method="m"), False),
        ("1", {"jsonrpc": "2.0", "id": 1, "result": {}}, False),
    ],
)
def test_only_the_response_to_the_stream_s_request_ends_it(stream_id: str, message: Message, final: bool) -> None:
    assert bool(encode(stream_id, message)[1] & FLAG_FINAL) is final


@pytest.mark.promise("unsendable-answered")
def test_a_response_that_cannot_be_stored_becomes_an_error_for_the_same_request() -> None:
    problem = InvalidMessageError("$", "the text \udc80 cannot be sent")
    payload, flags = encode_substitute(response("r\u00e9", {"a": "\udc80"}), problem)
    assert flags == FLAG_MODEL | FLAG_FINAL
    substitute = decode(Event(1, 0, 0, "s", flags, payload))
    assert isinstance(substitute, JSONRPCError)
    assert substitute.id == "r\u00e9"
    assert substitute.error.code == -32603
    assert "the text \\udc80 cannot be sent" in substitute.error.message


@pytest.mark.promise("unsendable-answered")
def test_a_notification_that_cannot_be_stored_leaves_a_priming_event() -> None:
    message = JSONRPCNotification(jsonrpc="2.0", method="m", params={"text": "\udc80"})
    assert encode_substitute(message, InvalidMessageError("$", "surrogates")) == (b"", FLAG_PRIMING)


@pytest.mark.parametrize(
    ("payload", "flags"),
    [
        (b"", FLAG_MODEL),
        (b"\xff", 0),
        (b'{"a": "\xff"}', 0),
        (b"[1]", 0),
        (b"7", FLAG_MODEL),
        (b'"method"', FLAG_MODEL),
        (b"[" * 100_000, FLAG_MODEL),
        (b'{"a":' * 100_000, 0),
        (b'{"jsonrpc":"2.0","id":1,"error":"?"}', FLAG_MODEL),
        (b'{"jsonrpc":"2.0","id":1,"error":[1]}', FLAG_MODEL),
        (b"{}", FLAG_IMPORTED),
        (b"\x92\xa1a\xa1b{", FLAG_IMPORTED | FLAG_MODEL),
    ],
)
def test_what_is_no_message_is_told_as_such(payload: bytes, flags: int) -> None:
    event = Event(7, 0, 0, "s", flags, payload)
    with pytest.raises(InvalidMessageError, match="event 7 holds"):
        decode(event)
    if b'"error"' not in payload:
        with pytest.raises(InvalidMessageError, match="event 7 holds"):
            on_one_line(event)


@pytest.mark.parametrize("name", ["_fields_set", "cls", "self", "extra"])
def test_members_that_the_sdk_does_not_know_are_dropped_as_its_parser_does(name: str) -> None:
    for wire in (
        '{"jsonrpc":"2.0","id":1,"result":{},"%s":5}',
        '{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"","%s":5}}',
    ):
        text = wire % name
        back = decode(Event(1, 0, 0, "s", FLAG_MODEL, text.encode()))
        assert not isinstance(back, dict)
        assert back == jsonrpc_message_adapter.validate_json(text)
        assert back.model_dump_json(exclude_unset=True) == jsonrpc_message_adapter.validate_json(text).model_dump_json(
            exclude_unset=True
        )


def test_a_message_laid_out_in_lines_is_put_on_one() -> None:
    event = Event(1, 0, 0, "s", 0, b'{"a":\r\n [1,\n 2.5]}')
    assert on_one_line(event) == b'{"a":[1,2.5]}'
