"""What a client of the HTTP endpoint controls: headers and bodies, through the whole app."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
from collections import deque
from collections.abc import Iterable
from typing import Any, ClassVar, Final, NamedTuple

from mcp.server.mcpserver import MCPServer
from starlette.types import Message, Scope

from crash_fuzz_inputs import Input, Target, altered_json, damaged, hostile_json
from crash_kill import BrokenPromiseError
from logstore.mcp import InMemoryEventStore, layer, resumable_http_app
from logstore.mcp.layer import ResumeLayer
from logstore.mcp.scope import request_id_of
from logstore.mcp.sessions import key_of
from logstore.storage.origin import encode_origin

_INPUTS_A_SERVER: Final = 300
_ANSWER_S: Final = 10.0
_INITIALIZE: Final[dict[str, Any]] = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "client", "version": "1"},
    },
}
_INITIALIZED: Final = {"jsonrpc": "2.0", "method": "notifications/initialized"}
_CALL: Final[dict[str, Any]] = {
    "jsonrpc": "2.0",
    "id": 7,
    "method": "tools/call",
    "params": {"name": "echo", "arguments": {"text": "hello"}},
}
_PING: Final = {"jsonrpc": "2.0", "id": "p", "method": "ping"}
_HEADERS: Final = (
    (b"host", b"127.0.0.1:8000"),
    (b"accept", b"application/json, text/event-stream"),
    (b"content-type", b"application/json"),
)

Headers = Iterable[tuple[bytes, bytes]]


class Answer(NamedTuple):
    """What the app sent."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class _Server:
    """The app in this process, its loop, and one session.

    Attributes:
        session_id: Of the session.
        store: Where its events are.
    """

    def __init__(self) -> None:
        # A refusal takes as long as a look; here nobody measures it.
        layer.__dict__["_REFUSAL_S"] = 0.0
        logging.getLogger("mcp").setLevel(logging.CRITICAL)
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._on_error)
        self._errors: list[str] = []
        self.store = InMemoryEventStore()
        server = MCPServer("fuzzed")

        @server.tool()
        def echo(text: str) -> str:  # pyright: ignore[reportUnusedFunction]
            """Return what was given."""
            return text

        self._app = resumable_http_app(server, self.store)
        self.layer = _layer_of(self._app)
        self._lifespan = self._app.router.lifespan_context(self._app)
        self._run(self._lifespan.__aenter__())
        opened = self.ask("POST", _HEADERS, [json.dumps(_INITIALIZE).encode()])
        session_id = next(value for name, value in opened.headers if name == b"mcp-session-id")
        self.session_id = session_id
        self.ask("POST", self.headers(), [json.dumps(_INITIALIZED).encode()])

    def headers(self, **others: bytes) -> list[tuple[bytes, bytes]]:
        """Return the headers of a request of the session."""
        named = [(name.replace("_", "-").encode(), value) for name, value in others.items()]
        return [*_HEADERS, (b"mcp-session-id", self.session_id), *named]

    def _on_error(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    def _run(self, coroutine: Any) -> Any:
        found = self._loop.run_until_complete(coroutine)
        if self._errors:
            raise BrokenPromiseError(f"the event loop says: {self._errors}")
        return found

    def ask(self, method: str, headers: Headers, body: list[bytes], path: str = "/mcp") -> Answer:
        """Send one request and return the answer; a client that is streamed to goes away soon."""
        answer: Answer = self._run(asyncio.wait_for(self._ask(method, list(headers), body, path), _ANSWER_S))
        return answer

    async def _ask(self, method: str, headers: list[tuple[bytes, bytes]], body: list[bytes], path: str) -> Answer:
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(errors="surrogateescape"),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        parts = deque(body or [b""])
        gone = asyncio.Event()
        sent: list[Message] = []

        async def receive() -> Message:
            if parts:
                part = parts.popleft()
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)
            if message["type"] == "http.response.start" and method == "GET":
                asyncio.get_running_loop().call_later(0.003, gone.set)

        await self._app(scope, receive, send)
        gone.set()
        starts = [each for each in sent if each["type"] == "http.response.start"]
        if len(starts) != 1 or sent[0] is not starts[0]:
            raise BrokenPromiseError(f"a response begins {len(starts)} times")
        return Answer(
            starts[0]["status"],
            list(starts[0]["headers"]),
            b"".join(each.get("body", b"") for each in sent if each["type"] == "http.response.body"),
        )

    def append(self, stream: str, payload: bytes, flags: int) -> str:
        """Put an event into the log of the session."""

        async def put() -> str:
            return await (await self.store.log()).append(f"{self.token}/{stream}", payload, flags)

        return str(self._run(put()))

    def park(self, session_id: bytes) -> None:
        """Let a session leave memory, as one that is idle does."""
        custody = self.layer.custody
        self._run(custody.let_go(custody.live[key_of(session_id.decode("latin-1"))]))

    @property
    def token(self) -> str:
        """What the names of the session's streams begin with."""
        return next(iter(self.layer.custody.live.values())).scope.token

    def waiting(self) -> list[str]:
        """Return the requests that the layer thinks are not answered yet."""
        return [name for live in self.layer.custody.live.values() for name in live.scope.running]

    def close(self) -> None:
        """Stop."""
        with contextlib.suppress(Exception):
            self._run(self._lifespan.__aexit__(None, None, None))
        self._loop.close()


