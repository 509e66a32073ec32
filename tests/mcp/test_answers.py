"""What a client is told when something cannot go on, what proxies need, and what is kept of who the client is."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from pathlib import Path

import pytest
from mcp.server.auth.provider import AccessToken, TokenVerifier
from mcp.server.auth.settings import AuthSettings
from pydantic import AnyHttpUrl
from sse_starlette import EventSourceResponse
from starlette.types import Message

from logstore.mcp import InMemoryEventStore, PersistentEventStore, layer, resumable_http_app
from logstore.mcp.peers import CALL_KEY, PeerCall
from logstore.mcp.shutdown import ServerWatch
from logstore.ops.transfer.export import export_events
from tests.mcp.serving import DEADLINE_S, Steps, counting_server, served
from tests.mcp.strict_client import Stream, StrictClient
from tests.mcp.test_http import answers_of, progress_of
from tests.mcp.test_resume import call, layer_of, serving, session


def damage(path: Path, event_id: str) -> None:
    """Change a byte of an event in its segment."""
    with contextlib.closing(sqlite3.connect(path)) as catalogue:
        sql = "select file, offset from events join segments using (segment_id) where event_id = ?"
        file, offset = catalogue.execute(sql, (int(event_id),)).fetchone()
    segment = path.with_name("e-log") / file
    data = bytearray(segment.read_bytes())
    data[offset + 12] ^= 1
    segment.write_bytes(data)


@pytest.mark.promise("gap-ends-the-call")
async def test_a_call_some_of_whose_events_are_gone_ends_with_an_error_and_never_goes_on_behind_the_hole(
    tmp_path: Path,
) -> None:
    steps = Steps()
    steps.allow(4)
    async with session(PersistentEventStore(tmp_path / "e.db"), steps) as (client, _):
        whole = await call(client, 7, 4)
    damage(tmp_path / "e.db", whole[3].id)
    async with session(PersistentEventStore(tmp_path / "e.db"), steps, client.session_id) as (again, _):
        for known in range(3):
            async with again.resume(whole[known].id) as stream:
                assert stream.response.status_code == 200
                *before, end = await stream.rest()
            assert before == whole[known + 1 : 3]
            assert (end.id, end.message and end.message["id"]) == (None, 7)
            assert "without a hole" in answers_of([end])[0]["error"]["message"]
        # Who is behind it has missed nothing.
        async with again.resume(whole[3].id) as stream:
            assert await stream.rest() == whole[4:]


@pytest.mark.promise("refusals-as-slow")
async def test_a_refusal_takes_as_long_whatever_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal_s = 0.1
    monkeypatch.setattr(layer, "_REFUSAL_S", refusal_s)
    steps = Steps()
    steps.allow(1)
    app = resumable_http_app(counting_server(steps), InMemoryEventStore())
    async with (
        asyncio.timeout(DEADLINE_S),
        served(app) as port,
        StrictClient.connected(port) as alice,
        StrictClient.connected(port) as bob,
    ):
        theirs = (await call(bob, 1, 1))[0].id
        ended = bob.session_id
        assert await bob.end() == 200
        for session_id, event_id in ((alice.session_id, theirs), (alice.session_id, "1"), (ended, theirs), ("x", "1")):
            alice.session_id = session_id
            began_s = time.monotonic()
            async with alice.resume(event_id) as stream:
                assert stream.response.status_code in (400, 404)
            assert time.monotonic() - began_s >= refusal_s


@pytest.mark.promise("stopping-refuses")
async def test_a_single_process_that_stops_refuses_new_calls_and_says_that_nothing_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps()
    steps.allow(1)
    async with session(PersistentEventStore(tmp_path / "e.db"), steps) as (client, _):
        with monkeypatch.context() as patch:
            patch.setattr(ServerWatch, "is_stopping", True)
            async with client.call(1, "count", to=1, label="n") as stream:
                assert stream.response.status_code == 503
                await stream.response.aread()
            error = stream.response.json()
        assert (error["id"], "nothing was done" in error["error"]["message"]) == (1, True)
        assert steps.done == 0
        assert progress_of(await call(client, 2, 1)) == ["n 1"]


@pytest.mark.promise("one-hop")
async def test_what_was_passed_on_is_not_passed_on_again(tmp_path: Path) -> None:
    steps = Steps()
    steps.allow(1)
    one, two = (
        resumable_http_app(counting_server(steps), PersistentEventStore(tmp_path / "e.db"), drain_s=0.01)
        for _ in range(2)
    )
    async with (
        asyncio.timeout(DEADLINE_S),
        served(one) as first,
        served(two) as second,
        StrictClient.connected(first) as client,
    ):
        passed_on = PeerCall(lambda: None)
        sent: list[Message] = []
        headers = [(b"mcp-session-id", (client.session_id or "").encode()), (b"mcp-protocol-version", b"2025-11-25")]
        body = (
            b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"count","arguments":{"to":1,"label":"n"}}}'
        )

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/mcp", "headers": headers, CALL_KEY: passed_on}
        await layer_of(two)(scope, receive, send)
        # Who passed it on looks again; here it was not begun.
        assert passed_on.again
        assert steps.done == 0
        # As it came from a client it is passed on.
        client._url = client._url.replace(str(first), str(second))
        assert progress_of(await call(client, 2, 1)) == ["n 1"]


async def until_comment(stream: Stream) -> list[str]:
    """Return the lines of a stream up to the first comment."""
    assert stream.response.headers["x-accel-buffering"] == "no"
    assert "no-transform" in stream.response.headers["cache-control"]
    lines: list[str] = []
    async for line in stream._lines:
        lines.append(line)
        if line.startswith(":"):
            return lines
    raise AssertionError(f"it ended without a comment: {lines}")


@pytest.mark.promise("streams-kept-open")
async def test_streams_are_kept_open_and_tell_proxies_not_to_hold_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EventSourceResponse.DEFAULT_PING_INTERVAL == 15
    monkeypatch.setattr(EventSourceResponse, "DEFAULT_PING_INTERVAL", 0.01)
    async with (
        serving("mcpserver", Steps(), InMemoryEventStore(), drain_s=0.01) as (port, _),
        StrictClient.connected(port) as client,
    ):
        async with client.call(1, "count", to=1, label="n") as posted:
            first, *_ = await until_comment(posted)
        async with client.resume(first.removeprefix("id: ")) as resumed, client.resume(None) as standalone:
            for stream in (resumed, standalone):
                await until_comment(stream)


@pytest.mark.promise("session-id-hashed")
async def test_the_id_of_a_session_is_nowhere_on_the_disk_nor_in_an_export(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    steps = Steps()
    steps.allow(2)
    async with session(PersistentEventStore(path), steps) as (client, _):
        await call(client, 1, 2)
        secret = (client.session_id or "").encode()
        running = await asyncio.to_thread(files_with, tmp_path, secret)
    export_events(path, tmp_path / "export.json")
    assert len(secret) >= 32
    assert running + await asyncio.to_thread(files_with, tmp_path, secret) == []
    # Its calls are.
    assert await asyncio.to_thread(files_with, tmp_path, b"n counted to 2")


def files_with(folder: Path, text: bytes) -> list[str]:
    found = []
    for file in folder.rglob("*"):
        # A running store makes and removes files.
        with contextlib.suppress(FileNotFoundError):
            if file.is_file() and text in file.read_bytes():
                found.append(file.name)
    return found


class Tokens(TokenVerifier):
    """A token names its client, its subject, and which one of theirs it is."""

    async def verify_token(self, token: str) -> AccessToken | None:
        client, subject, _ = token.split("-")
        return AccessToken(token=token, client_id=client, scopes=[], subject=subject)


@pytest.mark.promise("credential-decides")
async def test_a_renewed_token_is_the_same_client_and_another_subject_is_another() -> None:
    steps = Steps()
    steps.allow(1)
    auth = AuthSettings(issuer_url=AnyHttpUrl("http://127.0.0.1"), resource_server_url=None)
    server = counting_server(steps, token_verifier=Tokens(), auth=auth)
    async with (
        asyncio.timeout(DEADLINE_S),
        served(resumable_http_app(server, InMemoryEventStore())) as port,
        StrictClient.connected(port, "app-alice-1") as client,
    ):
        events = await call(client, 1, 1)
        for token, status in (("app-alice-2", 200), ("app-bob-1", 404), ("other-alice-1", 404)):
            client._token = token
            async with client.resume(events[0].id) as stream:
                assert stream.response.status_code == status
                assert (await stream.rest() == events[1:]) == (status == 200)
