"""How the size of an event tells: `python -m bench.payloads`.

Events of 100 bytes to 1 MB, from 16 tasks, in stores that have them on disk when they acknowledge.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from bench.benchmark import Benchmark
from bench.command import run
from bench.messages import message_of
from bench.peers import PEERS
from bench.turns import Figures, Rows, Task, subfolder
from bench.writers import write_for

WRITERS: Final = 16
SIZES: Final = (100, 1_000, 10_000, 100_000, 1_000_000)
STORES: Final = ("logstore always", "original FULL", "mcp-persist SQLite", "Redis Streams always")
_QUICK_S: Final = 0.25
_FULL_S: Final = 1.0


def append(folder: Path, name: str, seconds: float, sizes: tuple[int, ...] = SIZES) -> Rows:
    """Measure a store, a new one for each size."""
    return {f"{size:,} bytes": asyncio.run(_append(subfolder(folder, size), name, size, seconds)) for size in sizes}


async def _append(folder: Path, name: str, size: int, seconds: float) -> Figures:
    async with PEERS[name].open(folder) as store:
        written = await write_for(store, WRITERS, seconds, message=message_of(size))
    return {"mb_s": written.events * size / written.seconds / 1e6, **written.figures}


def tasks(full: bool) -> dict[str, Task]:
    """Return a task for each store."""
    return {name: Task(append, (name, _FULL_S if full else _QUICK_S), (name,)) for name in STORES}


BENCHMARK: Final = Benchmark(
    name="payloads", title=f"events of 100 bytes to 1 MB from {WRITERS} tasks, on disk when acknowledged", tasks=tasks
)

if __name__ == "__main__":
    run([BENCHMARK], "python -m bench.payloads")
