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
from bench.memory import peak_mb
from bench.peers import PEERS
from bench.turns import Rows, Task, in_process
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
    """Measure a store with ever more streams, each in a process of its own for its memory."""
    rows: Rows = {}
    streams = 1
    while streams <= events // EVENTS_A_STREAM:
        rows |= in_process(_append, folder / str(streams), name, events, streams)
        streams *= 100
    return rows | in_process(_append, folder / "most", name, events, events // EVENTS_A_STREAM)


def _append(folder: Path, name: str, events: int, streams: int) -> Rows:
    folder.mkdir()
    allow_connections()
    return asyncio.run(_write(folder, name, events, streams))


async def _write(folder: Path, name: str, events: int, streams: int) -> Rows:
    def stream_of(writer: int, number: int) -> str:
        # All writers go through the streams, so that a stream's events come one after another.
        return f"stream-{(number * WRITERS + writer) * streams // events}"

    async with PEERS[name].open(folder) as store:
        written = await write(store, WRITERS, events // WRITERS * WRITERS, stream_of=stream_of)
    return {f"{streams:,} streams": {**written.figures, "peak_mb": peak_mb()}}


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
