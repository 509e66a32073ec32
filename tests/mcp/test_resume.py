"""What becomes of sessions and their streams: parked, revived, expired, closed, ended; in one process."""

from __future__ import annotations

import asyncio
import errno
import inspect
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastmcp import FastMCP
from mcp.server.mcpserver import Context, MCPServer
from starlette.applications import Starlette

from logstore.errors import ConfigurationError
from logstore.mcp import InMemoryEventStore, PersistentEventStore, resumable_http_app
from logstore.mcp.base import LogEventStore
from logstore.mcp.layer import ResumeLayer
from logstore.storage import Log, LogOptions
from logstore.storage.files import Disk
from tests.engine import eventually
from tests.mcp.serving import DEADLINE_S, Steps, counting_server, served
from tests.mcp.strict_client import StrictClient
from tests.mcp.test_fastmcp import counting_server as counting_fastmcp
from tests.mcp.test_http import answers_of, progress_of
from tests.storage.disks import Fault, FaultyDisk

SERVERS: dict[str, Callable[[Steps], Any]] = {
    "mcpserver": counting_server,
    "lowlevel": lambda steps: counting_server(steps)._lowlevel_server,
    "fastmcp": counting_fastmcp,
}
any_server = pytest.mark.parametrize("kind", list(SERVERS))


def layer_of(app: Starlette) -> ResumeLayer:
    """Return the layer inside an app."""
    (layer,) = (found for route in app.routes if isinstance(found := getattr(route, "app", None), ResumeLayer))
    return layer


@asynccontextmanager
async def serving(kind: str, steps: Steps, store: LogEventStore, **options: Any) -> AsyncGenerator[tuple[int, Any]]:
    """Serve an app; yield its port and its sessions."""
    app = resumable_http_app(SERVERS[kind](steps), store, **options)
    async with asyncio.timeout(DEADLINE_S), served(app) as port:
        yield port, layer_of(app).custody


@asynccontextmanager
async def session(
    store: LogEventStore, steps: Steps, session_id: str | None = None, kind: str = "mcpserver", **options: Any
) -> AsyncGenerator[tuple[StrictClient, Any]]:
    """Serve an app for one client, in a session of its own or in an earlier one; yield it and the app's sessions."""
    async with serving(kind, steps, store, **options) as (port, custody), StrictClient.connected(port) as client:
        client.session_id = session_id or client.session_id
        yield client, custody


async def call(client: StrictClient, request_id: int, to: int) -> list[Any]:
    async with client.call(request_id, "count", to=to, label="n") as stream:
        return await stream.rest()


@pytest.mark.promise("idle-sessions-park")
@any_server
async def test_an_idle_session_leaves_memory_and_comes_back_with_its_next_request(
    kind: str, make_store: Callable[[], LogEventStore]
) -> None:
    steps = Steps()
    steps.allow(4)
    async with (
        serving(kind, steps, make_store(), session_idle_s=0.05) as (port, custody),
        StrictClient.connected(port) as client,
    ):
        before = await call(client, 1, 2)
        await eventually(lambda: not custody.live, "parked")
        async with client.resume(before[0].id) as stream:
            assert await stream.rest() == before[1:]
        # It is this worker's again, and the SDK has nothing of it before it is needed.
        assert not any(live.sdk_id for live in custody.live.values())
        after = await call(client, 2, 2)
        (live,) = custody.live.values()
        assert live.sdk_id != client.session_id
        assert progress_of(after) == ["n 1", "n 2"]
        assert await client.end() == 200
        async with client.resume(before[0].id) as stream:
            assert stream.response.status_code == 404


@pytest.mark.promise("idle-sessions-park")
async def test_a_session_with_a_running_call_or_a_reader_is_not_idle() -> None:
    steps = Steps()
    async with (
        serving("mcpserver", steps, InMemoryEventStore(), session_idle_s=0.01) as (port, custody),
        StrictClient.connected(port) as client,
    ):
        async with client.call(1, "count", to=1, label="n") as stream:
            primed = await anext(stream)
        # Nobody listens, and it runs.
        await custody.park_idle()
        assert custody.live
        async with client.resume(primed.id) as stream:
            steps.allow(1)
            assert progress_of(await stream.rest()) == ["n 1"]
        async with client.resume(None) as standalone:
            assert standalone.response.status_code == 200
            await custody.park_idle()
            assert custody.live
        await eventually(lambda: not custody.live, "parked")


@pytest.mark.promise("sessions-outlive-restarts")
@any_server
async def test_sessions_outlive_a_restart(kind: str, tmp_path: Path) -> None:
    steps = Steps()
    steps.allow(5)
    async with session(PersistentEventStore(tmp_path / "e.db"), steps, kind=kind) as (client, _):
        before = await call(client, 1, 3)
    store = PersistentEventStore(tmp_path / "e.db")
    async with session(store, steps, client.session_id, kind) as (again, custody):
        async with again.resume(before[0].id) as stream:
            assert await stream.rest() == before[1:]
        after = await asyncio.gather(call(again, 2, 1), call(again, 3, 1))
        # The one that was opened to connect, and one revival for both calls.
        assert len(custody.live) == 2
    assert [progress_of(events) for events in after] == [["n 1"], ["n 1"]]


