"""The rig itself: that it breaks what it says, and that its client sees what is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import eventually
from tests.mcp.rig import DEADLINE_S, Uvicorn, Workers
from tests.mcp.rig_balancer import Balancer, Framing
from tests.mcp.rig_client import Account, BrokenRuleError, Call, StubbornClient, check_counted
from tests.mcp.rig_http import BrokenConnectionError, Exchange
from tests.mcp.rig_orders import text_of_size
from tests.mcp.strict_client import Sse


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[Workers]:
    async with Workers.running(tmp_path / "events.db", 1) as running:
        yield running


@pytest.fixture
async def balancer(workers: Workers) -> AsyncIterator[Balancer]:
    async with Balancer.over(workers.ports) as opened:
        yield opened


@pytest.fixture
async def client(balancer: Balancer) -> StubbornClient:
    return await StubbornClient.connected(balancer.port)


def calling(client: StubbornClient, call: Call, to: int, **arguments: Any) -> asyncio.Task[None]:
    return asyncio.create_task(client.run(call, "count", to=to, **arguments))


@pytest.mark.parametrize("server", ["mcpserver", "lowlevel", "fastmcp"])
async def test_each_server_counts_as_the_test_allows(tmp_path: Path, server: str) -> None:
    async with asyncio.timeout(DEADLINE_S), Workers.running(tmp_path / "events.db", 1, server=server) as workers:
        client = await StubbornClient.connected(workers[0].port)
        call = client.begin("n")
        running = calling(client, call, 3)
        assert await workers.conductor.started("n") == workers[0].pid
        workers.conductor.allow("n", 2)
        await workers.conductor.steps("n", 2)
        assert not call.over
        workers.conductor.allow_all("n")
        await running
        check_counted(call, 3, "n counted to 3")
        assert (await client.call("large", "big", size=300_000)).text == text_of_size("big", 300_000)
        assert await client.end() == 200


@pytest.mark.parametrize("how", ["reset", "clean", "half"])
async def test_a_call_survives_a_cut_and_the_balancer_tells_of_it(
    workers: Workers, balancer: Balancer, client: StubbornClient, how: Any
) -> None:
    async with asyncio.timeout(DEADLINE_S):
        call = client.begin("n")
        running = calling(client, call, 4)
        workers.conductor.allow("n", 2)
        await eventually(lambda: len(call.texts) == 2)
        (cut,) = await balancer.cut(how, lambda connection: connection.tag == call.tags[0])
        workers.conductor.allow_all("n")
        await running
    check_counted(call, 4, "n counted to 4")
    assert call.result is not None
    assert call.resumes >= 1
    assert (cut.tag, cut.verb, cut.cut, cut.id_passed) == (call.tags[0], "POST", how, True)


async def test_a_call_cut_before_its_first_id_is_lost_and_the_log_says_why(
    workers: Workers, balancer: Balancer, client: StubbornClient
) -> None:
    async with asyncio.timeout(DEADLINE_S):
        balancer.hold()
        call = client.begin("n")
        running = calling(client, call, 1)
        await eventually(lambda: any(not connection.backend for connection in balancer.open))
        (cut,) = await balancer.cut(where=lambda connection: not connection.backend)
        await running
    assert call.lost
    assert (cut.id_passed, cut.backend) == (False, 0)


async def test_a_worker_is_killed_frozen_and_started_again_on_its_port(workers: Workers) -> None:
    (worker,) = (workers[0],)
    async with asyncio.timeout(DEADLINE_S):
        first = worker.pid
        await worker.kill()
        with pytest.raises(BrokenConnectionError):
            await StubbornClient.connected(worker.port)
        await worker.start()
        client = await StubbornClient.connected(worker.port)
        assert worker.pid not in (0, first)
        worker.freeze()
        waiting = asyncio.create_task(client.call("process", "n"))
        done, _ = await asyncio.wait({waiting}, timeout=0.05)
        assert not done
        worker.thaw()
        assert (await waiting).text == str(worker.pid)
        await worker.restart()
        await worker.stop()


async def test_a_dead_backend_is_skipped_and_without_any_the_client_is_reset(tmp_path: Path) -> None:
    async with (
        asyncio.timeout(DEADLINE_S),
        Workers.running(tmp_path / "events.db", 2) as workers,
        Balancer.over(workers.ports) as balancer,
    ):
        await workers[0].kill()
        for _ in range(2):
            await StubbornClient.connected(balancer.port)
        assert {connection.backend for connection in balancer.log} == {workers[1].port}
        await workers[1].kill()
        with pytest.raises(BrokenConnectionError):
            await StubbornClient.connected(balancer.port)
        assert balancer.log[-1].cut == "refused"


async def test_a_question_of_the_server_s_is_answered_on_another_connection(workers: Workers) -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await StubbornClient.connected(workers[0].port)
        params = {"name": "ask", "arguments": {"question": "which?"}}
        body = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": params}
        async with client.post(body) as exchange:
            events = [await anext(exchange), await anext(exchange)]
            assert events[1].message is not None
            assert events[1].message["method"] == "elicitation/create"
            answer = {"action": "accept", "content": {"word": "this"}}
            assert await client.reply({"id": events[1].message["id"], "result": answer}) == 202
            (last,) = await exchange.rest()
    assert last.message is not None
    assert last.message["result"]["content"][0]["text"] == "this"


async def test_the_standalone_stream_is_accounted_for(workers: Workers, client: StubbornClient) -> None:
    account = Account("notes")
    async with asyncio.timeout(DEADLINE_S):
        listening = asyncio.create_task(client.listen(account))
        await eventually(lambda: account.tags)
        while not account.texts:
            # Until the stream is open, what is announced is for nobody.
            await client.call("announce", "first", to=1)
        await client.call("announce", "n", to=3)
        await eventually(lambda: account.texts[-3:] == [f"note://n/{step}" for step in (1, 2, 3)])
        listening.cancel()
        await asyncio.wait({listening})


@pytest.mark.parametrize("server", ["mcpserver", "lowlevel", "fastmcp"])
async def test_who_has_no_token_does_not_get_in(tmp_path: Path, server: str) -> None:
    async with (
        asyncio.timeout(DEADLINE_S),
        Workers.running(tmp_path / "events.db", 1, server=server, auth=True) as workers,
    ):
        await StubbornClient.connected(workers[0].port, "alice")
        for token in (None, "mallory"):
            async with StubbornClient(workers[0].port, token).get(None) as exchange:
                assert exchange.status == 401


@pytest.mark.slow
async def test_uvicorn_starts_workers_of_its_own(tmp_path: Path) -> None:
    async with asyncio.timeout(DEADLINE_S), Uvicorn.running(tmp_path / "events.db", 1) as uvicorn:
        client = await StubbornClient.connected(uvicorn.port)
        assert int((await client.call("process", "n")).text) in uvicorn.conductor.ready
        await uvicorn.stop()


async def test_an_exchange_tells_a_cut_from_an_end() -> None:
    whole = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n0\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers.pop(0))
        writer.close()
        await writer.wait_closed()

    answers = [whole, whole[:-5], whole[:-7], whole[:20], b""]
    async with asyncio.timeout(DEADLINE_S), await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Exchange.begun(port, "GET", {}) as exchange:
            assert await exchange.rest() == [Sse(message=1)]  # type: ignore[arg-type]
        while answers:
            with pytest.raises(BrokenConnectionError):
                async with Exchange.begun(port, "GET", {}) as exchange:
                    await exchange.rest()


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_framing_knows_where_a_response_may_end(size: int) -> None:
    plain = b"HTTP/1.1 202 Accepted\r\nContent-Length: 5\r\n\r\n12\r\n5"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n2\r\n\r\n\r\n"
    framing = Framing()
    places = set()
    data = plain + chunked + b"0\r\n\r\n" + plain
    for start in range(0, len(data), size):
        framing.feed(data[start : start + size])
        if framing.between_chunks:
            places.add(min(start + size, len(data)))
    start = len(plain) + chunked.index(b"4\r\nabcd")
    possible = {start, start + len(b"4\r\nabcd\r\n"), len(plain) + len(chunked)}
    assert places == {place for place in possible if place % size == 0}
    assert not framing.between_chunks


def event(event_id: str, message: dict[str, Any] | None = None) -> Sse:
    return Sse(event_id, message)


@pytest.mark.parametrize(
    ("second", "why"), [(event("5"), "again"), (event("4"), "out of order"), (Sse(None, {}), "without an id")]
)
def test_an_account_refuses_what_comes_twice_or_out_of_order(second: Sse, why: str) -> None:
    account = Account("n")
    account.take(event("5"))
    with pytest.raises(BrokenRuleError, match=why):
        account.take(second)


def test_a_call_takes_one_answer_that_is_its_own() -> None:
    call = Call("n", request_id=3)
    with pytest.raises(BrokenRuleError, match="answer to another"):
        call.answer({"id": 4, "result": {}})
    call.answer({"id": 3, "result": {}})
    with pytest.raises(BrokenRuleError, match="second answer"):
        call.answer({"id": 3, "result": {}})


RIGHT = {"content": [{"text": "n counted to 2"}]}


@pytest.mark.parametrize(
    ("texts", "result"),
    [
        (["n 1"], RIGHT),
        (["n 2", "n 1"], RIGHT),
        (["n 1", "n 1"], RIGHT),
        (["n 1", "m 2"], RIGHT),
        (["n 1", "n 2"], {"content": [{"text": "m counted to 2"}]}),
        (["n 2"], None),
    ],
)
def test_a_count_that_is_not_exact_is_refused(texts: list[str], result: dict[str, Any] | None) -> None:
    check_counted(Call("n", texts=["n 1", "n 2"], result=RIGHT), 2, "n counted to 2")
    check_counted(Call("n", texts=["n 1"], error={}), 2, "n counted to 2")
    with pytest.raises(BrokenRuleError):
        check_counted(Call("n", texts=texts, result=result), 2, "n counted to 2")