def _layer_of(app: Any) -> ResumeLayer:
    for route in app.routes:
        holder: Any = route
        while holder is not None:
            if isinstance(holder, ResumeLayer):
                return holder
            holder = getattr(holder, "app", None)
    raise AssertionError("there is no resume layer in the app")


class _HttpTarget(Target):
    """Asks one server a while, then the next one: sessions add up."""

    share = 0.1
    _server: _Server | None = None
    _asked: ClassVar[int] = 0

    def server(self) -> _Server:
        """Return a server that is up."""
        if self._server is None or self._asked % _INPUTS_A_SERVER == 0:
            self.close()
            self._server = self.begin()
        type(self)._asked += 1
        return self._server

    def begin(self) -> _Server:
        """Start a server."""
        return _Server()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


class LastEventIdTarget(_HttpTarget):
    """The header with which a client resumes: whatever bytes are in it."""

    name = "last-event-id"

    def begin(self) -> _Server:
        server = _Server()
        self._ids: dict[bytes, bytes] = {}
        answer = server.ask("POST", server.headers(), [json.dumps(_CALL).encode()])
        found = [line[4:] for line in answer.body.splitlines() if line.startswith(b"id: ")]
        last = server.append("9", b'{"jsonrpc":"2.0","method":"m"}', 2)
        for event_id in (*found, last.encode()):
            self._ids[event_id] = event_id
        return server

    def draw(self, rng: random.Random) -> Input:
        text = rng.choice(
            (
                b"%d" % rng.getrandbits(63),
                b"%d" % rng.getrandbits(62),
                b"",
                b"0",
                b"-1",
                b"9" * rng.choice((19, 20, 5_000, 100_000)),
                b"1e5",
                b"1\r\nx: y",
                b"\x00",
                b"\xd9\xa3",
                b"\xb2\xb3",
                b"\xff" * 30,
                b"OWN",
                rng.randbytes(rng.randrange(1, 40)),
                bytes(rng.choices(range(256), k=rng.randrange(1, 25))),
            )
        )
        return Input(text, False, (rng.randrange(4), rng.randrange(1 << 16)))

    def feed(self, given: Input) -> bool:
        server = self.server()
        rng = random.Random(given.numbers[1])
        known = rng.choice(list(self._ids))
        value = given.data.replace(b"OWN", known)
        if given.data == b"OWN" and given.numbers[0] == 0:
            value = damaged(known, rng)
        headers = server.headers(last_event_id=value)
        if given.numbers[0] == 1:
            headers.append((b"last-event-id", rng.choice((b"", b"7", known))))
        if given.numbers[0] == 2:
            headers = [(name, damaged(each, rng) if name == b"mcp-session-id" else each) for name, each in headers]
        answer = server.ask("GET", headers, [])
        if answer.status >= 500:
            raise BrokenPromiseError(f"a resume is answered with {answer.status}: {answer.body[:200]!r}")
        told = [each for name, each in headers if name == b"last-event-id"][-1]
        if answer.status == 200 and told and told not in self._ids:
            raise BrokenPromiseError(f"a stream is resumed from an id that nobody got: {told[:40]!r}")
        return answer.status == 200


