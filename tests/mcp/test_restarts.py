"""Workers that are killed, stopped, frozen and started again: sessions go on, and what cannot go on says so."""

from __future__ import annotations

import asyncio
import contextlib
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from logstore.ops.verify.store import verify
from tests.engine import eventually
from tests.mcp.rig import DEADLINE_S, Workers
from tests.mcp.rig_balancer import Balancer
from tests.mcp.rig_client import Account, Call, StubbornClient, check_counted
from tests.mcp.rig_orders import ServerKind
from tests.mcp.test_many_workers import SERVERS

AT_ONCE_S = 5.0
"""Far under any deadline of the layer's own, far over what two busy cores need."""


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[Workers]:
    async with Workers.running(tmp_path / "events.db", 3) as running:
        yield running


@pytest.fixture
async def balancer(workers: Workers) -> AsyncIterator[Balancer]:
    async with Balancer.over(workers.ports) as opened:
        yield opened


async def counting(client: StubbornClient, workers: Workers, to: int) -> tuple[Call, asyncio.Task[None]]:
    """Start a call, and return when two of its steps have come."""
    call = client.begin(f"n{to}")
    running = asyncio.create_task(client.run(call, "count", to=to))
    workers.conductor.allow(call.name, 2)
    await eventually(lambda: len(call.texts) == 2, "two steps")
    return call, running


def check_died(call: Call, to: int) -> None:
    """Check that a call ended with the clear error of a worker that died, and lost nothing before."""
    check_counted(call, to, "")
    assert call.error is not None
    assert "call again" in call.error["message"]


@pytest.mark.promise("sessions-outlive-restarts", "dead-calls-end")
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("resumed_on", ["another worker", "the worker started again"])
async def test_a_call_whose_worker_was_killed_ends_at_once_with_a_clear_error_and_the_session_goes_on(
    tmp_path: Path, server: ServerKind, resumed_on: str
) -> None:
    count = 2 if resumed_on == "another worker" else 1
    async with (
        asyncio.timeout(DEADLINE_S),
        Workers.running(tmp_path / "events.db", count, server=server) as workers,
        Balancer.over(workers.ports) as balancer,
    ):
        balancer.towards(workers[0].port)
        client = await StubbornClient.connected(balancer.port)
        call, running = await counting(client, workers, 5)
        balancer.towards()
        await workers[0].kill()
        if count == 1:
            await workers[0].start()
        async with asyncio.timeout(AT_ONCE_S):
            await running
        check_died(call, 5)
        assert call.texts == ["n5 1", "n5 2"]
        again = await client.call("stroll", "again", to=3, pause_ms=0)
        check_counted(again, 3, "again counted to 3")
        assert again.result is not None
        # Whoever resumes it later gets the same.
        async with client.get(call.ids[0]) as exchange:
            assert [event.id for event in await exchange.rest()] == call.ids[1:]


@pytest.mark.promise("sessions-outlive-restarts")
async def test_all_workers_are_killed_and_the_sessions_go_on(workers: Workers, balancer: Balancer) -> None:
    async with asyncio.timeout(DEADLINE_S):
        clients = [await StubbornClient.connected(balancer.port) for _ in range(6)]
        calls = [await counting(client, workers, 10 + number) for number, client in enumerate(clients[:3])]
        answered = await clients[3].call("stroll", "answered", to=4, pause_ms=0)
        for worker in workers:
            await worker.kill()
        for worker in workers:
            await worker.start()
        for number, (call, running) in enumerate(calls):
            await running
            check_died(call, 10 + number)
        for number, client in enumerate(clients):
            call = await client.call("stroll", f"after-{number}", to=2, pause_ms=0)
            check_counted(call, 2, f"after-{number} counted to 2")
            assert call.result is not None
        # What had been answered is still there, whole.
        async with clients[3].get(answered.ids[0]) as exchange:
            assert [event.id for event in await exchange.rest()] == answered.ids[1:]


@pytest.mark.promise("sessions-outlive-restarts")
async def test_an_answer_that_the_client_did_not_see_outlives_its_worker(workers: Workers, balancer: Balancer) -> None:
    async with asyncio.timeout(DEADLINE_S):
        balancer.towards(workers[0].port)
        client = await StubbornClient.connected(balancer.port)
        seen = await client.call("stroll", "n", to=4, pause_ms=0)
        await workers[0].kill()
        balancer.towards(workers[1].port)
        late = Call("n", ids=seen.ids[:2], texts=seen.texts[:1], request_id=seen.request_id)
        await client.finish(late)
        check_counted(late, 4, "n counted to 4")
        assert late.ids == seen.ids


