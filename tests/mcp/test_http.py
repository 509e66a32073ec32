"""A real server, real clients, real sockets: a broken call resumes, and sessions never see each other."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp.server.auth.provider import AccessToken, TokenVerifier
from mcp.server.auth.settings import AuthSettings
from mcp.server.lowlevel import Server
from mcp.server.mcpserver import MCPServer
from mcp_types import TextContent
from pydantic import AnyHttpUrl

from logstore.errors import ConfigurationError
from logstore.mcp import InMemoryEventStore, PersistentEventStore, resumable_http_app
from logstore.mcp.base import LogEventStore
from logstore.mcp.layer import ResumeLayer
from logstore.storage.files import Disk
from tests.mcp.serving import DEADLINE_S, Progress, Relay, Steps, counting_server, served
from tests.mcp.strict_client import Sse, StrictClient


def progress_of(events: list[Sse]) -> list[str]:
    return [event.message["params"]["message"] for event in events if event.message and "method" in event.message]


def answers_of(events: list[Sse]) -> list[dict[str, Any]]:
    return [event.message for event in events if event.message and "method" not in event.message]


@pytest.mark.promise("resume-exact")
async def test_a_call_whose_connection_breaks_receives_exactly_what_it_missed(
    make_store: Callable[[], LogEventStore],
) -> None:
    steps, progress = Steps(), Progress()
    app = resumable_http_app(counting_server(steps), make_store(), retry_interval=20)
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        Relay.to(port) as relay,
        Client(f"http://127.0.0.1:{relay.port}/mcp", mode="legacy") as client,
    ):
        await client.list_tools()
        call = asyncio.create_task(client.call_tool("count", {"to": 10, "label": "n"}, progress_callback=progress))
        steps.allow(3)
        await progress.until(3)
        relay.cut()
        steps.allow(4)
        await steps.until(7)
        await progress.until(7)
        steps.allow(3)
        result = await call
    assert isinstance(result.content[0], TextContent)
    assert result.content[0].text == "n counted to 10"
    assert progress.seen == [f"n {step}" for step in range(1, 11)]


async def test_a_low_level_server_resumes_too() -> None:
    server: Server[Any] = counting_server(Steps())._lowlevel_server
    app = resumable_http_app(server, InMemoryEventStore())
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        async with client.call(1, "count", to=0, label="n") as stream:
            events = await stream.rest()
        async with client.resume(events[0].id) as stream:
            assert await stream.rest() == events[1:]


@pytest.mark.promise("resume-goes-on-live")
async def test_a_resume_goes_on_live_and_ends_with_the_response() -> None:
    steps = Steps()
    app = resumable_http_app(counting_server(steps), InMemoryEventStore())
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        async with client.call(1, "count", to=4, label="n") as stream:
            primed = await anext(stream)
            steps.allow(1)
            first = await anext(stream)
        steps.allow(1)
        await steps.until(2)
        async with client.resume(first.id) as stream:
            missed = await anext(stream)
            steps.allow(2)
            live = await stream.rest()
        async with client.resume(primed.id) as stream:
            assert await stream.rest() == [first, missed, *live]
    assert progress_of([first, missed, *live]) == ["n 1", "n 2", "n 3", "n 4"]
    assert [answer["id"] for answer in answers_of(live)] == [1]


@pytest.mark.promise("replay-ends-at-response")
async def test_a_reused_request_id_replays_its_own_call_only() -> None:
    steps = Steps()
    steps.allow(2)
    app = resumable_http_app(counting_server(steps), InMemoryEventStore())
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        async with client.call(1, "count", to=1, label="first") as stream:
            first = await stream.rest()
        async with client.call(1, "count", to=1, label="second") as stream:
            second = await stream.rest()
        async with client.resume(first[0].id) as stream:
            assert await stream.rest() == first[1:]
        async with client.resume(second[0].id) as stream:
            assert await stream.rest() == second[1:]


@pytest.mark.promise("sessions-apart", "refusals-alike")
async def test_one_session_never_sees_another_s_stream_of_the_same_name(
    make_store: Callable[[], LogEventStore],
) -> None:
    steps = Steps()
    steps.allow(4)
    app = resumable_http_app(counting_server(steps), make_store())
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        StrictClient.connected(port) as alice,
        StrictClient.connected(port) as bob,
    ):
        async with alice.call(7, "count", to=2, label="alice") as stream:
            alices = await stream.rest()
        async with bob.call(7, "count", to=2, label="bob") as stream:
            bobs = await stream.rest()
        for client, own, foreign in ((alice, alices, bobs), (bob, bobs, alices)):
            async with client.resume(own[0].id) as stream:
                assert await stream.rest() == own[1:]
            refusals = []
            for event_id in [*(event.id for event in foreign), "1", "nonsense", str(2**62)]:
                async with client.resume(event_id) as stream:
                    refusals.append((stream.response.status_code, await stream.response.aread()))
            # The same for what is not theirs and for what is not there.
            assert all(refusal == refusals[0] for refusal in refusals)
            status, body = refusals[0]
            assert status == 400
            assert b"no event with that id" in body


@pytest.mark.promise("bare-store-leaks-nothing")
async def test_the_bare_store_in_the_sdk_tells_who_serves_it_and_leaks_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = Steps()
    steps.allow(4)
    app = counting_server(steps).streamable_http_app(event_store=InMemoryEventStore())
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        StrictClient.connected(port) as alice,
        StrictClient.connected(port) as bob,
    ):
        async with alice.call(7, "count", to=2, label="alice") as stream:
            alices = await stream.rest()
        async with bob.call(7, "count", to=2, label="bob") as stream:
            bobs = await stream.rest()
        seen = []
        for event_id in (alices[0].id, bobs[0].id, "1", "nonsense"):
            async with bob.resume(event_id) as stream:
                seen.append(await stream.rest())
    assert all(events == seen[0] for events in seen)
    (answer,) = answers_of(seen[0])
    assert answer["id"] is None
    assert "logstore.mcp.resumable_http_app" in answer["error"]["message"]
    assert [record.getMessage() for record in caplog.records if "resumable_http_app" in record.getMessage()] == [
        record.getMessage() for record in caplog.records if record.name == "logstore.mcp"
    ]
    assert len([record for record in caplog.records if record.name == "logstore.mcp"]) == 1


@pytest.mark.promise("bare-store-leaks-nothing")
async def test_with_the_bare_store_a_broken_call_ends_with_the_reason_and_the_next_one_works() -> None:
    steps, progress = Steps(), Progress()
    app = counting_server(steps).streamable_http_app(event_store=InMemoryEventStore(), retry_interval=20)
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        Relay.to(port) as relay,
        Client(f"http://127.0.0.1:{relay.port}/mcp", mode="legacy") as client,
    ):
        await client.list_tools()
        call = asyncio.create_task(client.call_tool("count", {"to": 2, "label": "n"}, progress_callback=progress))
        steps.allow(1)
        await progress.until(1)
        relay.cut()
        with pytest.raises(Exception, match="resumable_http_app"):
            await call
        steps.allow(2)
        result = await client.call_tool("count", {"to": 1, "label": "again"})
    assert isinstance(result.content[0], TextContent)
    assert result.content[0].text == "again counted to 1"


@pytest.mark.promise("unsendable-answered")
async def test_a_result_that_cannot_be_sent_ends_the_call_with_an_error_and_the_session_goes_on() -> None:
    server = MCPServer("names")

    @server.tool()
    async def name(of: str) -> str:
        """Return a file name that is no Unicode text."""
        return "caf\udce9" if of == "broken" else "fine"

    app = resumable_http_app(server, InMemoryEventStore(), retry_interval=20)
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        Client(f"http://127.0.0.1:{port}/mcp", mode="legacy") as client,
    ):
        await client.list_tools()
        with pytest.raises(Exception, match="cannot be sent as JSON"):
            await client.call_tool("name", {"of": "broken"})
        result = await client.call_tool("name", {"of": "whole"})
    assert isinstance(result.content[0], TextContent)
    assert result.content[0].text == "fine"


@pytest.mark.promise("any-request-id")
@pytest.mark.parametrize("request_id", ["", "\x00\n%", "\u200d" * 40, "x" * 5000, "#", "32:0123:1"])
async def test_any_request_id_a_client_chooses_is_served_and_resumed(request_id: str) -> None:
    steps = Steps()
    steps.allow(2)
    app = resumable_http_app(counting_server(steps), InMemoryEventStore())
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        async with client.call(request_id, "count", to=2, label="n") as stream:
            events = await stream.rest()
        async with client.resume(events[0].id) as stream:
            assert await stream.rest() == events[1:]
    assert answers_of(events)[0]["id"] == request_id


@pytest.mark.parametrize("request_id", ["", "\x00\n%", "x" * 5000])
async def test_any_request_id_is_served_with_the_bare_store_too(request_id: str) -> None:
    steps = Steps()
    steps.allow(2)
    app = counting_server(steps).streamable_http_app(event_store=InMemoryEventStore())
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        StrictClient.connected(port) as client,
        client.call(request_id, "count", to=2, label="n") as stream,
    ):
        assert answers_of(await stream.rest())[0]["id"] == request_id


@pytest.mark.promise("gap-ends-the-call")
async def test_a_gap_is_told_and_never_replayed() -> None:
    steps = Steps()
    app = resumable_http_app(counting_server(steps), InMemoryEventStore(max_events_per_stream=5))
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        async with client.call(1, "count", to=5, label="n") as stream:
            primed = await anext(stream)
            steps.allow(5)
            whole = [primed, *await stream.rest()]
        # Of seven events two are gone: nobody who has seen the second has missed anything.
        async with client.resume(whole[1].id) as stream:
            assert await stream.rest() == whole[2:]
        async with client.resume(primed.id) as stream:
            assert stream.response.status_code == 400


@pytest.mark.promise("delete-ends-everywhere")
async def test_the_end_of_a_session_ends_its_readers_and_nothing_of_it_stays_in_memory() -> None:
    app = resumable_http_app(counting_server(Steps()), InMemoryEventStore())
    endpoints = [getattr(route, "app", None) for route in app.routes]
    (layer,) = (endpoint for endpoint in endpoints if isinstance(endpoint, ResumeLayer))
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        async with client.call(1, "count", to=1, label="n") as stream:
            primed = await anext(stream)
            async with client.resume(primed.id) as resumed:
                assert await client.end() == 200
                assert await resumed.rest() == []
        async with client.resume(primed.id) as stream:
            assert stream.response.status_code == 404
    assert not layer.custody.live
    assert not layer.connections._by_token


class Tokens(TokenVerifier):
    """Whoever names a user is that user."""

    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id=token, scopes=[], subject=token)


@pytest.mark.promise("credential-decides")
async def test_behind_authentication_a_session_belongs_to_its_credential() -> None:
    steps = Steps()
    steps.allow(2)
    auth = AuthSettings(issuer_url=AnyHttpUrl("http://127.0.0.1"), resource_server_url=None)
    server = counting_server(steps, token_verifier=Tokens(), auth=auth)
    app = resumable_http_app(server, InMemoryEventStore())
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        StrictClient.connected(port, "alice") as alice,
        StrictClient.connected(port, "bob") as bob,
    ):
        async with alice.call(1, "count", to=2, label="alice") as stream:
            events = await stream.rest()
        async with alice.resume(events[0].id) as stream:
            assert await stream.rest() == events[1:]
        bob.session_id = alice.session_id
        async with bob.resume(events[0].id) as stream:
            assert stream.response.status_code == 404


async def test_the_store_opens_and_closes_with_the_app() -> None:
    store = InMemoryEventStore()
    app = resumable_http_app(counting_server(Steps()), store)
    async with asyncio.timeout(DEADLINE_S), served(app):
        await store.store_event("s", {"direct": True})
    with pytest.raises(Exception, match="closed"):
        await store.store_event("s", {"direct": True})


async def test_a_tool_may_use_the_store_directly_under_names_of_its_own_and_gets_its_errors() -> None:
    store = InMemoryEventStore()
    server = MCPServer("auditing")

    @server.tool()
    async def audit(stream: str) -> str:
        """Write to the same store."""
        return await store.store_event(stream, {"who": "me"})

    app = resumable_http_app(server, store)
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        async with client.call(1, "audit", stream="audit") as stream:
            assert not answers_of(await stream.rest())[0]["result"]["isError"]
        async with client.call(2, "audit", stream="") as stream:
            assert answers_of(await stream.rest())[0]["result"]["isError"]
        assert store.get_stream_stats()["audit"]["events"] == 1


async def test_json_responses_pass() -> None:
    app = resumable_http_app(counting_server(Steps()), InMemoryEventStore(), json_response=True)
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        Client(f"http://127.0.0.1:{port}/mcp", mode="legacy") as client,
    ):
        result = await client.call_tool("count", {"to": 0, "label": "n"})
    assert isinstance(result.content[0], TextContent)
    assert result.content[0].text == "n counted to 0"


@pytest.mark.promise("cannot-resume-refused")
@pytest.mark.parametrize(
    ("options", "words"),
    [({"stateless_http": True}, "stateless"), ({"event_store": None}, "second argument")],
)
def test_what_cannot_resume_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        resumable_http_app(counting_server(Steps()), InMemoryEventStore(), **options)


@pytest.mark.promise("cannot-resume-refused")
def test_something_else_than_a_server_or_a_store_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="neither"):
        resumable_http_app(object(), InMemoryEventStore())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="one of logstore's, not dict"):
        resumable_http_app(counting_server(Steps()), {})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="must be degrade"):
        resumable_http_app(counting_server(Steps()), PersistentEventStore(tmp_path / "e.db", on_write_failure="raise"))


class FailingDisk(Disk):
    """A disk that refuses to write, sync and make files while it is told to."""

    failing = False

    def write(self, fd: int, data: bytes, offset: int) -> None:
        self._refuse()
        super().write(fd, data, offset)

    def sync(self, fd: int) -> None:
        self._refuse()
        super().sync(fd)

    def create(self, path: Path) -> int:
        self._refuse()
        return super().create(path)

    def _refuse(self) -> None:
        if self.failing:
            raise OSError(errno.EIO, "the disk fails")


@pytest.mark.promise("degrade-serves-on")
async def test_while_the_disk_fails_calls_go_on_and_resume_and_sessions_open(tmp_path: Path) -> None:
    disk, steps = FailingDisk(), Steps()
    steps.allow(6)
    store = PersistentEventStore(tmp_path / "e.db", disk=disk)
    app = resumable_http_app(counting_server(steps), store)
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as alice:
        disk.failing = True
        async with alice.call(1, "count", to=3, label="n") as stream:
            events = await stream.rest()
        async with alice.resume(events[1].id) as stream:
            assert await stream.rest() == events[2:]
        assert store.health().status == "degraded"
        async with StrictClient.connected(port) as bob, bob.call(1, "count", to=0, label="n") as stream:
            assert answers_of(await stream.rest())
        disk.failing = False
        async with alice.call(2, "count", to=3, label="n") as stream:
            await stream.rest()
    assert progress_of(events) == ["n 1", "n 2", "n 3"]
    async with PersistentEventStore(tmp_path / "e.db") as reopened:
        # The disk came back before the store closed, so the volatile ones are on it too.
        stream_stats = reopened.get_stream_stats()
        assert sorted(name.partition("/")[2] for name in stream_stats) == ["0", "0", "1", "1", "2"]
