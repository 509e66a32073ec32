"""Two users with different credentials: neither sees a byte of the other's, nor learns what there is."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.mcp.rig import DEADLINE_S, Workers
from tests.mcp.rig_client import StubbornClient
from tests.mcp.rig_http import Exchange
from tests.mcp.rig_orders import USERS, ServerKind
from tests.mcp.strict_client import PROTOCOL
from tests.mcp.test_many_workers import SERVERS

NOWHERE = "0123456789abcdef0123456789abcdef"
"""A session id that looks like one of the SDK's, and that nobody has."""
_NOT_COMPARED = {"date", "content-length"}


class Seen(NamedTuple):
    """All that a client sees of a response, but its date."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


async def see(
    port: int, verb: str, user: str | None, session_id: str | None, event_id: str | None = None, body: Any = None
) -> Seen:
    """Ask as a user, and read what comes, of a stream that does not end what comes at once."""
    headers = {"accept": "application/json, text/event-stream", "mcp-protocol-version": PROTOCOL}
    given = {
        "authorization": None if user is None else f"Bearer {user}",
        "mcp-session-id": session_id,
        "last-event-id": event_id,
    }
    headers |= {name: value for name, value in given.items() if value is not None}
    async with Exchange.begun(port, verb, headers, body) as exchange:
        if exchange.is_stream and event_id is None:
            return Seen(exchange.status, (), b"")
        content = await exchange.body()
        named = tuple(sorted((name, value) for name, value in exchange.headers.items() if name not in _NOT_COMPARED))
        # What they sent themselves tells them nothing.
        return Seen(exchange.status, tuple((n, v.replace(session_id or "\0", "?")) for n, v in named), content)


class User:
    """One user, a session of theirs, and a call that they made in it."""

    def __init__(self, name: str, client: StubbornClient, ids: list[str]) -> None:
        self.name = name
        self.session_id = client.session_id
        self.client = client
        self.ids = ids
        self.secret = f"secret-of-{name}".encode()


async def users_of(port: int) -> list[User]:
    users = []
    for name in USERS:
        client = await StubbornClient.connected(port, name)
        call = await client.call("stroll", f"secret-of-{name}", to=3, pause_ms=0)
        users.append(User(name, client, call.ids))
    return users


@pytest.mark.promise("sessions-apart", "refusals-alike")
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("happened", ["nothing", "another worker", "a restart"])
async def test_every_combination_of_session_id_and_credential(
    tmp_path: Path, server: ServerKind, happened: str
) -> None:
    count = 2 if happened == "another worker" else 1
    async with (
        asyncio.timeout(2 * DEADLINE_S),
        Workers.running(tmp_path / "events.db", count, server=server, auth=True) as workers,
    ):
        alice, bob = users = await users_of(workers[0].port)
        port = workers[count - 1].port
        if happened == "a restart":
            await workers[0].kill()
            await workers[0].start()
        sessions = [alice.session_id, bob.session_id, NOWHERE, "", None]
        events = [alice.ids[0], bob.ids[0], str(int(bob.ids[0]) + 1), "1", str(2**70), "x", None]
        credentials = [*USERS, "mallory", None]
        seen: dict[tuple[str | None, str | None, str | None], Seen] = {}
        for user, session_id, event_id in itertools.product(credentials, sessions, events):
            key = (user, session_id, event_id)
            seen[key] = await see(port, "GET", user, session_id, event_id)
        for (user, session_id, event_id), what in seen.items():
            for owner in users:
                theirs = (user, session_id, event_id) == (owner.name, owner.session_id, owner.ids[0])
                assert (owner.secret in what.body) == theirs, (user, session_id, event_id)
            if user not in USERS:
                assert what.status == 401
        for owner, other in ((alice, bob), (bob, alice)):
            # Somebody else's session is like none, whatever the event.
            for event_id in events:
                nowhere = seen[owner.name, NOWHERE, event_id]
                assert seen[owner.name, other.session_id, event_id] == nowhere
                assert nowhere.status == 404
            # In one's own, somebody else's event is like none.
            refusals = {seen[owner.name, owner.session_id, event_id] for event_id in events[2:-1]}
            refusals.add(seen[owner.name, owner.session_id, other.ids[0]])
            (refusal,) = refusals
            assert refusal.status == 400


@pytest.mark.promise("credential-decides", "refusals-alike")
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("happened", ["nothing", "another worker", "a restart"])
async def test_nobody_speaks_in_somebody_else_s_session_or_ends_it(
    tmp_path: Path, server: ServerKind, happened: str
) -> None:
    count = 2 if happened == "another worker" else 1
    call = {"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": "process", "arguments": {}}}
    notification = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    async with (
        asyncio.timeout(2 * DEADLINE_S),
        Workers.running(tmp_path / "events.db", count, server=server, auth=True) as workers,
    ):
        alice, bob = await users_of(workers[0].port)
        port = workers[count - 1].port
        if happened == "a restart":
            await workers[0].kill()
            await workers[0].start()
        for verb, body in (("POST", call), ("POST", notification), ("POST", {"id": 1}), ("DELETE", None)):
            foreign = await see(port, verb, alice.name, bob.session_id, body=body)
            assert foreign == await see(port, verb, alice.name, NOWHERE, body=body)
            assert foreign.status == 404
            assert (await see(port, verb, None, bob.session_id, body=body)).status == 401
        bob.client.port = port
        assert (await bob.client.call("process", "p")).result is not None
        assert await bob.client.end() == 200
        # Once it has ended, it is like none for its owner, too.
        ended = await see(port, "GET", bob.name, bob.session_id, bob.ids[0])
        assert ended == await see(port, "GET", bob.name, NOWHERE, bob.ids[0])


@pytest.mark.promise("sessions-apart")
async def test_without_authentication_the_session_id_alone_decides(tmp_path: Path) -> None:
    async with asyncio.timeout(DEADLINE_S), Workers.running(tmp_path / "events.db", 2) as workers:
        alice, bob = await users_of(workers[0].port)
        for worker in workers:
            for event_id in (bob.ids[0], str(int(bob.ids[-1]) + 1), "nonsense"):
                refused = await see(worker.port, "GET", None, alice.session_id, event_id)
                assert refused == await see(worker.port, "GET", None, alice.session_id, "1")
                assert refused.status == 400
            mine = await see(worker.port, "GET", None, alice.session_id, alice.ids[0])
            assert alice.secret in mine.body
            assert bob.secret not in mine.body
