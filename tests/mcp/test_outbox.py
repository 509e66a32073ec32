"""What a response shows is stored before it leaves, and nobody waits longer for that than needed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from starlette.types import Message

from logstore.mcp import PersistentEventStore
from logstore.mcp.connections import Connection
from logstore.mcp.outbox import Outbox
from logstore.mcp.scope import SessionScope
from logstore.storage import Durability, Log, LogOptions
from tests.engine import deadline, eventually, small
from tests.mcp.serving import Steps
from tests.mcp.strict_client import Sse, StrictClient
from tests.mcp.test_connections import never
from tests.mcp.test_http import answers_of, progress_of
from tests.mcp.test_resume import serving
from tests.storage.disks import HeldDisk

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
NEVER_S = 1e9


@pytest.fixture(autouse=True)
def nothing_lingers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no part wait for those behind it; tests of that set their own time."""
    linger(monkeypatch, 0)


def linger(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for name in ("_LINGER_S", "_MOST_LINGER_S"):
        monkeypatch.setattr(f"logstore.mcp.outbox.{name}", seconds)


class Response:
    """A response, whose events are stored when a test says so, and whose server may fail or wait."""

    def __init__(self) -> None:
        self.session = SessionScope()
        self.heads: list[Message] = []
        self.sent: list[tuple[bytes, bool]] = []
        self.waiting: dict[int, asyncio.Future[None]] = {}
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.problem: Exception | None = None
        self.blocks_at_head = False
        # Whether a test sends parts of a body alone.
        self.is_bare = False

    def is_stored(self, event_id: int) -> bool:
        return event_id not in self.waiting

    async def until_stored(self, event_id: int) -> None:
        if (waiting := self.waiting.get(event_id)) is not None:
            await asyncio.shield(waiting)

    def add(self, event_id: int) -> None:
        """Add an event that is not stored yet."""
        self.session.newest = event_id
        self.waiting[event_id] = asyncio.get_running_loop().create_future()

    def store(self, *event_ids: int) -> None:
        for event_id in event_ids:
            self.waiting.pop(event_id).set_result(None)

    async def send(self, message: Message) -> None:
        if self.problem is not None:
            raise self.problem
        if message["type"] == "http.response.start":
            self.heads.append(message)
            if self.blocks_at_head:
                await self.may_send.wait()
            return
        assert self.heads or self.is_bare, "the beginning comes first"
        self.sent.append((message["body"], message["more_body"]))
        await self.may_send.wait()

    def outbox(self) -> Outbox:
        self.is_bare = True
        outbox = Outbox(self.send)
        outbox.wait_for(self.session, self)
        return outbox

    async def connection(self, request: bytes = b"{}") -> Connection:
        """A connection whose response has begun."""
        connection = Connection(never, self.send)
        connection.body, connection.received = request, True
        connection.hold_back(self.session, self)
        await connection.send(START)
        return connection

    async def is_quiet(self) -> bool:
        """Whether everybody had a turn, and nothing was sent."""
        before = list(self.sent)
        for _ in range(10):
            await asyncio.sleep(0)
        return self.sent == before


def sending() -> list[str]:
    """Return what runs of outboxes."""
    return [repr(task) for task in asyncio.all_tasks() if "Outbox" in repr(task.get_coro())]


def body(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


@pytest.mark.promise("stored-before-sent")
async def test_parts_wait_for_their_events_and_leave_together() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection()
        for event_id in (1, 2, 3):
            response.add(event_id)
            await connection.send(body(b"id: %d\r\n\r\n" % event_id))
        assert await response.is_quiet()
        assert response.sent == []
        response.store(1, 2)
        await eventually(lambda: bool(response.sent), "what is stored")
        assert response.sent == [(b"id: 1\r\n\r\nid: 2\r\n\r\n", True)]
        ending = asyncio.create_task(connection.send(body(b"end", more=False)))
        assert await response.is_quiet()
        assert not ending.done()
        response.store(3)
        await ending
        assert response.sent[1:] == [(b"id: 3\r\n\r\nend", False)]
        assert connection.finished
        assert connection.resumable


async def test_what_waits_for_nothing_leaves_soon() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection()
        await eventually(lambda: bool(response.heads), "the beginning")
        await connection.send(body(b"a"))
        await eventually(lambda: bool(response.sent), "a part")
        await connection.send(body(b"b", more=False))
        assert response.sent == [(b"a", True), (b"b", False)]
        await connection.send(body(b"too late"))
    assert response.heads == [START]
    assert len(response.sent) == 2


async def test_what_comes_in_a_row_leaves_together(monkeypatch: pytest.MonkeyPatch) -> None:
    linger(monkeypatch, NEVER_S)
    response = Response()
    connection = await response.connection()
    for part in (b"a", b"b"):
        await connection.send(body(part))
        assert await response.is_quiet()
    await connection.send(body(b"", more=False))
    assert response.sent == [(b"ab", False)]
    # Its length is known by then: the server need not send it in pieces with an end of their own.
    assert response.heads == [{**START, "headers": [(b"content-length", b"2")]}]


async def test_the_length_that_a_response_has_is_its_own() -> None:
    for headers, data in ([(b"Content-Length", b"2")], b"ok"), ([], b""):
        response = Response()
        connection = Connection(never, response.send)
        connection.hold_back(response.session, response)
        await connection.send({**START, "headers": headers})
        await connection.send(body(data, more=False))
        assert response.heads == [{**START, "headers": headers}]
        assert response.sent == [(data, False)]


async def test_what_the_server_waits_for_does_not_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    linger(monkeypatch, NEVER_S)
    response = Response()
    ask = b'data: {"jsonrpc":"2.0","id":7,"method":"sampling/createMessage"}'
    async with deadline():
        connection = await response.connection()
        await connection.send(body(b"before, "))
        await connection.send(body(ask))
        await eventually(lambda: bool(response.sent), "the question")
    assert response.sent == [(b"before, " + ask, True)]


async def test_the_longer_a_turn_of_the_loop_takes_the_longer_a_part_lingers(monkeypatch: pytest.MonkeyPatch) -> None:
    linger(monkeypatch, 0)
    monkeypatch.setattr("logstore.mcp.outbox._MOST_LINGER_S", NEVER_S)
    for turns, is_held in ((NEVER_S * 1e6, True), (0, False)):
        monkeypatch.setattr("logstore.mcp.outbox._LINGER_TURNS", turns)
        response = Response()
        connection = await response.connection()
        await connection.send(body(b"a"))
        assert await response.is_quiet() == is_held
        assert response.sent == ([] if is_held else [(b"a", True)])
        assert response.heads == ([] if is_held else [START])
        await connection.finish()


async def test_who_is_cancelled_while_sending_sends_nothing_twice() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection()
        await eventually(lambda: bool(response.heads), "the beginning")
        response.may_send.clear()
        sending_all = asyncio.create_task(connection.send(body(b"all", more=False)))
        await eventually(lambda: bool(response.sent), "the body")
        sending_all.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending_all
        response.may_send.set()
        await connection.finish()
    # What the server got is not known: its client sees a response without an end, and comes back.
    assert response.heads == [START]
    assert response.sent == [(b"all", False)]


async def test_nobody_drops_a_body_whose_length_was_told() -> None:
    response = Response()
    response.blocks_at_head = True
    async with deadline():
        connection = await response.connection(b"")
        response.may_send.clear()
        sending_all = asyncio.create_task(connection.send(body(b"id: 1\r\n\r\n", more=False)))
        await eventually(lambda: bool(response.heads), "the beginning")
        connection.end()
        response.may_send.set()
        await sending_all
        await connection.finish()
    assert response.heads == [{**START, "headers": [(b"content-length", b"9")]}]
    assert response.sent == [(b"id: 1\r\n\r\n", False)]


async def test_a_response_that_was_whole_when_it_was_ended_has_a_beginning() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection(b"")
        response.add(1)
        # Somebody is to send it, and meets the end.
        await connection.send(body(b'{"id":1,"method":"m"}'))
        ending = asyncio.create_task(connection.send(body(b"", more=False)))
        await asyncio.sleep(0)
        connection.end()
        await connection.finish()
        response.store(1)
        assert await response.is_quiet()
        assert ending.done()
        with pytest.raises(asyncio.CancelledError):
            await ending
    assert response.heads == [START]
    assert response.sent == [(b"", False)]


async def test_what_is_stored_of_a_whole_response_leaves_without_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logstore.mcp.connections._STORE_S", 0)
    linger(monkeypatch, NEVER_S)
    response = Response()
    async with deadline():
        connection = await response.connection()
        await connection.send(body(b"id: 1\r\n\r\n"))
        response.add(2)
        await connection.send(body(b'{"id":1,"method":"m"}'))
        ending = asyncio.create_task(connection.send(body(b"", more=False)))
        await asyncio.sleep(0)
        ending.cancel()
        await connection.finish()
        assert sending() == []
    assert response.heads == [START]
    assert response.sent == [(b"id: 1\r\n\r\n", True), (b"", False)]


async def test_a_response_that_is_ended_while_it_lingers_begins_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    linger(monkeypatch, NEVER_S)
    response = Response()
    connection = await response.connection(b"")
    await connection.send(body(b"id: 1\r\n\r\n"))
    connection.end()
    await connection.finish()
    assert response.heads == [START]
    assert response.sent == [(b"", False)]


async def test_no_part_overtakes_one_that_waits_or_is_being_sent() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection()
        response.add(1)
        await connection.send(body(b"1"))
        # Stored already, as a ping is.
        response.session.newest = 0
        await connection.send(body(b"ping"))
        assert await response.is_quiet()
        response.may_send.clear()
        response.store(1)
        await eventually(lambda: bool(response.sent), "the first")
        await connection.send(body(b"another"))
        assert await response.is_quiet()
        response.may_send.set()
        await connection.send(body(b"", more=False))
    assert response.sent == [(b"1ping", True), (b"another", False)]


@pytest.mark.promise("memory-bounded")
async def test_a_client_that_does_not_read_holds_up_who_sends() -> None:
    response = Response()
    outbox = response.outbox()
    async with deadline():
        response.add(1)
        await outbox.send(body(bytes(40 << 10)))
        putting = asyncio.create_task(outbox.send(body(bytes(40 << 10))))
        assert await response.is_quiet()
        assert not putting.done()
        response.may_send.clear()
        response.store(1)
        await eventually(lambda: bool(response.sent), "what was put")
        assert not putting.done()
        response.may_send.set()
        await putting
        await outbox.send(body(b"", more=False))
    assert [len(each) for each, _ in response.sent] == [80 << 10, 0]


async def test_who_is_cancelled_takes_nothing_along() -> None:
    response = Response()
    outbox = response.outbox()
    async with deadline():
        response.add(1)
        await outbox.send(body(b"1"))
        putting = asyncio.create_task(outbox.send(body(b"2", more=False)))
        await asyncio.sleep(0)
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        response.store(1)
        await outbox.settle()
    assert response.sent == [(b"12", False)]


async def test_that_a_part_cannot_be_sent_is_told_to_who_sends_the_next() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection()
        response.add(1)
        await connection.send(body(b"1"))
        response.problem = OSError("gone")
        response.store(1)
        assert await response.is_quiet()
        for _ in range(2):
            with pytest.raises(OSError, match="gone"):
                await connection.send(body(b"2"))
        await connection.finish()
    assert response.sent == []


async def test_of_a_connection_that_was_ended_nothing_leaves_but_its_end() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection()
        await connection.send(body(b"id: 1\r\n\r\n"))
        await eventually(lambda: bool(response.sent), "the id")
        response.add(2)
        await connection.send(body(b"id: 2\r\n\r\n"))
        ending = asyncio.create_task(connection.send(body(b"", more=False)))
        await asyncio.sleep(0)
        connection.end()
        await connection.finish()
        assert response.sent == [(b"id: 1\r\n\r\n", True), (b"", False)]
        response.store(2)
        await ending
        assert len(response.sent) == 2


async def test_a_connection_is_ended_behind_the_id_that_lets_its_client_come_back() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection()
        response.add(1)
        await connection.send(body(b"id: 1\r\n\r\n"))
        connection.end()
        assert not connection.ended
        response.store(1)
        await eventually(lambda: connection.ended, "its end")
        await connection.send(body(b"id: 2\r\n\r\n"))
        await connection.finish()
    assert response.sent == [(b"id: 1\r\n\r\n", True), (b"", False)]


async def test_what_waits_when_the_sdk_has_ended_is_still_sent() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection()
        response.add(1)
        await connection.send(body(b"id: 1\r\n\r\n"))
        finishing = asyncio.create_task(connection.finish(b"id: 0\r\n\r\n"))
        assert await response.is_quiet()
        response.store(1)
        await finishing
    # Not the id behind it: its client would come back with that, and get the event again.
    assert response.sent == [(b"id: 1\r\n\r\n", True), (b"", False)]


async def test_the_id_to_come_back_with_is_stored_before_it_leaves() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection()
        response.add(1)
        finishing = asyncio.create_task(connection.finish(b"id: 1\r\n\r\n"))
        assert await response.is_quiet()
        assert response.sent == []
        response.store(1)
        await finishing
    assert response.sent == [(b"id: 1\r\n\r\n", False)]


async def test_a_response_whose_event_is_never_stored_ends_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logstore.mcp.connections._STORE_S", 0)
    response = Response()
    async with deadline():
        connection = await response.connection()
        response.add(1)
        await connection.send(body(b"id: 1\r\n\r\n"))
        await connection.finish()
        response.store(1)
        assert await response.is_quiet()
    assert response.sent == [(b"", False)]


async def test_a_response_that_is_never_stored_begins_and_ends_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    linger(monkeypatch, NEVER_S)
    monkeypatch.setattr("logstore.mcp.connections._STORE_S", 0)
    response = Response()
    async with deadline():
        connection = await response.connection()
        response.add(1)
        answering = asyncio.create_task(connection.send(body(b"all", more=False)))
        await asyncio.sleep(0)
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
        await connection.finish()
    assert response.heads == [START]
    assert response.sent == [(b"", False)]


async def test_what_shows_nothing_waits_for_nothing() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection()
        response.add(1)
        # The SDK looks at a notification when it has answered it.
        await connection.send(body(b"", more=False))
    assert response.sent == [(b"", False)]


async def test_a_part_that_comes_late_does_not_open_the_response_again() -> None:
    response = Response()
    go = asyncio.Event()

    async def wait(_: Message) -> None:
        await go.wait()

    connection = Connection(never, response.send)
    connection.on_start = wait
    response.add(1)
    connection.hold_back(response.session, response)
    async with deadline(), asyncio.TaskGroup() as tasks:
        tasks.create_task(connection.send(START))
        await asyncio.sleep(0)
        tasks.create_task(connection.send(body(b"all", more=False)))
        tasks.create_task(connection.send(body(b"ping")))
        await asyncio.sleep(0)
        go.set()
        assert await response.is_quiet()
        response.store(1)
    assert response.sent == [(b"all", False)]


async def test_the_end_of_a_request_leaves_nothing_running() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection()
        response.add(1)
        response.may_send.clear()
        ending = asyncio.create_task(connection.send(body(b"all", more=False)))
        assert await response.is_quiet()
        response.store(1)
        await eventually(lambda: bool(response.sent), "the last part")
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        await connection.finish()
        assert await response.is_quiet()
        assert sending() == []


async def test_who_finishes_may_be_cancelled() -> None:
    response = Response()
    async with deadline():
        connection = await response.connection()
        response.add(1)
        await connection.send(body(b"1"))
        await eventually(lambda: len(sending()) == 1, "who sends it")
        finishing = asyncio.create_task(connection.finish())
        await asyncio.sleep(0)
        finishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finishing
        response.store(1)
        assert await response.is_quiet()
        assert sending() == []
    assert response.sent == []


# With a server and a log.


@pytest.mark.promise("stored-before-sent", "one-sync-for-all")
async def test_a_client_sees_nothing_that_is_not_on_disk_and_its_call_goes_on_meanwhile(tmp_path: Path) -> None:
    disk, steps = HeldDisk(), Steps()
    store = PersistentEventStore(tmp_path / "events.db", disk=disk)
    async with serving("mcpserver", steps, store) as (port, _), StrictClient.connected(port) as client:
        disk.hold()
        syncs = disk.syncs
        async with client.call(1, "count", to=3, label="n") as stream:
            arriving = asyncio.create_task(stream.rest())
            steps.allow(1)
            await steps.until(1)
            await eventually(lambda: disk.syncs > syncs, "a sync")
            # The SDK takes the next message when it has given the one before away: it need not wait for the disk.
            steps.allow(2)
            await steps.until(3)
            assert not arriving.done()
            assert stream.response.status_code == 200
            assert stream.response.num_bytes_downloaded == 0
            disk.let_go()
            events = await arriving
        assert progress_of(events) == ["n 1", "n 2", "n 3"]
        assert len(answers_of(events)) == 1
        assert disk.syncs - syncs < len(events) == 5


@pytest.mark.promise("one-owner")
async def test_what_a_session_has_queued_is_in_segments_before_it_is_released(tmp_path: Path) -> None:
    disk, path = HeldDisk(), tmp_path / "events.db"
    async with deadline(), Log(path, small(checkpoint_interval_s=NEVER_S), disk) as log:
        await log.sessions.open("key", b"", "s/")
        await log.append("other", b"")
        disk.hold()
        syncs = disk.syncs
        writing = asyncio.create_task(log.append("other", b""))
        await eventually(lambda: disk.syncs > syncs, "a sync")
        added = log.add("s/1", b"queued", wait=False)
        assert added is not None
        assert added[1] is None
        assert not log.is_stored(added[0])
        releasing = asyncio.create_task(log.sessions.release("key"))
        for _ in range(10):
            await asyncio.sleep(0)
        disk.let_go()
        await releasing
        await writing
        assert log.is_stored(added[0])
        assert [each.stream for each in log.stream_summaries()] == ["other", "s/1"]


@pytest.mark.parametrize("durability", ["always", "interval", "os"])
async def test_what_nobody_waits_for_is_stored_soon_and_together(
    tmp_path: Path, durability: Durability, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logstore.storage.commit._LINGER_S", 0)
    async with deadline(), Log(tmp_path / "events.db", LogOptions(durability=durability)) as log:
        await log.append("s", b"")
        commits = log.stats().commits
        added = [log.add("s", b"queued", wait=False) for _ in range(3)]
        assert not any(log.is_stored(each[0]) for each in added if each is not None)
        await eventually(lambda: log.stats().commits > commits, "a commit")
        assert log.stats().commits == commits + 1
        assert len(await log.read("s")) == 4


@pytest.mark.parametrize("durability", ["always", "interval", "os"])
async def test_what_somebody_waits_for_is_stored_at_once(
    tmp_path: Path, durability: Durability, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logstore.storage.commit._LINGER_S", NEVER_S)
    async with deadline(), Log(tmp_path / "events.db", LogOptions(durability=durability)) as log:
        await log.append("s", b"")
        added = log.add("s", b"queued", wait=False)
        assert added is not None
        await log.until_stored(added[0])
        assert log.is_stored(added[0])
        assert len(await log.read("s")) == 2


@pytest.mark.promise("memory-bounded")
@pytest.mark.parametrize("size", [0, 100 << 10])
async def test_who_does_not_wait_has_to_once_much_is_queued(tmp_path: Path, size: int) -> None:
    disk = HeldDisk()
    async with deadline(), Log(tmp_path / "events.db", LogOptions(checkpoint_interval_s=NEVER_S), disk) as log:
        await log.append("s", b"")
        disk.hold()
        waiting: asyncio.Future[None] | None = None
        taken = 0
        while waiting is None:
            added = log.add("s", bytes(size), wait=False)
            assert added is not None
            waiting = added[1]
            taken += 1
        disk.let_go()
        await waiting
        assert taken == 11 if size else 2_000 < taken < 3_000
        assert len(await log.read("s", limit=10_000)) == 1 + taken


# Stopping.


@pytest.mark.promise("drain")
async def test_a_server_that_stops_waits_for_answers_that_are_not_on_disk(tmp_path: Path) -> None:
    disk, steps = HeldDisk(), Steps()
    store = PersistentEventStore(tmp_path / "events.db", disk=disk)
    async with serving("mcpserver", steps, store) as (port, custody), StrictClient.connected(port) as client:
        disk.hold()
        syncs = disk.syncs
        steps.allow(1)

        async def call() -> list[Sse]:
            async with client.call(1, "count", to=1, label="n") as stream:
                return await stream.rest()

        calling = asyncio.create_task(call())
        await eventually(lambda: disk.syncs > syncs, "a sync")
        (live,) = custody.live.values()
        await eventually(lambda: not live.scope.running, "its answer")
        draining = asyncio.create_task(custody.drain())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not draining.done()
        disk.let_go()
        await draining
        assert len(answers_of(await calling)) == 1