@pytest.mark.promise("drain")
async def test_a_graceful_stop_lets_a_running_call_finish(tmp_path: Path) -> None:
    async with (
        asyncio.timeout(DEADLINE_S),
        Workers.running(tmp_path / "events.db", 2, drain_s=DEADLINE_S) as workers,
        Balancer.over(workers.ports) as balancer,
    ):
        balancer.towards(workers[0].port)
        client = await StubbornClient.connected(balancer.port)
        call, running = await counting(client, workers, 5)
        balancer.towards(workers[1].port)
        workers[0].ask_to_stop()
        # Its stream ends cleanly, and the client comes back on the other worker.
        await eventually(lambda: call.resumes, "the end of the stream")
        assert not any(each.cut for each in balancer.log if each.tag in call.tags)
        workers.conductor.allow_all(call.name)
        await running
        check_counted(call, 5, "n5 counted to 5")
        assert call.result is not None
        await workers[0].stopped()
        check_counted(await client.call("stroll", "next", to=1, pause_ms=0), 1, "next counted to 1")


@pytest.mark.promise("drain")
async def test_a_graceful_stop_ends_what_does_not_finish(tmp_path: Path) -> None:
    async with (
        asyncio.timeout(DEADLINE_S),
        Workers.running(tmp_path / "events.db", 2, drain_s=0.2) as workers,
        Balancer.over(workers.ports) as balancer,
    ):
        balancer.towards(workers[0].port)
        client = await StubbornClient.connected(balancer.port)
        call, running = await counting(client, workers, 5)
        balancer.towards(workers[1].port)
        await workers[0].stop()
        await running
        check_died(call, 5)


@pytest.mark.promise("drain")
async def test_a_graceful_stop_of_all_takes_nothing_from_the_sessions(workers: Workers, balancer: Balancer) -> None:
    async with asyncio.timeout(DEADLINE_S):
        clients = [await StubbornClient.connected(balancer.port) for _ in range(4)]
        calls = [await client.call("stroll", f"before-{n}", to=2, pause_ms=0) for n, client in enumerate(clients)]
        await asyncio.gather(*(worker.stop() for worker in workers))
        for worker in workers:
            await worker.start()
        for number, client in enumerate(clients):
            call = await client.call("stroll", f"after-{number}", to=2, pause_ms=0)
            check_counted(call, 2, f"after-{number} counted to 2")
            assert call.result is not None
            async with client.get(calls[number].ids[0]) as exchange:
                assert [event.id for event in await exchange.rest()] == calls[number].ids[1:]
    assert workers.complaints() == []


async def test_a_stop_does_not_wait_for_a_stream_that_another_worker_does_not_begin(tmp_path: Path) -> None:
    async with asyncio.timeout(DEADLINE_S), Workers.running(tmp_path / "events.db", 2) as workers:
        frozen, stopping = workers
        client, other = await StubbornClient.connected(frozen.port), await StubbornClient.connected(stopping.port)
        frozen.freeze()
        client.port = stopping.port
        listening = asyncio.create_task(client.listen(Account("notes")))
        # With this answered, the request for the stream has arrived.
        await other.call("process", "p")
        async with asyncio.timeout(AT_ONCE_S):
            await stopping.stop()
        listening.cancel()
        frozen.thaw()


@pytest.mark.promise("rolling-restart")
@pytest.mark.slow
async def test_a_rolling_restart_under_load_loses_nothing(workers: Workers, balancer: Balancer) -> None:
    stopping = asyncio.Event()
    unread: list[str] = []

    async def work(client: StubbornClient, number: int) -> list[Call]:
        calls: list[Call] = []
        while not stopping.is_set():
            label = f"{number}-{len(calls)}"
            calls.append(await client.call("stroll", label, to=6, pause_ms=10, told=True))
            if calls[-1].lost:
                # When uvicorn is told to stop it closes, without a byte, connections of which it has read nothing yet.
                unread.append(label)
                continue
            check_counted(calls[-1], 6, f"{label} counted to 6")
            assert calls[-1].result is not None, (
                f"{label}: {calls[-1].error or [each for each in balancer.log if each.tag in calls[-1].tags]}"
            )
        return calls

    async with asyncio.timeout(2 * DEADLINE_S):
        clients = [await StubbornClient.connected(balancer.port) for _ in range(8)]
        working = [asyncio.create_task(work(client, number)) for number, client in enumerate(clients)]
        for worker in workers:
            await worker.restart()
        stopping.set()
        made = await asyncio.gather(*working)
        begun = {call.name for calls in made for call in calls} - set(unread)
        await eventually(lambda: begun <= workers.conductor.runs.keys(), "what every worker has begun")
    # Who makes an unread call again does not make it twice.
    assert workers.conductor.runs.keys() == begun
    assert all(made)
    assert len(unread) <= len(workers)
    assert workers.complaints() == []


