"""The sockets between workers: where they are, and what is on them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import stat
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from starlette.types import Message, Receive, Scope, Send

from logstore.mcp import peers
from logstore.mcp.connections import Connection
from logstore.mcp.peers import CALL_KEY, Outcome, Peers
from tests.mcp.serving import DEADLINE_S


class Host:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, int]] = []

    def end_connections(self, name: str, older_than_ns: int) -> None:
        self.ended.append((name, older_than_ns))

    def reading(self, tokens: Iterable[str]) -> list[str]:
        return [token for token in tokens if token == "read"]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what was asked, or not at all."""
    body = (await receive())["body"]
    if body == b"wait":
        scope["state"]["waits"].set()
        await asyncio.get_running_loop().create_future()
    if body not in (b"again", b"stopping"):
        scope[CALL_KEY].begin()
    if body == b"work":
        scope["state"]["works"].set()
        await scope["state"]["answer"].wait()
    if body in (b"again", b"stopping"):
        scope[CALL_KEY].again = True
        scope[CALL_KEY].stopping = body == b"stopping"
    await send({"type": "http.response.start", "status": 201, "headers": scope["headers"]})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if body == b"fail":
        raise RuntimeError("on purpose")
    if body == b"hang":
        assert (await receive())["type"] == "http.disconnect"
        scope["state"]["gone"].set()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Client:
    """The server's side of a request: what was sent to it, and when it goes away."""

    def __init__(self, body: bytes) -> None:
        self.sent: list[Message] = []
        self.gone = asyncio.Event()
        self.began = asyncio.Event()
        self._messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        self.began.set()


SCOPE: Scope = {"type": "http", "method": "POST", "path": "/mcp", "headers": [(b"x", b"\xff")], "client": ("::1", 5)}


async def forward(one: Peers, worker: int, body: bytes) -> tuple[Outcome, Client]:
    client = Client(body)
    connection = Connection(client.receive, client.send)
    assert await connection.read(1000)
    return await one.forward(worker, SCOPE, connection), client


@asynccontextmanager
async def opened(folder: Path, own: int, host: Host, state: Any = None) -> AsyncGenerator[Peers]:
    """Open the socket of one worker."""
    worker = Peers(folder, own, echo, state, host)
    await worker.open()
    try:
        yield worker
    finally:
        await worker.close()


@pytest.fixture
def aside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files with a short path."""
    with TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


@pytest.fixture(params=["short", "long", "long, without /proc"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, aside: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose path an address has room for, or not."""
    if "without" in request.param:
        monkeypatch.setattr(peers, "_OPEN_FILES", tmp_path / "nowhere")
    if request.param == "short":
        monkeypatch.chdir(tmp_path)
        return Path("peers")
    long = tmp_path / ("x" * 100)
    long.mkdir()
    return long / "peers"


