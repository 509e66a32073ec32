"""What a store costs a whole server: `python -m bench.server`.

The SDK's HTTP server in a process of its own, and clients that call a tool, five events a call: calls a second, and the
processor time of a call in the server, with what a server behind the store takes. For what must hold two servers are up
at once and take turns of a fraction of a second, so that what the machine does hits both alike. On Linux, since the
processor time of a process is read from /proc.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from bench.benchmark import Benchmark
from bench.claims import Claim
from bench.clients import Client, make_calls
from bench.command import run
from bench.peers import PEERS
from bench.percentiles import percentiles
from bench.pictures import draw_bars
from bench.processor import processor_s
from bench.serving import NO_STORE, serve
from bench.turns import Figures, Place, Round, Rows, Task, beside, subfolder

CLIENTS: Final = (1, 16)
_WARM_CALLS: Final = 64
_BASE: Final = "dict"


class Server(NamedTuple):
    """A server that runs.

    Attributes:
        pid: Its process.
        port: Where it listens.
    """

    pid: int
    port: int


@contextmanager
def running(name: str, folder: Path) -> Generator[Server]:
    """Run a server with a store for the block."""
    with beside(serve, name, folder) as (process, told):
        assert process.pid is not None
        yield Server(process.pid, told.recv())


@asynccontextmanager
async def connected(server: Server, clients: int) -> AsyncGenerator[list[Client]]:
    """Open sessions with a server, and make it warm."""
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(Client.connected(server.port)) for _ in range(clients)]
        await make_calls(opened, _WARM_CALLS)
        yield opened


def calls(folder: Path, name: str, number: int, numbers: tuple[int, ...] = CLIENTS) -> Rows:
    """Measure a server with a store, a new one for each number of clients."""
    rows: Rows = {}
    for clients in numbers:
        with running(name, subfolder(folder, clients)) as server:
            rows[_row(clients)] = asyncio.run(_calls(server, number, clients))
    return rows


async def _calls(server: Server, number: int, clients: int) -> Figures:
    async with connected(server, clients) as opened:
        before = processor_s(server.pid)
        began = time.perf_counter()
        times_s = await make_calls(opened, number)
        seconds = time.perf_counter() - began
        cpu_s = processor_s(server.pid) - before
    return {"calls_s": len(times_s) / seconds, "cpu_ms": cpu_s / len(times_s) * 1e3, **percentiles(times_s)}


def pair(folder: Path, name: str, pairs: int, number: int, numbers: tuple[int, ...] = CLIENTS) -> Rows:
    """Measure what a call costs with a store, and with a dict at the same time."""
    rows: Rows = {}
    for clients in numbers:
        own, other = (subfolder(folder, f"{side}-{clients}") for side in ("own", "other"))
        with running(name, own) as server, running(_BASE, other) as base:
            rows[_row(clients)] = asyncio.run(_pair(server, base, pairs, number, clients))
    return rows


async def _pair(server: Server, base: Server, pairs: int, number: int, clients: int) -> Figures:
    costs_ms: tuple[list[float], list[float]] = ([], [])
    async with connected(server, clients) as own, connected(base, clients) as other:
        turns = list(zip((server, base), (own, other), costs_ms, strict=True))
        for turn in range(pairs):
            for each, opened, found in turns if turn % 2 else reversed(turns):
                before = processor_s(each.pid)
                await make_calls(opened, number)
                found.append((processor_s(each.pid) - before) / number * 1e3)
    return {
        "cpu_ms": statistics.median(costs_ms[0]),
        "dict_cpu_ms": statistics.median(costs_ms[1]),
        "cpu_ratio": statistics.median(own / other for own, other in zip(*costs_ms, strict=True)),
    }


def _row(clients: int) -> str:
    return "1 client" if clients == 1 else f"{clients} clients"


_QUICK: Final = (NO_STORE, _BASE, "logstore always", "logstore interval", "original FULL", "mcp-persist SQLite")
_LEFT_OUT: Final = {"logstore os", "original NORMAL"}
_PAIRED: Final = ("logstore always", "logstore interval")


def _paired(name: str) -> str:
    return f"{name}, beside {_BASE}"


def tasks(full: bool) -> dict[str, Task]:
    """Return a task for each store, and the pairs."""
    number, pairs, a_turn = (480, 32, 96) if full else (160, 6, 48)
    names = [NO_STORE, *(name for name in PEERS if name not in _LEFT_OUT)] if full else _QUICK
    return {name: Task(calls, (name, number), tuple(set(PEERS) & {name})) for name in names} | {
        _paired(name): Task(pair, (name, pairs, a_turn)) for name in _PAIRED
    }


CLAIMS: Final = tuple(
    Claim(
        f"whole server, {durability}, {_row(clients)}: processor time of a call, to the dict's",
        of=Place(_paired(f"logstore {durability}"), _row(clients), "cpu_ratio"),
        relation="<=",
        must=1.05,
    )
    for durability, clients in (("always", 16), ("interval", 1))
)


def draw(rounds: list[Round], folder: Path) -> list[Path]:
    """Draw what a call costs the server."""
    panels = {
        f"{_row(clients)}: ms of processor time a call": Place("", _row(clients), "cpu_ms") for clients in CLIENTS
    }
    names = [name for name in tasks(True) if name not in map(_paired, _PAIRED)]
    return draw_bars(rounds, panels, names, folder / "server.svg")


BENCHMARK: Final = Benchmark(
    name="server",
    title="calls of a tool on a whole server, five events each",
    tasks=tasks,
    claims=CLAIMS,
    draw=draw,
)

if __name__ == "__main__":
    run([BENCHMARK], "python -m bench.server")
