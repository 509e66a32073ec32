"""What a review of the resume layer broke; each failed before it was mended."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from mcp.server.mcpserver import Context, MCPServer
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection

from logstore.mcp import InMemoryEventStore, PersistentEventStore, resumable_http_app
from logstore.mcp.connections import Connection
from logstore.mcp.sessions import SessionData
from logstore.storage import Log, LogOptions
from tests.engine import deadline, eventually
from tests.mcp.rig import Workers
from tests.mcp.rig_client import StubbornClient
from tests.mcp.serving import Steps, served
from tests.mcp.strict_client import PROTOCOL, Sse, StrictClient
from tests.mcp.test_http import answers_of, progress_of
from tests.mcp.test_resume import FullDisk, call, serving
from tests.storage.disks import Fault, FaultyDisk

CHANGED = "notifications/roots/list_changed"


async def post(client: StrictClient, body: str, headers: list[tuple[str, str]]) -> tuple[int, str]:
    """POST a body as it is; return status and answer."""
    headers = [*headers, ("content-type", "application/json")]
    response = await client._http.post(client._url, content=body, headers=headers)
    return response.status_code, response.text


def texts_of(events: list[Sse]) -> list[str]:
    """Return what calls returned."""
    return [answer["result"]["content"][0]["text"] for answer in answers_of(events)]


# Stopping.


async def test_a_notification_that_comes_after_the_drain_is_refused_at_once(tmp_path: Path) -> None:
    store = PersistentEventStore(tmp_path / "e.db")
    async with (
        serving("mcpserver", Steps(), store, drain_s=3600) as (port, custody),
        StrictClient.connected(port) as client,
    ):
        await custody.drain()
        status, _ = await post(client, f'{{"jsonrpc":"2.0","method":"{CHANGED}"}}', list(client._headers().items()))
        assert status == 503


# Headers that come twice.


class _Who(AuthenticationBackend):
    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        name = conn.headers.get("authorization", "").removeprefix("Bearer ")
        return (AuthCredentials(), SimpleUser(name)) if name else None


async def test_who_names_two_sessions_gets_neither() -> None:
    app = resumable_http_app(MCPServer("x"), InMemoryEventStore())
    app.add_middleware(AuthenticationMiddleware, backend=_Who())
    async with (
        deadline(),
        served(app) as port,
        StrictClient.connected(port, "alice") as alice,
        StrictClient.connected(port, "bob") as bob,
    ):
        headers = dict(alice._headers())
        own = headers.pop("mcp-session-id")
        others = ("mcp-session-id", bob.session_id or "")
        for twice in ([others, ("mcp-session-id", own)], [("mcp-session-id", own), others]):
            response = await alice._http.get(alice._url, headers=[*twice, *headers.items()])
            assert response.status_code == 400
            assert own not in response.text
        assert (await alice._http.get(alice._url, headers=[others, *headers.items()])).status_code == 404


@pytest.mark.parametrize("newest_last", [True, False])
async def test_two_protocol_versions_do_not_lead_past_the_layer(newest_last: bool) -> None:
    async with (
        serving("mcpserver", Steps(), InMemoryEventStore()) as (port, custody),
        StrictClient.connected(port) as client,
    ):
        headers = list(client._headers().items())
        newest = ("mcp-protocol-version", "2026-07-28")
        both = [*headers, newest] if newest_last else [newest, *headers]
        body = (
            '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"count","arguments":{"to":0,"label":"n"}}}'
        )
        assert (await post(client, body, both))[0] == 400
        (live,) = custody.live.values()
        assert not live.scope.running


# A full disk, and what the registry is told once there is room.


async def test_a_session_that_came_back_is_not_released_behind_its_back(tmp_path: Path) -> None:
    disk, steps = FullDisk(), Steps()
    store = PersistentEventStore(tmp_path / "e.db", disk=disk)
    async with serving("mcpserver", steps, store) as (port, custody), StrictClient.connected(port) as client:
        (key,) = custody.live
        disk.full = True
        assert await custody.let_go(custody.live[key])
        async with client.call(1, "count", to=1, label="n") as stream:
            await anext(stream)
            disk.full = False
            await custody.record_again()
            found = await custody.keeper.find(key)
            assert found is not None
            assert not found.released
            steps.allow(1)
            assert texts_of(await stream.rest()) == ["n counted to 1"]


async def test_a_session_that_ended_on_a_full_disk_stays_ended(tmp_path: Path) -> None:
    disk, steps = FullDisk(), Steps()
    store = PersistentEventStore(tmp_path / "e.db", disk=disk)
    async with serving("mcpserver", steps, store) as (port, custody), StrictClient.connected(port) as client:
        (key,) = custody.live
        disk.full = True
        assert await client.end() == 200
        for full in (True, False):
            disk.full = full
            async with client.call(1, "count", to=0, label="n") as stream:
                assert stream.response.status_code == 404
            await custody.record_again()
        assert await custody.keeper.find(key) is None


async def test_a_session_that_opened_and_ended_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    disk = FullDisk()
    store = PersistentEventStore(tmp_path / "e.db", disk=disk)
    async with serving("mcpserver", Steps(), store) as (port, custody):
        disk.full = True
        async with StrictClient.connected(port) as client:
            (key,) = custody.live
            assert await client.end() == 200
        disk.full = False
        await custody.record_again()
        assert await custody.keeper.find(key) is None


async def test_a_session_that_opened_and_was_parked_on_a_full_disk_is_kept(tmp_path: Path) -> None:
    disk, steps = FullDisk(), Steps()
    store = PersistentEventStore(tmp_path / "e.db", disk=disk)
    async with serving("mcpserver", steps, store) as (port, custody):
        disk.full = True
        async with StrictClient.connected(port) as client:
            ((key, live),) = custody.live.items()
            assert await custody.let_go(live)
            disk.full = False
            # Its events go first, once the journal can be written again.
            while (found := await custody.keeper.find(key)) is None or not found.released:
                await custody.record_again()
            assert texts_of(await call(client, 1, 0)) == ["n counted to 0"]


@contextlib.asynccontextmanager
async def two_workers(folder: Path, disk: FaultyDisk, steps: Steps) -> AsyncGenerator[tuple[int, int]]:
    """Serve one store twice in this process; the disk is the first one's."""
    first = PersistentEventStore(folder / "e.db", disk=disk)
    second = PersistentEventStore(folder / "e.db")
    async with serving("mcpserver", steps, first) as (one, _), serving("mcpserver", Steps(), second) as (two, _):
        yield one, two


