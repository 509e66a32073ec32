"""How fast events are stored: `python -m bench.append`.

Each store, with 1 to 1,024 tasks that each store one event after another in a stream of their own, beside a bare loop
that appends the same bytes to a file and syncs it after as many events as there are tasks.
"""

from __future__ import annotations

import asyncio
import os
import time
from array import array
from pathlib import Path
from typing import Final

from bench.benchmark import Benchmark
from bench.claims import Claim
from bench.command import run
from bench.messages import MESSAGE, wire_bytes
from bench.peers import PEERS
from bench.pictures import draw_lines
from bench.turns import Figures, Place, Round, Rows, Task, subfolder
from bench.writers import Written, allow_connections, row_of, write_for

WRITERS: Final = (1, 16, 128, 1024)
BARE: Final = "bare write + fdatasync"
_QUICK_S: Final = 0.25
_FULL_S: Final = 1.0


def append(folder: Path, name: str, seconds: float, numbers: tuple[int, ...] = WRITERS) -> Rows:
    """Measure a store, a new one for each number of writers."""
    allow_connections()
    return {
        row_of(writers): asyncio.run(_append(subfolder(folder, writers), name, writers, seconds)) for writers in numbers
    }


async def _append(folder: Path, name: str, writers: int, seconds: float) -> Figures:
    async with PEERS[name].open(folder) as store:
        written = await write_for(store, writers, seconds)
    return written.figures


def bare(folder: Path, seconds: float, numbers: tuple[int, ...] = WRITERS) -> Rows:
    """Measure the bare loop, a new file for each number of events a sync."""
    return {row_of(batch): _write_bare(folder / str(batch), batch, seconds).figures for batch in numbers}


def _write_bare(path: Path, batch: int, seconds: float) -> Written:
    data = wire_bytes(MESSAGE) * batch
    sync = getattr(os, "fdatasync", os.fsync)
    times_s = array("d")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        started = last = time.perf_counter()
        while last - started < seconds:
            os.write(fd, data)
            sync(fd)
            now = time.perf_counter()
            times_s.append(now - last)
            last = now
    finally:
        os.close(fd)
    return Written(len(times_s) * batch, last - started, times_s)


def tasks(full: bool) -> dict[str, Task]:
    """Return a task for each store."""
    seconds = _FULL_S if full else _QUICK_S
    return {BARE: Task(bare, (seconds,))} | {name: Task(append, (name, seconds), (name,)) for name in PEERS}


def _rate(task: str, writers: int) -> Place:
    return Place(task, row_of(writers), "events_s")


CLAIMS: Final = (
    Claim(
        "always, 128 writers: rate, to mcp-persist SQLite's",
        of=_rate("logstore always", 128),
        relation=">=",
        must=6,
        goal=8,
        to=_rate("mcp-persist SQLite", 128),
    ),
    Claim(
        "always, 128 writers: rate, to the bare loop's in batches of 128",
        of=_rate("logstore always", 128),
        relation=">=",
        must=0.2,
        goal=0.3,
        to=_rate(BARE, 128),
    ),
    Claim(
        "always, 1 writer: median time, to the bare loop's",
        of=Place("logstore always", row_of(1), "p50_us"),
        relation="<=",
        must=1.6,
        goal=1.3,
        to=Place(BARE, row_of(1), "p50_us"),
    ),
    Claim(
        "always, 1 writer: mean time, to the bare loop's",
        of=_rate(BARE, 1),
        relation="<=",
        must=1.6,
        goal=1.3,
        to=_rate("logstore always", 1),
    ),
    Claim(
        "interval, 1 writer: rate, to mcp-persist write-behind's",
        of=_rate("logstore interval", 1),
        relation=">=",
        must=20,
        to=_rate("mcp-persist write-behind", 1),
    ),
)


def draw(rounds: list[Round], folder: Path) -> list[Path]:
    """Draw the rates over the number of writers."""
    durable = [name for name, peer in PEERS.items() if peer.acknowledged == "on disk"]
    panels = {
        "on disk when acknowledged": [BARE, *durable],
        "not yet on disk when acknowledged": [name for name in PEERS if name not in durable],
    }
    rows = {writers: row_of(writers) for writers in WRITERS}
    return draw_lines(rounds, panels, rows, "tasks that append", folder / "append.svg")


BENCHMARK: Final = Benchmark(
    name="append",
    title="events of 600 bytes, one after another from each of so many tasks",
    tasks=tasks,
    claims=CLAIMS,
    quick_rounds=2,
    draw=draw,
)

if __name__ == "__main__":
    run([BENCHMARK], "python -m bench.append")
