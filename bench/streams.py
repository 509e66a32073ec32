"""How the number of streams tells: `python -m bench.streams`.

The same number of events in ever more streams, down to three events in each. The million streams are in
`bench.sustained`, beside the rate that they are to keep.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from bench.benchmark import Benchmark
from bench.command import run
from bench.peers import PEERS
from bench.turns import Figures, Rows, Task, subfolder
from bench.writers import allow_connections, write

WRITERS: Final = 128
EVENTS_A_STREAM: Final = 3
STORES: Final[dict[str, int]] = {
    "logstore always": 1,
    "logstore interval": 1,
    "original FULL": 8,
    "mcp-persist SQLite": 8,
    "Redis Streams everysec": 8,
}
"""What is measured, and by what the number of its events is divided: they are slow."""


def append(folder: Path, name: str, events: int) -> Rows:
    """Measure a store with ever more streams, a new store for each number."""
    allow_connections()
    most = events // EVENTS_A_STREAM
    numbers = [number for number in (1, 100, 10_000) if number < most]
    return {
        "1 stream" if number == 1 else f"{number:,} streams": asyncio.run(
            _append(subfolder(folder, number), name, events, number)
        )
        for number in (*numbers, most)
    }


async def _append(folder: Path, name: str, events: int, streams: int) -> Figures:
    def stream_of(writer: int, number: int) -> str:
        # All writers go through the streams, so that a stream's events come one after another.
        return f"stream-{(number * WRITERS + writer) * streams // events}"

    async with PEERS[name].open(folder) as store:
        written = await write(store, WRITERS, events // WRITERS * WRITERS, stream_of=stream_of)
    return written.figures


def tasks(full: bool) -> dict[str, Task]:
    """Return a task for each store."""
    events = 384_000 if full else 19_200
    return {name: Task(append, (name, events // divisor), (name,)) for name, divisor in STORES.items()}


BENCHMARK: Final = Benchmark(
    name="streams",
    title=f"events of 600 bytes from {WRITERS} tasks, in ever more streams",
    tasks=tasks,
    full_rounds=1,
)

if __name__ == "__main__":
    run([BENCHMARK], "python -m bench.streams")
