"""What resuming costs, and how fast it is: `python -m bench.resume`.

Real workers in processes of their own, real sockets. On Linux, since the processor time of a worker is read from /proc.

- on another worker: a call runs on one worker, its connection breaks, and the client comes to another one: from the GET
  to the first event that it missed. It goes on there: from the time in an event's id, which is drawn before it is
  written, to its arrival.
- cost of the layer: processor time of the server for a call that is never resumed, with the resume layer and with the
  bare store in the SDK; they take turns, and each pair gives a ratio.
- idle: processor time of a worker on which streams are followed that another one writes, and nothing comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import statistics
import time
from pathlib import Path
from typing import Final

from bench.benchmark import Benchmark
from bench.claims import Claim
from bench.command import run
from bench.processor import processor_s
from bench.turns import Place, Rows, Task
from logstore.storage.ids import time_ms_of
from tests.mcp.rig import Workers
from tests.mcp.rig_balancer import Balancer
from tests.mcp.rig_client import StubbornClient
from tests.mcp.strict_client import StrictClient

IDLE_S: Final = 5.0
_SESSIONS: Final = 20
_DESCRIPTORS: Final = 8192


def resume_and_live(folder: Path, times: int) -> Rows:
    """Measure how fast a resume on another worker is, and live events there."""
    return asyncio.run(_resume_and_live(folder, times))


async def _resume_and_live(folder: Path, times: int) -> Rows:
    missed: list[float] = []
    live: list[float] = []
    async with Workers.running(folder / "resume" / "events.db", 2) as workers:
        for number in range(times):
            label = f"n{number}"
            client = await StubbornClient.connected(workers[0].port)
            request = call_of(label, 3)
            async with client.post(request) as exchange:
                primed = await anext(exchange)
                workers.conductor.allow(label, 1)
                await anext(exchange)
            await workers.conductor.steps(label, 1)
            client.port = workers[1].port
            began = time.perf_counter()
            async with client.get(primed.id) as exchange:
                await anext(exchange)
                missed.append((time.perf_counter() - began) * 1000)
                workers.conductor.allow(label, 1)
                event = await anext(exchange)
                assert event.id is not None
                live.append(time.time() * 1000 - time_ms_of(int(event.id)))
                workers.conductor.allow_all(label)
                await exchange.rest()
            await client.end()
    return {
        "first missed event": {"p50_ms": statistics.median(missed), "most_ms": max(missed)},
        "live event": {"p50_ms": statistics.median(live), "most_ms": max(live)},
    }


def cost(folder: Path, pairs: int, calls: int) -> Rows:
    """Measure what the layer adds to the server's work for calls that are never resumed."""
    return asyncio.run(_cost(folder, pairs, calls))


async def _cost(folder: Path, pairs: int, calls: int) -> Rows:
    ratios: list[float] = []
    spent: dict[bool, list[float]] = {False: [], True: []}
    async with contextlib.AsyncExitStack() as stack:
        client_of: dict[bool, tuple[StrictClient, int]] = {}
        for bare in (False, True):
            path = folder / f"bare-{bare}" / "events.db"
            workers = await stack.enter_async_context(Workers.running(path, 1, bare=bare))
            client = await stack.enter_async_context(StrictClient.connected(workers[0].port))
            client_of[bare] = client, workers[0].pid
            await make_calls(client, calls, 0)
        for pair in range(pairs):
            for bare in (True, False) if pair % 2 else (False, True):
                client, pid = client_of[bare]
                before = processor_s(pid)
                await make_calls(client, calls, (pair + 1) * calls)
                spent[bare].append((processor_s(pid) - before) / calls * 1000)
            ratios.append((spent[False][-1] / spent[True][-1] - 1) * 100)
    return {
        "": {
            "cpu_ms": statistics.median(spent[False]),
            "cpu_ms_bare": statistics.median(spent[True]),
            "more_percent": statistics.median(ratios),
        }
    }


async def make_calls(client: StrictClient, calls: int, first: int) -> None:
    """Make calls one after another, of three progress reports each, on a connection that is kept."""
    for number in range(first, first + calls):
        async with client.call(number + 1, "stroll", to=3, label="n", pause_ms=0) as stream:
            assert len(await stream.rest()) == 5


def idle(folder: Path, streams: int) -> Rows:
    """Measure what streams cost that are followed on another worker while nothing comes."""
    return asyncio.run(_idle(folder, streams))


async def _idle(folder: Path, streams: int) -> Rows:
    resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    async with (
        Workers.running(folder / "idle" / "events.db", 2) as workers,
        Balancer.over(workers.ports) as balancer,
        asyncio.TaskGroup() as tasks,
    ):
        balancer.towards(workers[0].port)
        clients = [await StubbornClient.connected(balancer.port) for _ in range(_SESSIONS)]
        calls = [clients[number % _SESSIONS].begin(f"n{number}") for number in range(streams)]
        running = [
            tasks.create_task(clients[number % _SESSIONS].run(call, "count", to=1)) for number, call in enumerate(calls)
        ]
        for call in calls:
            await workers.conductor.started(call.name)
        while not all(call.ids for call in calls):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        balancer.towards(workers[1].port)
        await balancer.cut()
        while sum(each.to_client > 0 and each.backend == workers[1].port for each in balancer.open) < streams:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        before = [processor_s(worker.pid) for worker in workers]
        await asyncio.sleep(IDLE_S)
        shares = [(processor_s(worker.pid) - was) / IDLE_S * 100 for worker, was in zip(workers, before, strict=True)]
        for task in running:
            task.cancel()
    return {"": {"core_percent": shares[1], "core_percent_of_writer": shares[0]}}


def call_of(label: str, to: int) -> dict[str, object]:
    """Return the request that makes a tool count."""
    params = {"name": "count", "arguments": {"to": to, "label": label}, "_meta": {"progressToken": 1}}
    return {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}


_ELSEWHERE: Final = "on another worker"
_COST: Final = "cost of the layer"
_IDLE: Final = "idle, 1,000 streams followed"


def tasks(full: bool) -> dict[str, Task]:
    """Return the tasks; a quick run has fewer resumes, and leaves out the thousand streams."""
    if not full:
        return {_ELSEWHERE: Task(resume_and_live, (10,)), _COST: Task(cost, (4, 40))}
    return {
        _ELSEWHERE: Task(resume_and_live, (50,)),
        _COST: Task(cost, (15, 150)),
        _IDLE: Task(idle, (1_000,)),
    }


CLAIMS: Final = (
    Claim(
        "resume on another worker: first missed event, ms",
        Place(_ELSEWHERE, "first missed event", "p50_ms"),
        relation="<=",
        must=100,
    ),
    Claim(
        "live event there after its id was drawn, ms",
        Place(_ELSEWHERE, "live event", "p50_ms"),
        relation="<=",
        must=50,
    ),
    Claim(
        "server's processor time of a call that never resumes: more for the layer, %",
        Place(_COST, "", "more_percent"),
        relation="<=",
        must=3,
    ),
    Claim("1,000 idle followed streams: % of a core", Place(_IDLE, "", "core_percent"), relation="<=", must=5),
)

BENCHMARK: Final = Benchmark(
    name="resume",
    title="resuming on another worker, and what the resume layer costs",
    tasks=tasks,
    claims=CLAIMS,
    full_rounds=1,
)

if __name__ == "__main__":
    run([BENCHMARK], "python -m bench.resume")
