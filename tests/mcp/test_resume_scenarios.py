"""The SDK's own client, and what the SDK's and FastMCP's tests expect of resumability, over two workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mcp import Client, MCPError
from mcp_types import CallToolResult, TextContent

from tests.engine import eventually
from tests.mcp.rig import DEADLINE_S, Workers
from tests.mcp.rig_balancer import Balancer
from tests.mcp.rig_client import Account, Call, StubbornClient, check_counted
from tests.mcp.rig_orders import ServerKind
from tests.mcp.serving import Progress
from tests.mcp.test_many_workers import SERVERS

RETRY_MS = 40


@pytest.fixture(params=SERVERS)
async def workers(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Workers]:
    server: ServerKind = request.param
    async with Workers.running(tmp_path / "events.db", 2, server=server, retry_interval=RETRY_MS) as running:
        yield running


@pytest.fixture
async def balancer(workers: Workers) -> AsyncIterator[Balancer]:
    async with Balancer.over(workers.ports) as opened:
        yield opened


def sdk_client(balancer: Balancer) -> Client:
    # Newer revisions of the protocol than this mode speaks have no resume.
    return Client(f"http://127.0.0.1:{balancer.port}/mcp", mode="legacy")


def text_of(result: CallToolResult) -> str:
    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text


async def counted(client: Client, label: str, to: int, progress: Progress) -> CallToolResult:
    return await client.call_tool("count", {"to": to, "label": label}, progress_callback=progress)


async def until_texts(call: Call, count: int) -> None:
    await eventually(lambda: len(call.texts) == count, f"{count} reports")


# The SDK's client, within its limits.


@pytest.mark.promise("resume-exact")
async def test_the_sdk_s_client_survives_one_abrupt_cut_of_a_call(workers: Workers, balancer: Balancer) -> None:
    async with asyncio.timeout(DEADLINE_S), sdk_client(balancer) as client:
        await client.list_tools()
        for turn in range(4):
            progress, label = Progress(), f"n{turn}"
            call = asyncio.create_task(counted(client, label, 6, progress))
            workers.conductor.allow(label, 2)
            await progress.until(2)
            # A connection that is idle now would break the next POST, which the client does not survive.
            await balancer.cut(where=lambda each: each.verb == "POST" and each.framing.between_chunks)
            workers.conductor.allow(label, 2)
            await progress.until(4)
            workers.conductor.allow_all(label)
            assert text_of(await call) == f"{label} counted to 6"
            assert progress.seen == [f"{label} {step}" for step in range(1, 7)]


@pytest.mark.promise("resume-exact")
async def test_the_sdk_s_client_survives_any_number_of_clean_ends(workers: Workers, balancer: Balancer) -> None:
    ends, progress = 5, Progress()
    async with asyncio.timeout(DEADLINE_S), sdk_client(balancer) as client:
        await client.list_tools()
        call = asyncio.create_task(counted(client, "n", ends, progress))
        for end in range(1, ends + 1):
            workers.conductor.allow("n", 1)
            await progress.until(end)
            await balancer.cut("clean")
        workers.conductor.allow_all("n")
        assert text_of(await call) == f"n counted to {ends}"
    assert progress.seen == [f"n {step}" for step in range(1, ends + 1)]


@pytest.mark.promise("sessions-outlive-restarts")
async def test_the_sdk_s_client_outlives_the_worker_that_served_it(workers: Workers, balancer: Balancer) -> None:
    async with asyncio.timeout(DEADLINE_S), sdk_client(balancer) as client:
        await client.list_tools()
        first = int(text_of(await client.call_tool("process", {})))
        progress = Progress()
        call = asyncio.create_task(counted(client, "n", 3, progress))
        workers.conductor.allow("n", 2)
        await progress.until(2)
        await workers.running_in(first).kill()
        with pytest.raises(MCPError, match="call again"):
            await call
        second = int(text_of(await client.call_tool("process", {})))
    assert first != second
    assert progress.seen == ["n 1", "n 2"]


# What `tests/interaction/transports/test_hosting_resume.py` of the SDK and `tests/server/test_event_store.py` of
# FastMCP expect, where one worker is not enough to see it.


async def test_a_stream_begins_with_an_event_to_resume_after_that_says_nothing(
    workers: Workers, balancer: Balancer
) -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await StubbornClient.connected(balancer.port)
        call = await client.call("process", "n")
        assert len(call.ids) == 2
        async with client.get(call.ids[0]) as exchange:
            (answer,) = await exchange.rest()
    assert answer.message is not None
    assert answer.message["id"] == call.request_id


async def test_the_last_event_has_nothing_after_it(workers: Workers, balancer: Balancer) -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await StubbornClient.connected(balancer.port)
        call = await client.call("stroll", "n", to=2, pause_ms=0)
        async with client.get(call.ids[-1]) as exchange:
            assert exchange.status == 200
            assert await exchange.rest() == []


async def test_a_resume_replays_its_own_stream_and_no_other_of_the_session(
    workers: Workers, balancer: Balancer
) -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await StubbornClient.connected(balancer.port)
        one, two = client.begin("one"), client.begin("two")
        running = [asyncio.create_task(client.run(call, "count", to=4)) for call in (one, two)]
        for step in range(1, 4):
            for call in (one, two):
                workers.conductor.allow(call.name, 1)
                await until_texts(call, step)
        await balancer.cut(where=lambda connection: connection.tag in one.tags)
        for call in (one, two):
            workers.conductor.allow_all(call.name)
        await asyncio.gather(*running)
        for call in (one, two):
            check_counted(call, 4, f"{call.name} counted to 4")
            assert call.result is not None
        assert one.resumes
        assert not two.resumes


@pytest.mark.promise("closing-a-stream")
async def test_a_tool_that_closes_its_own_stream_goes_on_and_the_client_comes_back(
    workers: Workers, balancer: Balancer
) -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await StubbornClient.connected(balancer.port)
        call = client.begin("n")
        running = asyncio.create_task(client.run(call, "count", to=5, close_at=2))
        workers.conductor.allow_all("n")
        await running
        check_counted(call, 5, "n counted to 5")
        assert call.result is not None
        assert workers.conductor.closed == {"n"}


@pytest.mark.promise("resume-anywhere")
async def test_a_finished_call_is_replayed_as_often_as_asked_from_wherever_asked(
    workers: Workers, balancer: Balancer
) -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await StubbornClient.connected(balancer.port)
        call = await client.call("stroll", "n", to=4, pause_ms=0)
        for known in range(1, len(call.ids)):
            late = Call("n", ids=call.ids[:known], texts=call.texts[: known - 1], request_id=call.request_id)
            await client.finish(late)
            check_counted(late, 4, "n counted to 4")
            assert late.ids == call.ids


@pytest.mark.promise("resume-goes-on-live")
async def test_what_was_announced_while_nobody_listened_comes_with_the_resume(
    workers: Workers, balancer: Balancer
) -> None:
    account = Account("notes")
    async with asyncio.timeout(DEADLINE_S):
        client = await StubbornClient.connected(balancer.port)
        listening = asyncio.create_task(client.listen(account))
        await eventually(lambda: any(each.to_client for each in balancer.open if each.tag in account.tags))
        await client.call("announce", "first", to=1)
        await eventually(lambda: account.texts)
        listening.cancel()
        await asyncio.wait({listening})
        await client.call("announce", "missed", to=3)
        listening = asyncio.create_task(client.listen(account))
        await eventually(lambda: len(account.texts) == 4)
        listening.cancel()
        await asyncio.wait({listening})
    assert account.texts == ["note://first/1", *(f"note://missed/{step}" for step in (1, 2, 3))]


async def test_two_sessions_with_the_same_request_ids_do_not_meet(workers: Workers, balancer: Balancer) -> None:
    async with asyncio.timeout(DEADLINE_S):
        clients = [await StubbornClient.connected(balancer.port) for _ in range(3)]
        calls = await asyncio.gather(
            *(client.call("stroll", f"n{number}", to=5, pause_ms=1) for number, client in enumerate(clients))
        )
        assert len({call.request_id for call in calls}) == 1
        for client, own in zip(clients, calls, strict=True):
            late = Call(own.name, ids=own.ids[:1], request_id=own.request_id)
            await client.finish(late)
            assert (late.ids, late.texts, late.result) == (own.ids, own.texts, own.result)