def mode_of(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


@pytest.mark.promise("sockets-are-private", "long-paths")
async def test_a_request_and_its_response_pass_wherever_the_store_is(folder: Path, aside: Path) -> None:
    async with asyncio.timeout(DEADLINE_S), opened(folder, 1, Host()) as one, opened(folder, 2, Host()):
        outcome, client = await forward(one, 2, b"hello")
        assert outcome is Outcome.DONE
        assert client.sent[0] == {"type": "http.response.start", "status": 201, "headers": [(b"x", b"\xff")]}
        assert b"".join(message["body"] for message in client.sent[1:]) == b"hello"
        assert not client.sent[-1]["more_body"]
        assert one.others() == [2]
        assert mode_of(folder) == 0o700
    assert is_empty(folder)
    assert is_empty(aside)


@pytest.mark.promise("one-hop")
async def test_a_request_that_comes_back_was_not_answered(tmp_path: Path) -> None:
    async with asyncio.timeout(DEADLINE_S), opened(tmp_path, 1, Host()) as one, opened(tmp_path, 2, Host()):
        outcome, client = await forward(one, 2, b"again")
    assert outcome is Outcome.AGAIN
    assert client.sent == []


async def test_without_a_listener_nothing_was_done(tmp_path: Path) -> None:
    async with asyncio.timeout(DEADLINE_S), opened(tmp_path, 1, Host()) as one:
        assert (await forward(one, 2, b"hello"))[0] is Outcome.UNREACHABLE


@pytest.mark.promise("never-sent-twice")
async def test_a_response_that_breaks_off_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with asyncio.timeout(DEADLINE_S), opened(tmp_path, 1, Host()) as one, opened(tmp_path, 2, Host()):
        outcome, client = await forward(one, 2, b"fail")
    assert outcome is Outcome.LOST
    assert [message.get("body") for message in client.sent] == [None, b"fail"]
    assert "on purpose" in caplog.text


@pytest.mark.promise("never-sent-twice")
async def test_a_worker_that_goes_away_before_it_begins_has_done_nothing(tmp_path: Path) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with asyncio.timeout(DEADLINE_S), opened(tmp_path, 1, Host()) as one:
        server = await asyncio.start_unix_server(hang_up, str(tmp_path / "2.sock"))
        assert (await forward(one, 2, b"hello"))[0] is Outcome.AGAIN
        server.close()


async def test_a_worker_that_stops_gives_back_what_it_has_not_begun(tmp_path: Path) -> None:
    waits = asyncio.Event()
    async with asyncio.timeout(DEADLINE_S), opened(tmp_path, 1, Host()) as one:
        async with opened(tmp_path, 2, Host(), {"waits": waits}):
            forwarding = asyncio.create_task(forward(one, 2, b"wait"))
            await waits.wait()
        outcome, client = await forwarding
    assert outcome is Outcome.AGAIN
    assert client.sent == []


async def test_a_worker_that_stops_sends_the_response_to_what_it_has_begun(tmp_path: Path) -> None:
    works, answer = asyncio.Event(), asyncio.Event()
    async with asyncio.timeout(DEADLINE_S), opened(tmp_path, 1, Host()) as one:
        async with opened(tmp_path, 2, Host(), {"works": works, "answer": answer}) as two:
            forwarding = asyncio.create_task(forward(one, 2, b"work"))
            await works.wait()
            closing = asyncio.create_task(two.close())
            await asyncio.sleep(0)
            answer.set()
            await closing
        outcome, client = await forwarding
    assert outcome is Outcome.DONE
    assert b"".join(message["body"] for message in client.sent[1:]) == b"work"


@pytest.mark.parametrize("kind", [b"text/event-stream", b"application/json"])
async def test_the_length_of_a_stream_is_not_told_before_it_is_there(tmp_path: Path, kind: bytes) -> None:
    client = Client(b"stream")
    scope = {**SCOPE, "headers": [(b"content-type", kind), (b"content-length", b"6")]}
    async with (
        asyncio.timeout(DEADLINE_S),
        opened(tmp_path, 1, Host()) as one,
        opened(tmp_path, 2, Host()),
    ):
        connection = Connection(client.receive, client.send)
        assert await connection.read(1000)
        await one.forward(2, scope, connection)
    # The worker that has it may die half-way, and what is sent then has another length.
    told = [name for name, _ in client.sent[0]["headers"]]
    assert told == ([b"content-type"] if kind == b"text/event-stream" else [b"content-type", b"content-length"])


@pytest.mark.promise("never-sent-twice")
async def test_what_a_worker_had_begun_when_it_died_may_have_been_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_FINISH_S", 0.01)
    works, never = asyncio.Event(), asyncio.Event()
    async with asyncio.timeout(DEADLINE_S), opened(tmp_path, 1, Host()) as one:
        async with opened(tmp_path, 2, Host(), {"works": works, "answer": never}):
            forwarding = asyncio.create_task(forward(one, 2, b"work"))
            await works.wait()
        assert (await forwarding)[0] is Outcome.LOST


@pytest.mark.promise("never-sent-twice")
async def test_what_a_client_has_left_is_not_sent_again(tmp_path: Path) -> None:
    waits = asyncio.Event()
    async with (
        asyncio.timeout(DEADLINE_S),
        opened(tmp_path, 1, Host()) as one,
        opened(tmp_path, 2, Host(), {"waits": waits}),
    ):
        client = Client(b"wait")
        connection = Connection(client.receive, client.send)
        assert await connection.read(1000)
        forwarding = asyncio.create_task(one.forward(2, SCOPE, connection))
        await waits.wait()
        client.gone.set()
        # The other worker has it, and may begin at any time.
        assert await forwarding is Outcome.LOST


@pytest.mark.promise("never-sent-twice")
async def test_a_worker_that_does_not_react_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_SILENCE_S", 0.05)
    stuck: list[asyncio.StreamWriter] = []

    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stuck.append(writer)

    async with asyncio.timeout(DEADLINE_S), opened(tmp_path, 1, Host()) as one:
        server = await asyncio.start_unix_server(ignore, str(tmp_path / "2.sock"))
        assert (await forward(one, 2, b"hello"))[0] is Outcome.SILENT
        server.close()
        for writer in stuck:
            writer.close()


@pytest.mark.promise("frozen-keeps")
async def test_a_slow_worker_that_lives_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_SILENCE_S", 0.05)
    asked = asyncio.Event()

    class Asking(Peers):
        async def answers(self, worker: int) -> bool:
            answer = await super().answers(worker)
            asked.set()
            return answer

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asked.wait()
        await echo(scope, receive, send)

    async with asyncio.timeout(DEADLINE_S):
        one, two = Asking(tmp_path, 1, slow, None, Host()), Peers(tmp_path, 2, slow, None, Host())
        await one.open()
        await two.open()
        assert (await forward(one, 2, b"hello"))[0] is Outcome.DONE
        await one.close()
        await two.close()


async def test_a_client_that_goes_away_is_gone_for_the_other_worker_too(tmp_path: Path) -> None:
    gone = asyncio.Event()
    async with (
        asyncio.timeout(DEADLINE_S),
        opened(tmp_path, 1, Host()) as one,
        opened(tmp_path, 2, Host(), {"gone": gone}),
    ):
        client = Client(b"hang")
        connection = Connection(client.receive, client.send)
        assert await connection.read(1000)
        forwarding = asyncio.create_task(one.forward(2, SCOPE, connection))
        await client.began.wait()
        client.gone.set()
        await gone.wait()
        await forwarding


async def test_all_others_are_told_and_asked(tmp_path: Path) -> None:
    hosts = [Host(), Host(), Host()]
    async with (
        asyncio.timeout(DEADLINE_S),
        opened(tmp_path, 1, hosts[0]) as one,
        opened(tmp_path, 2, hosts[1]),
        opened(tmp_path, 3, hosts[2]),
    ):
        (tmp_path / "4.sock").touch()
        (tmp_path / "\u00b2.sock").touch()
        await one.end_everywhere("token/1", 7)
        assert await one.read_elsewhere(["other", "read"]) == {"read"}
        assert await one.answers(2)
        assert not await one.answers(4)
        one.forget(4)
        assert sorted(one.others()) == [2, 3]
    assert [host.ended for host in hosts] == [[], [("token/1", 7)], [("token/1", 7)]]


async def test_a_worker_that_stops_says_so(folder: Path) -> None:
    async with opened(folder, 1, Host()) as one, opened(folder, 2, Host()):
        assert (await forward(one, 2, b"again"))[0] is Outcome.AGAIN
        outcome, client = await forward(one, 2, b"stopping")
        assert outcome is Outcome.STOPPING
        assert client.sent == []


async def test_a_worker_whose_queue_is_full_is_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with opened(Path("peers"), 1, Host()) as one:
        with contextlib.ExitStack() as waiting:
            listener = waiting.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
            listener.bind("peers/2.sock")
            listener.listen(0)
            refused = 0
            while refused != errno.EAGAIN:
                waiter = waiting.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
                waiter.setblocking(False)
                refused = waiter.connect_ex("peers/2.sock")
            outcome, client = await forward(one, 2, b"hello")
            assert outcome is Outcome.UNREACHABLE
            assert client.sent == []


REQUEST = ["request", {"method": "POST", "path": "/", "headers": [(b"x", b"y")]}, b"body"]
DEEP = b"\x91" * 100_000
BAD_COMMANDS = [
    b"",
    b"\xc1",
    DEEP,
    b"\xdd\xff\xff\xff\xff",
    *map(
        msgspec.msgpack.encode,
        (
            7,
            {},
            [],
            ["unknown"],
            ["request"],
            ["request", {}, b""],
            ["request", REQUEST[1], "text"],
            ["request", {**REQUEST[1], "headers": [b"x"]}, b""],  # type: ignore[dict-item]
            ["request", {**REQUEST[1], "client": 5}, b""],  # type: ignore[dict-item]
            ["end", "name", "now"],
            ["end"],
            ["reading", 5],
            ["reading", "token"],
        ),
    ),
]


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize("body", BAD_COMMANDS)
async def test_a_command_that_is_none_is_not_answered_and_harms_nobody(
    tmp_path: Path, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with asyncio.timeout(DEADLINE_S), opened(tmp_path, 1, Host()) as one, opened(tmp_path, 2, Host()):
        for data in (framed(body), framed(body)[:-1], b"\xff\xff\xff\xff" + body):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "1.sock")
            writer.write(data)
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
        assert (await forward(one, 2, b"hello"))[0] is Outcome.DONE
    assert caplog.text == ""


BAD_ANSWERS = [
    b"\xc1",
    DEEP,
    *map(
        msgspec.msgpack.encode,
        (
            5,
            [],
            ["true"],
            {"a": 1},
            ["body", b"", False],
            ["start", 7, []],
            ["start", 200, [[b"x"]]],
            ["start", 200, 5],
        ),
    ),
]


@pytest.mark.parametrize("body", BAD_ANSWERS)
async def test_an_answer_that_is_none_is_none(tmp_path: Path, body: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(int.from_bytes(await reader.readexactly(4), "little"))
        writer.write(framed(body))
        writer.close()

    async with asyncio.timeout(DEADLINE_S), opened(tmp_path, 1, Host()) as one:
        server = await asyncio.start_unix_server(answer, str(tmp_path / "2.sock"))
        assert not await one.answers(2)
        assert await one.read_elsewhere(["read"]) == set()
        outcome, client = await forward(one, 2, b"hello")
        assert (outcome, client.sent) == (Outcome.LOST, [])
        server.close()
