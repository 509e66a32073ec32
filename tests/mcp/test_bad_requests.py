"""Whatever a client sends gets an answer, costs no more than it is long, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import time
from collections import deque

import pytest
from starlette.types import Message

from logstore.mcp import InMemoryEventStore, resumable_http_app
from logstore.mcp.connections import Connection
from logstore.mcp.layer import ResumeLayer
from logstore.mcp.sdk import STANDALONE_STREAM
from logstore.mcp.sessions import key_of
from logstore.storage import FLAG_MODEL
from logstore.storage.record import FLAG_IMPORTED
from tests.mcp.serving import DEADLINE_S, Steps, counting_server, served
from tests.mcp.strict_client import StrictClient
from tests.mcp.test_resume import layer_of

CALL = b'{"jsonrpc":"2.0","id":7,"method":"ping"}'


@pytest.mark.parametrize(
    "body",
    [
        b'{"jsonrpc":"2.0","id":7,"method":"ping","params":' + b"[" * 50_000,
        b'{"jsonrpc":"2.0","id":7,"method":"ping","params":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
        b'{"jsonrpc":"2.0","id":"\xff","method":"ping"}',
        b'{"jsonrpc":"2.0","id":"\xed\xa0\x80","method":"ping"}',
        b'{"jsonrpc":"2.0","id":' + b"9" * 5_000 + b',"method":"ping"}',
        b"[" * 50_000,
        b"\xff",
        b"",
    ],
)
async def test_a_body_that_is_no_message_is_refused_and_the_session_goes_on(body: bytes) -> None:
    app = resumable_http_app(counting_server(Steps()), InMemoryEventStore())
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        assert await client.send("POST", body) == 400
        assert await client.send("POST", CALL) == 200


async def test_a_request_in_the_body_of_what_is_no_post_is_nobody_s() -> None:
    app = resumable_http_app(counting_server(Steps()), InMemoryEventStore())
    layer: ResumeLayer = layer_of(app)
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        StrictClient.connected(port) as client,
        client.opened("GET", CALL) as response,
    ):
        assert response.status_code == 200
        assert await client.send("PUT", CALL.replace(b"7", b"8")) == 405
        # It would never be answered, and the session never be idle.
        assert [live.scope.running for live in layer.custody.live.values()] == [set()]


def in_pieces(body: bytes, size: int = 1) -> Connection:
    pieces = deque(body[place : place + size] for place in range(0, len(body), size))

    async def receive() -> Message:
        return {"type": "http.request", "body": pieces.popleft(), "more_body": bool(pieces)}

    async def send(message: Message) -> None:
        raise AssertionError

    return Connection(receive, send)


async def test_a_body_that_comes_byte_by_byte_is_the_same_and_bounded() -> None:
    connection = in_pieces(CALL)
    assert await connection.read(len(CALL))
    assert (connection.body, connection.received) == (CALL, True)
    connection.rewind()
    assert (await connection.receive())["body"] == CALL
    assert not await in_pieces(CALL).read(len(CALL) - 1)


async def test_a_body_that_comes_in_pieces_takes_a_time_that_grows_with_its_length() -> None:
    async def seconds(count: int) -> float:
        connection = in_pieces(bytes(count * 64), 64)
        began_s = time.process_time()
        assert await connection.read(count * 64)
        return time.process_time() - began_s

    quick = min([await seconds(5_000) for _ in range(3)])
    # Eight times as long; copied anew with each piece it would take up to 64 times as long.
    assert min([await seconds(40_000) for _ in range(3)]) < 24 * quick


NO_MESSAGES = [(b"7", 0), (b"\xff\n", FLAG_MODEL), (b"{}", FLAG_IMPORTED), (b"[" * 50_000, FLAG_IMPORTED)]


@pytest.mark.parametrize(("payload", "flags"), NO_MESSAGES)
async def test_a_resume_that_meets_what_is_no_message_ends_with_an_error(payload: bytes, flags: int) -> None:
    steps, store = Steps(), InMemoryEventStore()
    app = resumable_http_app(counting_server(steps), store)
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        (live,) = layer_of(app).custody.live.values()
        log = await store.log()
        first = await log.append(live.scope.name_of("5"), b'{"jsonrpc":"2.0","method":"m"}', FLAG_MODEL)
        await log.append(live.scope.name_of("5"), payload, flags)
        async with client.resume(first) as stream:
            (event,) = await stream.rest()
        assert event.message is not None
        assert event.message["id"] == 5
        assert "without a hole" in event.message["error"]["message"]


@pytest.mark.parametrize(("payload", "flags"), NO_MESSAGES)
async def test_on_the_standalone_stream_it_is_left_out(payload: bytes, flags: int) -> None:
    store = InMemoryEventStore()
    app = resumable_http_app(counting_server(Steps()), store)
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        (live,) = layer_of(app).custody.live.values()
        log, name = await store.log(), live.scope.name_of(STANDALONE_STREAM)
        first = await log.append(name, b'{"jsonrpc":"2.0","method":"m"}', FLAG_MODEL)
        await log.append(name, payload, flags)
        last = await log.append(name, b'{"jsonrpc":"2.0","method":"n"}', FLAG_MODEL)
        async with client.resume(first) as stream:
            assert (await anext(stream)).id == last


@pytest.mark.parametrize("extra", [b"NaN", b"1e999", b"-Infinity", b"9" * 4_000])
async def test_a_session_that_was_opened_with_more_than_json_has_comes_back_too(extra: bytes) -> None:
    app = resumable_http_app(counting_server(Steps()), InMemoryEventStore())
    custody = layer_of(app).custody
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        other = client.another()
        opening = (
            b'{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25",'
            b'"capabilities":{},"clientInfo":{"name":"n","version":"1"},"extra":%b}}' % extra
        )
        async with other.opened("POST", opening) as response:
            assert response.status_code == 200
            other.session_id = response.headers["mcp-session-id"]
            await response.aread()
        await other.notify("notifications/initialized")
        assert await custody.let_go(custody.live[key_of(other.session_id)])
        assert await other.send("POST", CALL) == 200


async def test_a_session_that_cannot_be_read_is_unknown() -> None:
    store = InMemoryEventStore()
    app = resumable_http_app(counting_server(Steps()), store)
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        client.session_id = "made up"
        await (await store.sessions()).open(key_of("made up"), b'{"scope": 5}', "")
        assert await client.send("POST", CALL) == 404
