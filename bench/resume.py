"""What resuming costs, and how fast it is: `python -m bench.resume`.

Real workers in processes of their own, real sockets. On Linux, since the processor time of a worker is read from /proc.

- resume: a call runs on one worker, its connection breaks, and the client comes to another one: from the GET to the
  first event that it missed.
- live: it goes on there: from the time in an event's id, which is drawn before it is written, to its arrival.
- cost: processor time of the server for a call that is never resumed, with the resume layer and with the bare store in
  the SDK; they take turns, and each pair gives a ratio.
- idle: processor time of a worker on which a thousand streams are followed that another one writes, and nothing comes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, NamedTuple

from tabulate import tabulate

from logstore.storage.ids import time_ms_of
from tests.mcp.rig import Workers
from tests.mcp.rig_balancer import Balancer
from tests.mcp.rig_client import StubbornClient
from tests.mcp.strict_client import StrictClient

IDLE_S: Final = 5.0
_SESSIONS: Final = 20
_DESCRIPTORS: Final = 8192


class Figure(NamedTuple):
    """One row of the result."""

    words: str
    bound: float
    value: float
    unit: str
    detail: str


async def resume_and_live(folder: Path, times: int) -> list[Figure]:
    """Measure how fast a resume on another worker is, and live events there."""
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
    return [
        Figure("resume on another worker: first missed event", 100, statistics.median(missed), "ms", spread(missed)),
        Figure("live event there, after its id was drawn", 50, statistics.median(live), "ms", spread(live)),
    ]


async def cost(folder: Path, pairs: int, calls: int) -> list[Figure]:
    """Measure what the layer adds to the server's work for calls that are never resumed."""
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
    ranked = sorted(ratios)
    detail = (
        f"{statistics.median(spent[True]):.2f} ms bare, {statistics.median(spent[False]):.2f} ms with the layer; "
        f"half of the pairs from {ranked[pairs // 4]:.1f} to {ranked[-1 - pairs // 4]:.1f} %"
    )
    return [
        Figure("server's processor time of a call that never resumes, more", 3, statistics.median(ratios), "%", detail)
    ]


async def make_calls(client: StrictClient, calls: int, first: int) -> None:
    """Make calls one after another, of three progress reports each, on a connection that is kept."""
    for number in range(first, first + calls):
        async with client.call(number + 1, "stroll", to=3, label="n", pause_ms=0) as stream:
            assert len(await stream.rest()) == 5


async def idle(folder: Path, streams: int) -> list[Figure]:
    """Measure what streams cost that are followed on another worker while nothing comes."""
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
    detail = f"{shares[0]:.1f} % of the one that runs the calls"
    return [Figure(f"{streams} idle followed streams: of a core", 5, shares[1], "%", detail)]


def call_of(label: str, to: int) -> dict[str, object]:
    """Return the request that makes a tool count."""
    params = {"name": "count", "arguments": {"to": to, "label": label}, "_meta": {"progressToken": 1}}
    return {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}


def processor_s(pid: int) -> float:
    """Return the processor time that all threads of a process have had, to the nanosecond."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def spread(values: list[float]) -> str:
    """Return the spread of a series."""
    ranked = sorted(values)
    return f"{ranked[0]:.0f} to {ranked[-1]:.0f}, p95 {ranked[int(len(ranked) * 0.95)]:.0f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.resume", description="What resuming costs.")
    parser.add_argument("--case", action="append", choices=["resume", "cost", "idle"], help="only this one")
    parser.add_argument("--times", type=int, default=50, help="resumes (%(default)s)")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of runs with and without the layer (%(default)s)")
    parser.add_argument("--calls", type=int, default=150, help="calls a run (%(default)s)")
    parser.add_argument("--streams", type=int, default=1000, help="streams that are followed (%(default)s)")
    parser.add_argument("--dir", type=Path, help="where the stores are written and removed again: on a real disk")
    arguments = parser.parse_args()
    cases: dict[str, Callable[[Path], Awaitable[list[Figure]]]] = {
        "resume": lambda folder: resume_and_live(folder, arguments.times),
        "cost": lambda folder: cost(folder, arguments.pairs, arguments.calls),
        "idle": lambda folder: idle(folder, arguments.streams),
    }
    rows: list[list[str]] = []
    for name in arguments.case or cases:
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=arguments.dir) as folder:
            for figure in asyncio.run(_figures(cases[name], Path(folder))):
                holds = "yes" if figure.value <= figure.bound else "NO"
                value = f"{figure.value:.1f} {figure.unit}"
                rows.append([figure.words, f"<= {figure.bound:g} {figure.unit}", value, holds, figure.detail])
    print(tabulate(rows, headers=["", "must be", "median", "holds", ""], disable_numparse=True))


async def _figures(case: Callable[[Path], Awaitable[list[Figure]]], folder: Path) -> list[Figure]:
    return await case(folder)


if __name__ == "__main__":
    main()
