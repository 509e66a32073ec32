"""FastMCP, whose adapter puts a random prefix before the streams of each transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from fastmcp import Context, FastMCP
from mcp import Client
from mcp_types import TextContent
from starlette.applications import Starlette

from logstore.errors import ConfigurationError
from logstore.mcp import InMemoryEventStore, resumable_http_app
from logstore.mcp.base import LogEventStore
from tests.mcp.serving import DEADLINE_S, Progress, Relay, Steps, response_stored, served
from tests.mcp.strict_client import StrictClient
from tests.mcp.test_http import answers_of, progress_of


def counting_server(steps: Steps) -> FastMCP[None]:
    server: FastMCP[None] = FastMCP("counting")

    @server.tool
    async def count(to: int, label: str, ctx: Context) -> str:
        """Count."""
        for step in range(1, to + 1):
            await steps.next()
            await ctx.report_progress(step, to, f"{label} {step}")
            await steps.reported()
        return f"{label} counted to {to}"

    return server


@pytest.mark.promise("resume-exact")
@pytest.mark.parametrize("bare", [False, True])
async def test_a_broken_call_receives_exactly_what_it_missed(
    make_store: Callable[[], LogEventStore], bare: bool
) -> None:
    steps, progress = Steps(), Progress()
    server, store = counting_server(steps), make_store()
    app: Starlette
    if bare:
        app = server.http_app(event_store=store, retry_interval=20)
    else:
        app = resumable_http_app(server, store, retry_interval=20)
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        Relay.to(port) as relay,
        Client(f"http://127.0.0.1:{relay.port}/mcp", mode="legacy") as client,
    ):
        await client.list_tools()
        call = asyncio.create_task(client.call_tool("count", {"to": 6, "label": "n"}, progress_callback=progress))
        steps.allow(2)
        await progress.until(2)
        # All the rest while nobody listens: FastMCP sends nothing before a replay is over, and what the SDK stores
        # between that and the registration of the resumed stream is not sent.
        relay.hold()
        relay.cut()
        steps.allow(4)
        await response_stored(store)
        relay.release()
        result = await call
    await store.close()
    assert isinstance(result.content[0], TextContent)
    assert result.content[0].text == "n counted to 6"
    assert progress.seen == [f"n {step}" for step in range(1, 7)]


async def test_streams_are_named_by_session_and_request_without_the_adapter_s_prefix() -> None:
    steps = Steps()
    steps.allow(1)
    store = InMemoryEventStore()
    app = resumable_http_app(counting_server(steps), store)
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        async with client.call(7, "count", to=1, label="n") as stream:
            await stream.rest()
        names = {name.partition("/")[2] for name in store.get_stream_stats()}
    assert names == {"0", "7"}


@pytest.mark.promise("bare-store-leaks-nothing")
async def test_one_session_never_sees_another_s_stream_of_the_same_name(
    make_store: Callable[[], LogEventStore],
) -> None:
    steps = Steps()
    steps.allow(2)
    app = resumable_http_app(counting_server(steps), make_store())
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        StrictClient.connected(port) as alice,
        StrictClient.connected(port) as bob,
    ):
        async with alice.call(7, "count", to=1, label="alice") as stream:
            alices = await stream.rest()
        async with bob.call(7, "count", to=1, label="bob") as stream:
            bobs = await stream.rest()
        async with alice.resume(alices[0].id) as stream:
            mine = [await anext(stream), await anext(stream)]
        assert mine == alices[1:]
        for event in alices:
            async with bob.resume(event.id) as stream:
                assert await stream.rest() == []
    assert progress_of(bobs) == ["bob 1"]
    assert [answer["id"] for answer in answers_of(bobs)] == [7]


@pytest.mark.promise("cannot-resume-refused")
async def test_its_stateless_mode_is_refused_also_when_a_setting_turns_it_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigurationError, match="stateless"):
        resumable_http_app(counting_server(Steps()), InMemoryEventStore(), stateless_http=True)
    monkeypatch.setattr("fastmcp.settings.stateless_http", True)
    app = resumable_http_app(counting_server(Steps()), InMemoryEventStore())
    with pytest.raises(ConfigurationError, match="stateless"):
        async with app.router.lifespan_context(app):
            pass


@pytest.mark.promise("cannot-resume-refused")
async def test_a_transport_that_cannot_resume_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no streamable HTTP endpoint"):
        resumable_http_app(counting_server(Steps()), InMemoryEventStore(), transport="sse")


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("request_id", ["", "\x00\n%", "x" * 5000])
async def test_any_request_id_a_client_chooses_is_served(request_id: str, bare: bool) -> None:
    server, store = counting_server(Steps()), InMemoryEventStore()
    app: Starlette = server.http_app(event_store=store) if bare else resumable_http_app(server, store)
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        StrictClient.connected(port) as client,
        client.call(request_id, "count", to=0, label="n") as stream,
    ):
        assert answers_of(await stream.rest())[0]["id"] == request_id