@pytest.mark.promise("unused-sessions-end")
async def test_a_session_that_nobody_uses_ends(make_store: Callable[[], LogEventStore]) -> None:
    # A tenth of a second.
    hours = 0.1 / 3600
    async with (
        serving("mcpserver", Steps(), make_store(), session_idle_s=0.01, session_ttl_hours=hours) as (port, custody),
        StrictClient.connected(port) as client,
    ):
        await eventually(lambda: not custody.live, "parked")
        # Whatever its client asks for is use: it asks once, when nobody has used the session for long enough.
        while await custody.keeper.all():
            await custody.expire()
        async with client.resume("1") as stream:
            assert stream.response.status_code == 404


@pytest.mark.promise("unused-sessions-end")
async def test_a_session_in_use_does_not_end_however_old_it_is(make_store: Callable[[], LogEventStore]) -> None:
    async with (
        serving("mcpserver", Steps(), make_store(), session_ttl_hours=0.2 / 3600) as (port, custody),
        StrictClient.connected(port) as client,
        client.resume(None),
    ):
        (key,) = custody.live
        opened = await custody.keeper.find(key)
        for _ in range(40):
            # Longer than it lives without being used.
            await asyncio.sleep(0.01)
            await custody.expire()
        found = await custody.keeper.find(key)
        assert not found.released
        assert found.changed_us > opened.changed_us + 200_000
        assert await call(client, 1, 0)


@pytest.mark.promise("unreadable-is-told")
async def test_while_the_disk_does_not_give_the_log_a_resume_is_put_off(tmp_path: Path) -> None:
    path, disk = tmp_path / "e.db", FaultyDisk()
    async with Log(path, LogOptions(checkpoint_interval_s=3600)) as other:
        # In a journal of another process, where the event might be.
        await other.append("elsewhere", b"1")
        async with session(PersistentEventStore(path, disk=disk), Steps()) as (client, _):
            disk.fail(Fault("read", name=".journal", from_then_on=True))
            async with client.resume("1") as stream:
                assert stream.response.status_code == 503
            disk.heal()
            async with client.resume("1") as stream:
                assert stream.response.status_code == 400


