"""What is on the sockets between workers: another release, or another program, may be at the other end."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
from starlette.types import Message, Receive, Scope, Send

from crash_fuzz_inputs import EXTREMES, Input, Target, damaged, hostile_msgpack
from crash_kill import BrokenPromiseError
from logstore.mcp.connections import Connection
from logstore.mcp.peers import Outcome, Peers

_ANSWER_S: Final = 10.0
_SCOPE: Final[dict[str, Any]] = {
    "method": "POST",
    "path": "/mcp",
    "raw_path": b"/mcp",
    "query_string": b"",
    "root_path": "",
    "scheme": "http",
    "http_version": "1.1",
    "headers": [(b"host", b"here"), (b"content-type", b"application/json")],
    "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 2),
}
_COMMANDS: Final[tuple[list[Any], ...]] = (
    ["ping"],
    ["end", "token/1", 7],
    ["reading", "token"],
    ["request", _SCOPE, b"body"],
)
_ANSWERS: Final[tuple[list[Any], ...]] = (
    ["start", 200, [(b"content-type", b"text/event-stream")]],
    ["start", 200, [(b"content-type", b"application/json")]],
    ["body", b"data: x\r\n\r\n", True],
    ["body", b"", False],
    ["again"],
    [True],
    [False],
)


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x", scope["method"].encode())]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class _Host:
    def end_connections(self, name: str, older_than_ns: int) -> None:
        # What a host does with them.
        name.partition("/")
        _ = older_than_ns < 1 << 62

    def reading(self, tokens: Iterable[str]) -> list[str]:
        return [token for token in tokens if token == "token"]


def _hostile_frame(items: list[Any], rng: random.Random) -> bytes:
    """Return a frame with some fields other than they should be, or a length that is not its own."""
    parts = [bytes(msgspec.msgpack.encode(item)) for item in items]
    for _ in range(rng.choice((0, 1, 1, 2))):
        parts[rng.randrange(len(parts))] = hostile_msgpack(rng)
    if rng.random() < 0.1:
        parts.pop()
    body = bytes([0x90 | len(parts)]) + b"".join(parts)
    if items[0] == "request" and rng.random() < 0.5:
        fields = {**_SCOPE, rng.choice(list(_SCOPE)): "@"}
        if rng.random() < 0.3:
            fields.pop(rng.choice(list(_SCOPE)))
        encoded = bytes(msgspec.msgpack.encode(["request", fields, b"body"]))
        body = encoded.replace(b"\xa1@", hostile_msgpack(rng), 1)
    if rng.random() < 0.1:
        body = hostile_msgpack(rng)
    length = rng.choice(EXTREMES) if rng.random() < 0.1 else len(body)
    return struct.pack("<I", length) + body


class PeersTarget(Target):
    """Commands from another worker, and its answers."""

    name = "peers"
    share = 0.2

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="logstore-fuzz-"))
        self._loop = asyncio.new_event_loop()
        self._errors: list[str] = []
        self._loop.set_exception_handler(lambda _, context: self._errors.append(str(context)))
        self._peers = Peers(self._folder, 1, _echo, None, _Host())
        self._answer = b""
        self._loop.run_until_complete(self._open())

    async def _open(self) -> None:
        await self._peers.open()
        self._other = await asyncio.start_unix_server(self._accept, self._folder / "2.sock")

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            (length,) = struct.unpack("<I", await reader.readexactly(4))
            await reader.readexactly(length)
            writer.write(self._answer)
            await writer.drain()
        writer.close()

    def draw(self, rng: random.Random) -> Input:
        if rng.random() < 0.5:
            return Input(self._frames([rng.choice(_COMMANDS)], rng), True, (0,))
        answers = [rng.choice(_ANSWERS) for _ in range(rng.randrange(1, 4))]
        return Input(self._frames(answers, rng), True, (rng.randrange(1, 4),))

    def _frames(self, items: list[list[Any]], rng: random.Random) -> bytes:
        data = b"".join(_hostile_frame(each, rng) for each in items)
        return damaged(data, rng) if rng.random() < 0.2 else data

    def feed(self, given: Input) -> bool:
        jobs = (self._command, self._asked, self._told, self._forwarded)
        job = jobs[given.numbers[0]]
        done = self._loop.run_until_complete(asyncio.wait_for(job(given.data), _ANSWER_S))
        if self._errors:
            raise BrokenPromiseError(f"the event loop says: {self._errors[0][:1000]}")
        return done

    async def _command(self, data: bytes) -> bool:
        reader, writer = await asyncio.open_unix_connection(self._folder / "1.sock")
        writer.write(data)
        answer = b""
        with contextlib.suppress(OSError):
            writer.write_eof()
            await writer.drain()
            answer = await reader.read()
        writer.close()
        reader, writer = await asyncio.open_unix_connection(self._folder / "1.sock")
        writer.write(struct.pack("<I", 6) + msgspec.msgpack.encode(["ping"]))
        if await reader.readexactly(6) != struct.pack("<I", 2) + msgspec.msgpack.encode([True]):
            raise BrokenPromiseError("the worker does not answer any more")
        writer.close()
        return bool(answer)

    async def _asked(self, data: bytes) -> bool:
        self._answer = data
        return await self._peers.answers(2)

    async def _told(self, data: bytes) -> bool:
        self._answer = data
        await self._peers.end_everywhere("token/1", 7)
        return bool(await self._peers.read_elsewhere(["token"]))

    async def _forwarded(self, data: bytes) -> bool:
        self._answer = data
        parts = [{"type": "http.request", "body": b"body", "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Message:
            if parts:
                return parts.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        connection = Connection(receive, send)
        await connection.read(1000)
        outcome = await self._peers.forward(2, {"type": "http", **_SCOPE}, connection)
        if sent and sent[0]["type"] != "http.response.start":
            raise BrokenPromiseError(f"a response begins with {sent[0]}")
        for message in sent:
            if message["type"] == "http.response.start":
                _check_start(message)
            elif type(message["body"]) is not bytes or type(message["more_body"]) is not bool:
                raise BrokenPromiseError(f"this goes to the client: {message}")
        return outcome is Outcome.DONE

    def close(self) -> None:
        self._other.close()
        self._loop.run_until_complete(self._peers.close())
        self._loop.close()
        shutil.rmtree(self._folder)


def _check_start(message: Message) -> None:
    headers = [(name, value) for name, value in message["headers"]]
    if type(message["status"]) is not int or not 100 <= message["status"] <= 999:
        raise BrokenPromiseError(f"this goes to the client: {message}")
    if any(type(part) is not bytes for pair in headers for part in pair):
        raise BrokenPromiseError(f"this goes to the client: {message}")


PEER_TARGETS: Final[tuple[type[Target], ...]] = (PeersTarget,)