async def test_a_resume_elsewhere_finds_events_that_only_their_worker_has(tmp_path: Path) -> None:
    disk, steps = FaultyDisk(), Steps()
    async with two_workers(tmp_path, disk, steps) as (one, two), StrictClient.connected(one) as client:
        async with client.call(1, "count", to=3, label="n") as stream:
            await anext(stream)
            disk.fail(Fault("write", name=".journal", from_then_on=True))
            disk.fail(Fault("create", name=".journal", from_then_on=True))
            steps.allow(2)
            seen = [await anext(stream), await anext(stream)]
        client._url = client._url.replace(str(one), str(two))
        async with client.resume(seen[0].id) as resumed:
            assert resumed.response.status_code == 200
            steps.allow(1)
            events = await resumed.rest()
        assert [event.id for event in events[:1]] == [seen[1].id]
        assert progress_of(events) == ["n 2", "n 3"]
        assert texts_of(events) == ["n counted to 3"]
        async with client.resume("12345") as refused:
            assert refused.response.status_code == 400
        disk.heal()


# The registry.


async def test_resumes_go_on_while_another_process_keeps_the_registry_s_lock(tmp_path: Path) -> None:
    async with Workers.running(tmp_path / "events.db", 2) as workers, deadline():
        client = await StubbornClient.connected(workers[0].port)
        done = await client.call("stroll", "n", to=3, pause_ms=0)
        lock = os.open(tmp_path / "events-log" / "registry.lock", os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        opening = [asyncio.create_task(StubbornClient.connected(workers[1].port)) for _ in range(20)]
        client.port = workers[1].port
        for _ in range(3):
            async with client.get(done.ids[0]) as exchange:
                assert [event.id for event in await exchange.rest()] == done.ids[1:]
        assert not any(task.done() for task in opening)
        os.close(lock)
        assert all(session.session_id for session in await asyncio.gather(*opening))


async def test_what_a_session_wrote_is_on_disk_before_it_is_released(tmp_path: Path) -> None:
    disk = FaultyDisk()
    options = LogOptions(durability="interval", sync_interval_s=3600, checkpoint_interval_s=3600)
    async with deadline(), Log(tmp_path / "events.db", options, disk) as log:
        await log.sessions.open("key", b"", "s/")
        # The first of a turn is synced.
        for number in range(3):
            await log.append(f"s/{number}", b"x")
        before = len(disk.calls)
        await log.sessions.release("key")
        kinds = [(kind, Path(name).suffix) for kind, name in disk.calls[before:]]
        assert kinds.index(("sync", ".journal")) < kinds.index(("write", ".log"))
        before = len(disk.calls)
        await log.sessions.release("key")
        assert ("sync", ".journal") not in [(kind, Path(name).suffix) for kind, name in disk.calls[before:]]


# What sessions leave in memory.


async def test_a_reader_keeps_a_parked_session_from_expiring(tmp_path: Path) -> None:
    steps = Steps()
    steps.allow(1)
    store = PersistentEventStore(tmp_path / "e.db")
    async with serving("mcpserver", steps, store) as (port, custody), StrictClient.connected(port) as client:
        events = await call(client, 1, 1)
        ((key, live),) = custody.live.items()
        log = await store.log()
        standalone = live.scope.name_of("_GET_stream")
        event_id = await log.append(standalone, b'{"jsonrpc":"2.0","method":"notifications/message"}', 2)
        assert await custody.let_go(live)
        before = await custody.keeper.find(key)
        async with client.resume(event_id) as stream:
            assert stream.response.status_code == 200
            await custody.expire()
            after = await custody.keeper.find(key)
            assert before is not None
            assert after is not None
            assert after.changed_us > before.changed_us
        assert events


def initialize(**capability: Any) -> dict[str, Any]:
    params = {
        "protocolVersion": PROTOCOL,
        "capabilities": {"experimental": {"x": capability}},
        "clientInfo": {"name": "x", "version": "1"},
    }
    return {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}


async def test_only_what_opens_a_session_again_is_kept_of_its_first_request() -> None:
    async with (
        serving("mcpserver", Steps(), InMemoryEventStore()) as (port, custody),
        StrictClient.connected(port) as client,
    ):
        client.session_id = None
        headers = list(client._headers().items())
        large = initialize(y="z" * (64 << 10))
        status, answer = await post(client, json.dumps(large), headers)
        assert status == 413
        assert "clientInfo and capabilities" in answer
        assert len(custody.live) == 1
        padded = initialize(y="z")
        padded["params"]["_meta"] = {"padding": "z" * 100_000}
        assert (await post(client, json.dumps(padded), headers))[0] == 200
        kept = [SessionData.decode(each.data).initialize for each in await custody.keeper.all()]
        assert max(map(len, kept)) < 1000


async def test_a_session_opened_with_nan_comes_back(tmp_path: Path) -> None:
    async with (
        serving("mcpserver", Steps(), PersistentEventStore(tmp_path / "e.db")) as (port, custody),
        StrictClient.connected(port) as client,
    ):
        assert await client.end() == 200
        client.session_id = None
        async with client._http.stream(
            "POST",
            client._url,
            content=json.dumps(initialize(y=float("nan"))),
            headers=client._headers() | {"content-type": "application/json"},
        ) as response:
            assert response.status_code == 200
            client.session_id = response.headers["mcp-session-id"]
            await response.aread()
        await client.notify("notifications/initialized")
        (live,) = custody.live.values()
        assert not live.scope.running
        assert await custody.let_go(live)
        assert texts_of(await call(client, 1, 0)) == ["n counted to 0"]


async def test_a_call_with_nan_in_it_counts_as_running() -> None:
    steps = Steps()
    async with (
        serving("mcpserver", steps, InMemoryEventStore()) as (port, custody),
        StrictClient.connected(port) as client,
    ):
        body = (
            '{"jsonrpc":"2.0","id":7,"method":"tools/call",'
            '"params":{"name":"count","arguments":{"to":1,"label":"n"},"_meta":{"z":NaN}}}'
        )
        headers = client._headers() | {"content-type": "application/json"}
        async with client._http.stream("POST", client._url, content=body, headers=headers) as response:
            assert response.status_code == 200
            (live,) = custody.live.values()
            assert live.scope.running == {f"{live.scope.prefix}7"}
            steps.allow(1)
            await response.aread()
        await eventually(lambda: not live.scope.running)


async def test_request_ids_that_look_like_numbers_are_forgotten_with_their_answer() -> None:
    async with (
        serving("mcpserver", Steps(), InMemoryEventStore()) as (port, custody),
        StrictClient.connected(port) as client,
    ):
        for number in range(5):
            async with client.call(str(number), "count", to=0, label="n") as stream:
                await stream.rest()
        (live,) = custody.live.values()
        assert not live.scope._text_ids


# Readers.


async def test_a_get_that_is_refused_ends_no_other() -> None:
    server = MCPServer("x")

    @server.tool()
    async def tell(ctx: Context) -> str:
        """Say something on the standalone stream."""
        await ctx.session.send_resource_updated("note://still-here")
        return "told"

    app = resumable_http_app(server, InMemoryEventStore())
    async with (
        deadline(),
        served(app) as port,
        StrictClient.connected(port) as client,
        client.resume(None) as listening,
    ):
        headers = client._headers() | {"accept": "application/json"}
        assert (await client._http.get(client._url, headers=headers)).status_code == 406
        async with client.request(1, "tools/call", {"name": "tell", "arguments": {}}) as stream:
            await stream.rest()
        event = await anext(listening)
        while event.message is None:
            event = await anext(listening)
        assert event.message["params"]["uri"] == "note://still-here"


async def test_the_beginning_of_a_response_is_not_overtaken() -> None:
    sent: list[str] = []
    go = asyncio.Event()

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def wait(_: Any) -> None:
        await go.wait()

    connection = Connection(receive, send)
    connection.on_start = wait
    async with deadline(), asyncio.TaskGroup() as tasks:
        tasks.create_task(connection.send({"type": "http.response.start", "status": 200, "headers": []}))
        await asyncio.sleep(0)
        tasks.create_task(connection.send({"type": "http.response.body", "body": b": ping", "more_body": True}))
        await asyncio.sleep(0)
        assert sent == []
        go.set()
    assert sent == ["http.response.start", "http.response.body"]
