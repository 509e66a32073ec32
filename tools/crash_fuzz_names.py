"""Names, ids and messages: what callers of the store and clients of the server choose."""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from typing import Any, Final

from mcp_types import ErrorData, JSONRPCError, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse
from pydantic_core import PydanticSerializationError

from crash_fuzz_inputs import EXTREMES, LARGE, Input, Target, altered_json
from crash_kill import BrokenPromiseError
from logstore.errors import InvalidMessageError, InvalidStreamError
from logstore.mcp.base import encode_for_transport
from logstore.mcp.messages import decode, encode, on_one_line
from logstore.mcp.scope import SessionScope, name_in_log, request_id_of
from logstore.mcp.sdk import STANDALONE_STREAM, split_transport_prefix
from logstore.mcp.sessions import SessionData, key_of
from logstore.storage.ids import MAX_ID, parse_event_id
from logstore.storage.origin import encode_origin, split_origin
from logstore.storage.record import FLAG_IMPORTED, FLAG_PRIMING, Event, check_stream_name

_TOKEN: Final = "0123456789abcdef" * 2
_TEXTS: Final = (
    "",
    "1",
    "007",
    "-0",
    "-5",
    "%-7",
    "%",
    "%41",
    "%FF",
    "#",
    "##",
    "a" * 600,
    "9" * 500,
    "\0",
    "\ud800",
    "\udcff\ud800",
    "\u2028",
    "\u0663",
    "\u00b2",
    "../..",
    "/",
    "a/b",
    STANDALONE_STREAM,
    "32:0123:1",
    "4:abcd:1",
    "999:" + "x" * 999 + ":1",
    "\u202e\u200b",
    "\U0010ffff",
)


def some_text(rng: random.Random) -> str:
    """Return text that somebody chose to do harm, or any."""
    if rng.random() < 0.6:
        return rng.choice(_TEXTS)
    characters = [chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(rng.randrange(12))]
    return "".join(characters) * rng.choice((1, 1, 1, 60))


class NamesTarget(Target):
    """Names of streams, request ids, event ids, session ids."""

    name = "names"

    def draw(self, rng: random.Random) -> Input:
        text = some_text(rng) + (some_text(rng) if rng.random() < 0.3 else "")
        return Input(text.encode(errors="surrogatepass"), False, (rng.randrange(1 << 16),))

    def feed(self, given: Input) -> bool:
        text = given.data.decode(errors="surrogatepass")
        self._check_scope(text)
        self._check_event_id(text)
        key_of(given.data.decode("latin-1"))
        prefix, rest = split_transport_prefix(text)
        if prefix + rest != text:
            raise BrokenPromiseError(f"{text!r} is split into {prefix!r} and {rest!r}")
        try:
            check_stream_name(text)
        except InvalidStreamError as error:
            str(error).encode()
            return False
        request_id_of(text)
        return True

    def _check_scope(self, text: str) -> None:
        """Check that any request id has a name that can be stored, and is found again by it."""
        request_ids: list[int | str] = [text]
        if text.isascii() and text.isdigit():
            request_ids.append(int(text))
        for request_id in request_ids:
            scope = SessionScope(_TOKEN)
            name = scope.begin(request_id)
            check_stream_name(name)
            if not scope.owns(name) or scope.name_of(str(request_id)) != name:
                raise BrokenPromiseError(f"the stream of request {request_id!r} has two names")
            known = request_id_of(name)
            hashed = name.startswith(f"{_TOKEN}/#") or text == STANDALONE_STREAM
            if known != request_id and not (known is None and hashed):
                raise BrokenPromiseError(f"request {request_id!r} is taken for {known!r}")
            scope.answered(str(request_id), name)
            if scope.running:
                raise BrokenPromiseError(f"request {request_id!r} is answered and still waited for")
        if text:
            check_stream_name(name_in_log("", text))

    def _check_event_id(self, text: str) -> None:
        found = parse_event_id(text)
        if found is not None and (str(found) != text or not 0 < found <= MAX_ID):
            raise BrokenPromiseError(f"{text!r} is taken for the event id {found}")


class _Odd:
    """What is no JSON."""


