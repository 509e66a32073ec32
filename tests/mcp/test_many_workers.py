"""Several workers over one store: a request may arrive at any, and a resume land on any."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import eventually
from tests.mcp.rig import DEADLINE_S, Uvicorn, Workers
from tests.mcp.rig_balancer import Balancer
from tests.mcp.rig_client import Account, StubbornClient, check_counted
from tests.mcp.rig_orders import ServerKind, text_of_size

SERVERS = ("mcpserver", "lowlevel", "fastmcp")


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[Workers]:
    async with Workers.running(tmp_path / "events.db", 2) as running:
        yield running


@pytest.mark.promise("resume-anywhere")
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("how", ["reset", "clean", "half"])
async def test_a_running_call_is_resumed_on_another_worker(tmp_path: Path, server: ServerKind, how: Any) -> None:
    async with (
        asyncio.timeout(DEADLINE_S),
        Workers.running(tmp_path / "events.db", 2, server=server) as workers,
        Balancer.over(workers.ports) as balancer,
    ):
        balancer.towards(workers[0].port)
        client = await StubbornClient.connected(balancer.port)
        call = client.begin("n")
        running = asyncio.create_task(client.run(call, "count", to=6))
        workers.conductor.allow("n", 2)
        await eventually(lambda: len(call.texts) == 2)
        balancer.towards(workers[1].port)
        await balancer.cut(how)
        # Missed.
        workers.conductor.allow("n", 2)
        await eventually(lambda: len(call.texts) == 4)
        # Live.
        workers.conductor.allow("n", 1)
        await eventually(lambda: len(call.texts) == 5)
        workers.conductor.allow_all("n")
        await running
        check_counted(call, 6, "n counted to 6")
        assert call.result is not None
        assert await workers.conductor.started("n") == workers[0].pid
        assert balancer.log[-1].backend == workers[1].port


@pytest.mark.promise("requests-anywhere")
@pytest.mark.parametrize("server", SERVERS)
async def test_requests_arrive_anywhere_and_one_worker_serves_the_session(tmp_path: Path, server: ServerKind) -> None:
    async with (
        asyncio.timeout(DEADLINE_S),
        Workers.running(tmp_path / "events.db", 3, server=server) as workers,
        Balancer.over(workers.ports) as balancer,
    ):
        clients = [await StubbornClient.connected(balancer.port) for _ in range(6)]
        for client in clients:
            calls = await asyncio.gather(*(client.call("process", f"p{number}") for number in range(6)))
            assert len({call.text for call in calls}) == 1
            assert {call.resumes for call in calls} == {0}
        assert len({connection.backend for connection in balancer.log}) == 3


@pytest.mark.promise("requests-anywhere")
async def test_many_calls_at_once_are_never_mixed_up(workers: Workers) -> None:
    async with asyncio.timeout(DEADLINE_S), Balancer.over(workers.ports) as balancer:
        clients = [await StubbornClient.connected(balancer.port) for _ in range(4)]
        calls = await asyncio.gather(
            *(
                client.call("stroll", f"{number}-{turn}", to=turn, pause_ms=1)
                for number, client in enumerate(clients)
                for turn in range(10)
            )
        )
    for number, call in enumerate(calls):
        check_counted(call, number % 10, f"{call.name} counted to {number % 10}")
        assert call.result is not None


@pytest.mark.promise("requests-anywhere")
async def test_a_large_result_comes_whole_through_another_worker(workers: Workers) -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await StubbornClient.connected(workers[0].port)
        for size, port in ((3_000_000, workers[1].port), (10_000, workers[0].port)):
            client.port = port
            assert (await client.call("large", "big", size=size)).text == text_of_size("big", size)


@pytest.mark.promise("requests-anywhere")
async def test_an_answer_to_the_server_s_question_may_arrive_at_another_worker(workers: Workers) -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await StubbornClient.connected(workers[0].port)
        params = {"name": "ask", "arguments": {"question": "which?"}}
        body = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": params}
        async with client.post(body) as exchange:
            _, question = await anext(exchange), await anext(exchange)
            assert question.message is not None
            client.port = workers[1].port
            answer = {"action": "accept", "content": {"word": "this"}}
            assert await client.reply({"id": question.message["id"], "result": answer}) == 202
            (last,) = await exchange.rest()
    assert last.message is not None
    assert last.message["result"]["content"][0]["text"] == "this"


@pytest.mark.promise("resume-anywhere")
async def test_the_standalone_stream_is_followed_on_any_worker(workers: Workers) -> None:
    account = Account("notes")
    async with asyncio.timeout(DEADLINE_S), Balancer.over(workers.ports) as balancer:
        balancer.towards(workers[0].port)
        client = await StubbornClient.connected(balancer.port)
        listening = asyncio.create_task(client.listen(account))
        await eventually(lambda: any(each.to_client for each in balancer.open if each.tag in account.tags))
        await client.call("announce", "first", to=2)
        await eventually(lambda: len(account.texts) == 2)
        # It comes back elsewhere, and had missed something.
        balancer.hold()
        await balancer.cut(where=lambda connection: connection.tag in account.tags)
        direct = StubbornClient(workers[1].port)
        direct.session_id = client.session_id
        await direct.call("announce", "missed", to=2)
        balancer.towards(workers[1].port)
        balancer.release()
        await eventually(lambda: len(account.texts) == 4)
        await direct.call("announce", "live", to=1)
        await eventually(lambda: len(account.texts) == 5)
        listening.cancel()
        await asyncio.wait({listening})
    assert account.texts == [f"note://{note}" for note in ("first/1", "first/2", "missed/1", "missed/2", "live/1")]


@pytest.mark.promise("delete-ends-everywhere")
async def test_the_end_of_a_session_is_its_end_everywhere(workers: Workers) -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await StubbornClient.connected(workers[0].port)
        call = await client.call("process", "n")
        client.port = workers[1].port
        assert await client.end() == 200
        for worker in (workers[0], workers[1]):
            client.port = worker.port
            async with client.get(call.ids[0]) as exchange:
                assert exchange.status == 404
            async with client.get(None) as exchange:
                assert exchange.status == 404
            async with client.post({"jsonrpc": "2.0", "id": 9, "method": "ping"}) as exchange:
                assert exchange.status == 404


@pytest.mark.promise("one-stream-one-connection")
async def test_a_resume_ends_the_connection_before_it_on_whichever_worker(workers: Workers) -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await StubbornClient.connected(workers[0].port)
        params = {"name": "count", "arguments": {"to": 3, "label": "n"}, "_meta": {"progressToken": 1}}
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        client.port = workers[1].port
        async with client.post(body) as first:
            primed = await anext(first)
            workers.conductor.allow("n", 1)
            await anext(first)
            async with client.get(primed.id) as second:
                await anext(second)
                # It ends, without the call having ended.
                assert await first.rest() == []
                client.port = workers[0].port
                async with client.get(primed.id) as third:
                    events = [await anext(third)]
                    assert await second.rest() == []
                    workers.conductor.allow_all("n")
                    events += await third.rest()
    assert [event.message["method"] for event in events[:-1] if event.message] == ["notifications/progress"] * 3


@pytest.mark.promise("one-stream-one-connection")
async def test_a_reader_that_is_gone_without_a_word_stalls_nobody(workers: Workers) -> None:
    """The SDK's router waits for such a reader, once the buffers are full, and then stores nothing more."""
    steps = 5000
    async with asyncio.timeout(DEADLINE_S), Balancer.over(workers.ports) as balancer:
        balancer.towards(workers[0].port)
        client = await StubbornClient.connected(balancer.port)
        call = client.begin("n")
        running = asyncio.create_task(client.run(call, "stroll", to=steps, pause_ms=0))
        await eventually(lambda: len(call.texts) > 2)
        balancer.towards(workers[1].port)
        await balancer.cut("half")
        await running
        check_counted(call, steps, f"n counted to {steps}")
        assert call.result is not None


@pytest.mark.promise("requests-anywhere")
@pytest.mark.slow
async def test_uvicorn_s_own_workers_share_the_sessions(tmp_path: Path) -> None:
    async with asyncio.timeout(DEADLINE_S), Uvicorn.running(tmp_path / "events.db", 4) as uvicorn:
        clients = [await StubbornClient.connected(uvicorn.port) for _ in range(8)]
        for client in clients:
            calls = await asyncio.gather(*(client.call("process", f"p{number}") for number in range(8)))
            assert len({call.text for call in calls}) == 1
            call = await client.call("stroll", "n", to=5, pause_ms=1)
            check_counted(call, 5, "n counted to 5")