@pytest.mark.promise("one-worker-serves")
async def test_two_workers_take_over_one_session_at_the_same_moment_and_one_serves_it(workers: Workers) -> None:
    async with asyncio.timeout(DEADLINE_S):
        clients = [await StubbornClient.connected(workers[0].port) for _ in range(8)]
        await workers[0].kill()

        async def through(client: StubbornClient, port: int, name: str) -> Call:
            direct = StubbornClient(port)
            direct.session_id = client.session_id
            call = direct.begin(name)
            call.request_id = port
            await direct.run(call, "process")
            return call

        calls = await asyncio.gather(
            *(
                through(client, workers[number].port, f"{each}-{number}")
                for each, client in enumerate(clients)
                for number in (1, 2)
            )
        )
        owners = [{calls[2 * each].text, calls[2 * each + 1].text} for each in range(len(clients))]
        assert [len(pids) for pids in owners] == [1] * len(clients)


@pytest.mark.promise("never-sent-twice", "frozen-keeps")
async def test_a_frozen_worker_keeps_its_sessions_and_goes_on_when_it_comes_back(
    workers: Workers, balancer: Balancer
) -> None:
    async with asyncio.timeout(DEADLINE_S):
        balancer.towards(workers[0].port)
        client = await StubbornClient.connected(balancer.port)
        answered = await client.call("stroll", "answered", to=2, pause_ms=0)
        call, running = await counting(client, workers, 5)
        workers[0].freeze()
        balancer.towards(workers[1].port)
        await balancer.cut()
        # What is stored is served without it.
        async with client.get(answered.ids[0]) as exchange:
            assert [event.id for event in await exchange.rest()] == answered.ids[1:]
        # It holds the session, so nobody else runs its calls: not both of them.
        asked = client.begin("asked")
        asking = asyncio.create_task(client.run(asked, "count", to=1))
        workers.conductor.allow_all("asked")
        await eventually(lambda: call.resumes, "a resume while it is frozen")
        workers[0].thaw()
        workers.conductor.allow_all(call.name)
        await running
        check_counted(call, 5, "n5 counted to 5")
        assert call.result is not None
        await asking
        check_counted(asked, 1, "asked counted to 1")
        assert workers.conductor.runs.get("asked", workers[0].pid) == workers[0].pid
        assert (await client.call("process", "p")).text == str(workers[0].pid)


@pytest.mark.promise("dead-calls-end")
async def test_a_frozen_worker_that_is_killed_loses_its_sessions_to_the_others(
    workers: Workers, balancer: Balancer
) -> None:
    async with asyncio.timeout(DEADLINE_S):
        balancer.towards(workers[0].port)
        client = await StubbornClient.connected(balancer.port)
        call, running = await counting(client, workers, 5)
        workers[0].freeze()
        balancer.towards(workers[1].port, workers[2].port)
        await balancer.cut()
        await eventually(lambda: call.resumes, "a resume while it is frozen")
        await workers[0].kill()
        await running
        check_died(call, 5)
        assert (await client.call("process", "p")).text in {str(workers[1].pid), str(workers[2].pid)}


async def test_sockets_that_dead_workers_left_are_in_nobody_s_way(workers: Workers, tmp_path: Path) -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await StubbornClient.connected(workers[0].port)
        for _ in range(4):
            await workers[0].kill()
            client.port = workers[1].port
            assert (await client.call("process", "p")).text == str(workers[1].pid)
            await workers[0].start()
            client.port = workers[0].port
            assert (await client.call("process", "p")).text == str(workers[1].pid)
        left = sockets_in(tmp_path)
        # Each start sweeps what the one before left, or lets at most the last one lie.
        assert len(left) <= len(workers) + 1


def sockets_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if stat.S_ISSOCK(path.stat().st_mode)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={24 << 20}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_up(path: Path) -> None:
    """Take all the room that is left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.promise("degrade-serves-on", "catches-up")
async def test_while_the_disk_is_full_calls_go_on_and_then_everything_is_there(small_disk: Path) -> None:
    path, filler = small_disk / "events.db", small_disk / "filler"
    steps = 3000
    async with (
        asyncio.timeout(2 * DEADLINE_S),
        Workers.running(path, 2) as workers,
        Balancer.over(workers.ports) as balancer,
    ):
        balancer.towards(workers[0].port)
        client = await StubbornClient.connected(balancer.port)
        call, running = await counting(client, workers, steps)
        await asyncio.to_thread(fill_up, filler)
        # More than the room that journals had kept for themselves.
        large = [await client.call("large", f"big{number}", size=1_000_000) for number in range(20)]
        workers.conductor.allow(call.name, steps - 4)
        await eventually(lambda: len(call.texts) == steps - 2, "steps while the disk is full")
        filler.unlink()
        workers.conductor.allow_all(call.name)
        await running
        check_counted(call, steps, f"n{steps} counted to {steps}")
        assert {each.result is not None for each in large} == {True}
        # Once the disk is back, the other worker has it all, too.
        balancer.towards(workers[1].port)
        late: Any = Call(call.name, ids=call.ids[:1], request_id=call.request_id)
        await client.finish(late)
        assert late.ids == call.ids
        for worker in workers:
            await worker.stop()
    assert verify(path).ok