class FullDisk(Disk):
    """A disk on which the registry finds no room while it is full."""

    full = False

    def write(self, fd: int, data: bytes, offset: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(fd, data, offset)


@pytest.mark.promise("full-disk-sessions")
async def test_on_a_full_disk_sessions_open_and_are_kept_once_there_is_room(tmp_path: Path) -> None:
    disk, steps = FullDisk(), Steps()
    steps.allow(2)
    store = PersistentEventStore(tmp_path / "e.db", disk=disk)
    async with serving("mcpserver", steps, store) as (port, custody):
        disk.full = True
        async with StrictClient.connected(port) as client:
            assert progress_of(await call(client, 1, 2)) == ["n 1", "n 2"]
            (key,) = custody.live
            assert await custody.keeper.find(key) is None
            disk.full = False
            await custody.record_again()
            assert await custody.keeper.find(key) is not None


@pytest.mark.promise("full-disk-sessions")
async def test_on_a_full_disk_no_session_is_taken_over_and_none_is_lost(tmp_path: Path) -> None:
    disk, steps = FullDisk(), Steps()
    async with session(PersistentEventStore(tmp_path / "e.db"), steps) as (client, _):
        pass
    store = PersistentEventStore(tmp_path / "e.db", disk=disk)
    async with session(store, steps, client.session_id) as (again, _):
        disk.full = True
        async with again.call(1, "count", to=0, label="n") as stream:
            assert stream.response.status_code == 503
        disk.full = False
        assert answers_of(await call(again, 2, 0))[0]["id"] == 2


@pytest.mark.promise("session-limit-passed-on")
async def test_the_sdk_s_limit_of_sessions_passes_through_a_revival(tmp_path: Path) -> None:
    steps = Steps()
    async with session(PersistentEventStore(tmp_path / "e.db"), steps) as (client, _):
        pass
    store = PersistentEventStore(tmp_path / "e.db")
    if "max_sessions" not in inspect.signature(MCPServer.streamable_http_app).parameters:
        pytest.skip("this release of the SDK has no such limit")
    async with session(store, steps, max_sessions=1) as (again, _):
        own, again.session_id = again.session_id, client.session_id
        async with again.call(1, "count", to=0, label="n") as stream:
            assert stream.response.status_code == 503
        again.session_id = own
        assert await again.end() == 200
        again.session_id = client.session_id
        assert answers_of(await call(again, 2, 0))[0]["id"] == 2


@pytest.mark.promise("dead-calls-end")
@pytest.mark.parametrize("request_id", [7, "7", "a b", "%-7"])
async def test_a_call_that_a_stop_cuts_off_ends_with_an_error_under_its_own_id(
    tmp_path: Path, request_id: int | str
) -> None:
    steps = Steps()
    store = PersistentEventStore(tmp_path / "e.db")
    async with (
        session(store, steps, drain_s=0.01) as (client, _),
        client.call(request_id, "count", to=1, label="n") as stream,
    ):
        primed = await anext(stream)
    async with session(PersistentEventStore(tmp_path / "e.db"), steps, client.session_id) as (again, _):
        for _ in range(2):
            async with again.resume(primed.id) as stream:
                (answer,) = answers_of(await stream.rest())
            assert answer["id"] == request_id
            assert type(answer["id"]) is type(request_id)
            assert answer["error"]["code"] == -32010
            assert "call again" in answer["error"]["message"]


@pytest.mark.promise("resume-goes-on-live")
async def test_a_resume_behind_the_response_ends_at_once(make_store: Callable[[], LogEventStore]) -> None:
    async with serving("mcpserver", Steps(), make_store()) as (port, _), StrictClient.connected(port) as client:
        events = await call(client, 1, 0)
        async with client.resume(events[-1].id) as stream:
            assert stream.response.status_code == 200
            assert await stream.rest() == []


@pytest.mark.promise("one-stream-one-connection")
async def test_the_newest_of_several_resumes_has_the_stream(make_store: Callable[[], LogEventStore]) -> None:
    steps = Steps()
    async with session(make_store(), steps) as (client, _), client.call(1, "count", to=1, label="n") as first:
        primed = await anext(first)
        async with client.resume(primed.id) as second:
            assert await first.rest() == []
            async with client.resume(primed.id) as third:
                assert await second.rest() == []
                steps.allow(1)
                assert progress_of(await third.rest()) == ["n 1"]


async def test_a_client_that_comes_back_is_told_how_long_to_wait_the_next_time(
    make_store: Callable[[], LogEventStore],
) -> None:
    async with (
        serving("mcpserver", Steps(), make_store(), retry_interval=1234) as (port, _),
        StrictClient.connected(port) as client,
    ):
        events = await call(client, 1, 0)
        async with client.resume(events[0].id) as stream:
            assert b"retry: 1234\r\n" in await stream.response.aread()


@pytest.mark.promise("closing-a-stream")
@pytest.mark.parametrize("lowlevel", [False, True])
async def test_a_tool_closes_its_stream_also_when_it_was_resumed(lowlevel: bool) -> None:
    steps, server = Steps(), MCPServer("closing")

    @server.tool()
    async def count(to: int, label: str, ctx: Context) -> str:
        """Close the stream at each step."""
        for step in range(1, to + 1):
            await steps.next()
            await ctx.report_progress(step, to, f"{label} {step}")
            await ctx.close_sse_stream()
        return label

    app = resumable_http_app(server._lowlevel_server if lowlevel else server, InMemoryEventStore())
    async with asyncio.timeout(DEADLINE_S), served(app) as port, StrictClient.connected(port) as client:
        async with client.call(1, "count", to=2, label="n") as stream:
            primed = await anext(stream)
            steps.allow(1)
            assert answers_of(await stream.rest()) == []
        async with client.resume(primed.id) as stream:
            first = await anext(stream)
            steps.allow(1)
            await stream.rest()
        async with client.resume(first.id) as stream:
            rest = await stream.rest()
        assert progress_of([first, *rest]) == ["n 1", "n 2"]
        assert answers_of(rest)[0]["id"] == 1


@pytest.mark.promise("checked-as-a-get")
async def test_a_resume_is_checked_as_the_sdk_checks_a_get(make_store: Callable[[], LogEventStore]) -> None:
    async with serving("mcpserver", Steps(), make_store()) as (port, _), StrictClient.connected(port) as client:
        events = await call(client, 1, 0)
        headers = {"mcp-session-id": client.session_id or "", "last-event-id": events[0].id or ""}
        url = f"http://127.0.0.1:{port}/mcp"
        for changed, status in (
            ({"accept": "application/json"}, 406),
            ({"accept": "text/event-stream", "host": "evil.example"}, 421),
            ({"accept": "text/event-stream", "origin": "http://evil.example"}, 403),
            ({"accept": "text/event-stream"}, 200),
        ):
            response = await client._http.get(url, headers={**headers, **changed})
            assert response.status_code == status


@pytest.mark.promise("new-revision-untouched")
async def test_a_revision_without_sessions_passes_untouched() -> None:
    async with (
        serving("mcpserver", Steps(), InMemoryEventStore()) as (port, custody),
        StrictClient.connected(port) as client,
    ):
        session_id = client.session_id or ""
        headers = {"mcp-protocol-version": "2026-07-28", "mcp-session-id": session_id, "last-event-id": "1"}
        url = f"http://127.0.0.1:{port}/mcp"
        response = await client._http.get(url, headers={**headers, "accept": "text/event-stream"})
        # What the SDK says to it; a resume would be refused with a 400.
        assert response.status_code == 405
        assert len(custody.live) == 1


@pytest.mark.promise("cannot-resume-refused")
def test_the_sdk_s_idle_timeout_is_refused_with_what_to_say_instead() -> None:
    with pytest.raises(ConfigurationError, match="session_idle_s"):
        resumable_http_app(FastMCP("x"), InMemoryEventStore(), session_idle_timeout=5)