class RequestTarget(_HttpTarget):
    """Methods, headers and bodies of requests, whole and in pieces."""

    name = "request"

    def draw(self, rng: random.Random) -> Input:
        sample = rng.choice((_CALL, _CALL, _PING, _INITIALIZE, _INITIALIZED, [_CALL], {**_CALL, "id": "7"}))
        body = altered_json(sample, rng) if rng.random() < 0.8 else damaged(json.dumps(sample).encode(), rng)
        if rng.random() < 0.2:
            tree = {key: value for key, value in _CALL.items() if key != "id"}
            body = json.dumps(tree).encode()[:-1] + b', "id": ' + hostile_json(rng) + b"}"
        return Input(body, False, (rng.randrange(1 << 16),))

    def feed(self, given: Input) -> bool:
        server = self.server()
        rng = random.Random(given.numbers[0])
        headers = [*_HEADERS] if rng.random() < 0.1 else server.headers()
        if rng.random() < 0.2:
            name = rng.choice(
                (b"mcp-session-id", b"mcp-protocol-version", b"content-type", b"accept", b"host", b"origin")
            )
            value = rng.choice((b"", b"2025-11-25", b"2026-07-28", b"\xff\xfe", b"x" * 9_000, rng.randbytes(9)))
            headers = [each for each in headers if each[0] != name] + [(name, value)] * rng.choice((1, 2))
        method = rng.choice(("POST",) * 20 + ("GET", "DELETE", "PUT", "OPTIONS", "", "G\xcbT"))
        if method == "DELETE" and any(
            name == b"mcp-session-id" and value == server.session_id for name, value in headers
        ):
            method = "POST"
        size = max(rng.choice((1, 7, 100, len(given.data) or 1)), len(given.data) // 5_000)
        parts = [given.data[start : start + size] for start in range(0, len(given.data), size)]
        try:
            answer = server.ask(method, headers, parts)
        finally:
            waiting = server.waiting()
        if answer.status >= 500:
            raise BrokenPromiseError(f"a {method} is answered with {answer.status}: {answer.body[:300]!r}")
        if waiting:
            raise BrokenPromiseError(
                f"requests that are over are waited for: {waiting}, {list(map(request_id_of, waiting))}"
            )
        return answer.status < 400


class StoredTarget(_HttpTarget):
    """Events of any content on a stream of the session, resumed: an import, or another writer, put them there."""

    name = "stored"

    def draw(self, rng: random.Random) -> Input:
        sample = rng.choice((_CALL, _PING, {"jsonrpc": "2.0", "id": 7, "result": {}}, _ERROR))
        payload = altered_json(sample, rng) if rng.random() < 0.8 else rng.randbytes(rng.randrange(60))
        flags = rng.choice((0, 2, 2, 2, 3, 6, 10, 14, 16, 18, 22, (1 << 31) - 1, rng.getrandbits(31)))
        if flags & 5 == 5:
            # A response that is not sent: then nothing is an answer.
            flags ^= 1
        if flags & 16 and rng.random() < 0.7:
            payload = encode_origin("source", "id") + payload
        return Input(payload, True, (flags,))

    def feed(self, given: Input) -> bool:
        server = self.server()
        first = server.append("5", b'{"jsonrpc":"2.0","method":"before"}', 2)
        server.append("5", given.data, given.numbers[0])
        last = server.append("5", b'{"jsonrpc":"2.0","id":5,"result":{}}', 6)
        answer = server.ask("GET", server.headers(last_event_id=first.encode()), [])
        if answer.status != 200:
            raise BrokenPromiseError(f"a resume is answered with {answer.status}: {answer.body[:200]!r}")
        # What is marked as a final response is sent as it is.
        self._check(answer.body, b"" if given.numbers[0] & 4 else last.encode())
        return True

    def _check(self, body: bytes, last: bytes) -> None:
        """Check that each event is one, whatever is in it, and that the stream comes to an end."""
        ids: list[bytes] = []
        for block in body.replace(b"\r\n", b"\n").split(b"\n\n"):
            for line in re.split(rb"[\r\n]", block):
                name, _, value = line.partition(b": ")
                if name == b"id":
                    ids.append(value)
                elif name not in (b"event", b"retry", b"data", b""):
                    raise BrokenPromiseError(f"a line that is none of ours is on the stream: {line[:80]!r}")
        ended = not last or ids[-1:] == [last] or b'"error":' in body
        if len(ids) > 2 or not ended:
            raise BrokenPromiseError(f"there are the events {ids} and not an answer: {body[:300]!r}")


class RevivalTarget(_HttpTarget):
    """What a client opened its session with, sent to the SDK again when the session comes back."""

    name = "revival"

    def draw(self, rng: random.Random) -> Input:
        body = json.dumps(_INITIALIZE).encode()
        if rng.random() < 0.7:
            place = rng.choice((b'"clientInfo": {', b'"capabilities": {', b'"params": {', b"{"))
            body = body.replace(place, place + b'"extra": ' + hostile_json(rng) + b", ", 1).replace(b", }", b"}")
        else:
            body = altered_json(_INITIALIZE, rng)
        return Input(body)

    def feed(self, given: Input) -> bool:
        server = self.server()
        opened = server.ask("POST", _HEADERS, [given.data])
        session_id = next((value for name, value in opened.headers if name == b"mcp-session-id"), None)
        if opened.status != 200 or session_id is None:
            return False
        headers = [*_HEADERS, (b"mcp-session-id", session_id)]
        server.ask("POST", headers, [json.dumps(_INITIALIZED).encode()])
        server.park(session_id)
        answer = server.ask("POST", headers, [json.dumps(_PING).encode()])
        server.ask("DELETE", headers, [])
        if answer.status != 200:
            raise BrokenPromiseError(f"a session that was parked is answered with {answer.status}: {answer.body!r}")
        return True


_ERROR: Final = {"jsonrpc": "2.0", "id": 7, "error": {"code": 1, "message": "?", "data": [1]}}

HTTP_TARGETS: Final[tuple[type[Target], ...]] = (LastEventIdTarget, RequestTarget, StoredTarget, RevivalTarget)
