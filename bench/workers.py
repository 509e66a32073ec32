"""Several processes over one store: `python -m bench.workers`.

Each appends from 16 tasks, and what all of them get acknowledged in the same seconds is added up. No other embedded
store can do this; beside it stands a Redis server that as many processes append to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from mcp.server.streamable_http import EventStore

from bench.benchmark import Benchmark
from bench.command import run
from bench.messages import MESSAGE
from bench.peers import PEERS
from bench.peers.redis_streams import joined
from bench.peers.servers import redis_server
from bench.turns import Rows, Task, beside, subfolder

NUMBERS: Final = (1, 2, 4)
WRITERS: Final = 16
_REDIS: Final = "Redis Streams everysec"
_PAUSE_S: Final = 0.2
_QUICK_S: Final = 0.5
_FULL_S: Final = 2.0


def append(folder: Path, name: str, seconds: float, numbers: tuple[int, ...] = NUMBERS) -> Rows:
    """Measure a store with one process and with more, a new one each time."""
    rows: Rows = {}
    for number in numbers:
        own = subfolder(folder, number)
        with ExitStack() as stack:
            pipes = [stack.enter_context(beside(_work, own, name, worker))[1] for worker in range(number)]
            row = "1 process" if number == 1 else f"{number} processes"
            rows[row] = {"events_s": asyncio.run(_let_work(pipes, own, name, seconds)) / seconds}
    return rows


async def _let_work(pipes: list[Connection], folder: Path, name: str, seconds: float) -> int:
    """Let processes append for some seconds, the same for all; return how many events were acknowledged meanwhile."""
    with _shared(name, folder) as port:
        for pipe in pipes:
            pipe.send(port)
            # One after another: they are ready when the last one is.
            await asyncio.to_thread(pipe.recv)
        begins = time.monotonic() + _PAUSE_S
        for pipe in pipes:
            pipe.send((begins, begins + seconds))
        return sum([await asyncio.to_thread(pipe.recv) for pipe in pipes])


@contextmanager
def _shared(name: str, folder: Path) -> Generator[int]:
    """Start what the processes share; yield the port of its server, 0 when there is none."""
    if name != _REDIS:
        yield 0
        return
    with redis_server(folder, "everysec") as port:
        yield port


def _work(told: Connection, folder: Path, name: str, worker: int) -> None:
    asyncio.run(_append(told, folder, name, worker))


async def _append(told: Connection, folder: Path, name: str, worker: int) -> None:
    """Append from one moment to another that all processes are told."""
    port: int = told.recv()
    done = 0

    async def one(store: EventStore, writer: int) -> None:
        nonlocal done
        while time.monotonic() < ends:
            await store.store_event(f"{worker}-{writer}", MESSAGE)
            done += time.monotonic() < ends

    async with joined(port) if port else PEERS[name].open(folder) as store:
        await store.store_event(f"{worker}", MESSAGE)
        told.send("ready")
        begins, ends = await asyncio.to_thread(told.recv)
        await asyncio.sleep(begins - time.monotonic())
        async with asyncio.TaskGroup() as tasks:
            for writer in range(WRITERS):
                tasks.create_task(one(store, writer))
        told.send(done)


def tasks(full: bool) -> dict[str, Task]:
    """Return a task for each store."""
    seconds = _FULL_S if full else _QUICK_S
    names = ("logstore always", "logstore interval", _REDIS)
    return {name: Task(append, (name, seconds), (name,)) for name in names}


BENCHMARK: Final = Benchmark(
    name="workers", title=f"appends of 600 bytes from several processes, {WRITERS} tasks each", tasks=tasks
)

if __name__ == "__main__":
    run([BENCHMARK], "python -m bench.workers")