class MessagesTarget(Target):
    """Messages as they are given to the store, and as they come back from whatever bytes it holds."""

    name = "messages"

    def draw(self, rng: random.Random) -> Input:
        if rng.random() < 0.5:
            return Input(b"", False, (rng.getrandbits(32),))
        sample: Any = rng.choice(
            (
                {"jsonrpc": "2.0", "id": 7, "method": "m", "params": {"a": [1, {}]}},
                {"jsonrpc": "2.0", "id": "7", "result": {"b": 2.5}},
                {"jsonrpc": "2.0", "id": None, "error": {"code": 1, "message": "?", "data": [None]}},
            )
        )
        payload = altered_json(sample, rng) if rng.random() < 0.9 else rng.randbytes(rng.randrange(99))
        flags = rng.choice((0, 2, 6, 16, 18, rng.getrandbits(31)))
        if flags & FLAG_IMPORTED and rng.random() < 0.8:
            origin = encode_origin(rng.choice(("", "s", "x" * 300)), "7#" + "a" * rng.choice((1, 40, 70_000)))
            payload = rng.choice((origin, origin, origin[: rng.randrange(len(origin))])) + payload
        return Input(payload, True, (flags,))

    def feed(self, given: Input) -> bool:
        if not given.forged:
            return self._give(random.Random(given.numbers[0]))
        event = Event(1, 0, 0, "s", given.numbers[0], given.data)
        if event.flags & FLAG_IMPORTED:
            # What its contract says, for whoever asks for the origin alone.
            with contextlib.suppress(ValueError):
                split_origin(event.payload)
        on_one_line(event)
        message = decode(event)
        if isinstance(message, dict):
            encode("s", message)
        else:
            # Built without validation: whoever put other types there gets them back, however deep they are nested.
            with warnings.catch_warnings(), contextlib.suppress(PydanticSerializationError):
                warnings.simplefilter("ignore")
                message.model_dump_json(by_alias=True, exclude_unset=True)
        return True

    def _give(self, rng: random.Random) -> bool:
        message = _message(rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            payload, flags = encode_for_transport("7", message)
            back = None if flags & FLAG_PRIMING else decode(Event(1, 0, 0, "7", flags & ~8, payload))
            try:
                again = encode("7", message)
            except InvalidMessageError as error:
                str(error).encode()
                return False
        if again[0] != payload:
            raise BrokenPromiseError("a message is stored in two ways")
        if isinstance(message, dict) and back != message:
            raise BrokenPromiseError(f"a message comes back as another one: {message!r:.200}")
        return True


def _message(rng: random.Random) -> Any:
    request_id: Any = rng.choice((1, "1", "\ud800", -(1 << 70), "7", 7))
    params: Any = _value(rng, 0)
    params = params if type(params) is dict else {"a": params}
    kind = rng.randrange(6)
    if kind == 0:
        return JSONRPCRequest.model_construct(jsonrpc="2.0", id=request_id, method="m", params=params)
    if kind == 1:
        return JSONRPCNotification.model_construct(jsonrpc="2.0", method=some_text(rng), params=params)
    if kind == 2:
        return JSONRPCResponse.model_construct(jsonrpc="2.0", id=request_id, result=params)
    if kind == 3:
        error = ErrorData.model_construct(code=1, message=some_text(rng), data=params)
        return JSONRPCError.model_construct(jsonrpc="2.0", id=rng.choice((None, request_id)), error=error)
    return params if kind == 4 else _value(rng, 0)


def _value(rng: random.Random, depth: int) -> Any:
    if depth < 6 and rng.random() < 0.5:
        count = rng.randrange(4)
        if rng.random() < 0.5:
            return [_value(rng, depth + 1) for _ in range(count)]
        return {some_text(rng): _value(rng, depth + 1) for _ in range(count)}
    if rng.random() < 0.02:
        knot: list[Any] = []
        knot.append(rng.choice((knot, [knot, knot])))
        return knot
    if rng.random() < 0.03:
        deep: Any = 1
        for _ in range(rng.choice((150, 199, 210, 3_000))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    return rng.choice(
        (
            None,
            True,
            1,
            -1,
            rng.choice(EXTREMES),
            rng.choice(LARGE),
            1 << 64,
            10**400,
            10**5_000,
            0.0,
            -0.0,
            1e308,
            5e-324,
            rng.random(),
            math.nan,
            math.inf,
            b"x",
            (1, 2),
            {1, 2},
            {1: 2},
            _Odd(),
            some_text(rng),
            some_text(rng),
        )
    )


class SessionDataTarget(Target):
    """What the registry has of a session."""

    name = "session-data"

    def draw(self, rng: random.Random) -> Input:
        sample = {"scope": _TOKEN, "credential": "c", "initialize": "e30="}
        return Input(altered_json(sample, rng), True)

    def feed(self, given: Input) -> bool:
        try:
            SessionData.decode(given.data)
        except (ValueError, RecursionError):
            # Its contract; whoever calls it takes such a session for unknown.
            return False
        return True


NAME_TARGETS: Final[tuple[type[Target], ...]] = (NamesTarget, MessagesTarget, SessionDataTarget)
