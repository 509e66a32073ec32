"""How fast a lost catalogue is made again: `python -m bench.reindex`.

The store is written through the engine: 200 streams with nine tenths of the events, the rest in streams of three. What
is shown is the `logstore reindex` of it without its catalogue, beside a bare loop that puts the same rows into the same
table, unsynced: what SQLite itself takes.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Final

from bench.benchmark import Benchmark
from bench.claims import Claim
from bench.command import run
from bench.memory import children_peak_mb, peak_mb
from bench.turns import Figures, Place, Rows, Task, in_process
from logstore.ops.reindex import reindex_at
from logstore.storage import Log, LogOptions

STREAMS: Final = 200
EVENTS_OF_A_SMALL_STREAM: Final = 3
BATCH: Final = 1_000
_TASK: Final = "logstore reindex"


def measure(folder: Path, events: int) -> Rows:
    """Write a store, and make its catalogue again; each in a process of its own, for its memory."""
    path = folder / "events.db"
    in_process(write_store, path, events)
    rows = in_process(bare, path)
    return {"": in_process(reindex, path), "executemany of the rows": rows}


def write_store(path: Path, events: int) -> None:
    """Write events of 100 to 700 bytes."""
    asyncio.run(_write_store(path, events))


async def _write_store(path: Path, events: int) -> None:
    rng = random.Random(1)
    payloads = [rng.randbytes(rng.randrange(100, 701)) for _ in range(1_000)]
    small = 0
    async with Log(path, LogOptions(durability="os")) as log:
        for _ in range(0, events, BATCH):
            batch: list[tuple[str, bytes, int]] = []
            for _ in range(BATCH):
                if rng.random() < 0.1:
                    stream = f"small-{small // EVENTS_OF_A_SMALL_STREAM}"
                    small += 1
                else:
                    stream = f"stream-{rng.randrange(STREAMS)}"
                batch.append((stream, rng.choice(payloads), 0))
            await log.append_many(batch)


def reindex(path: Path) -> Figures:
    """Make the catalogue of a store again that has none."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    done = reindex_at(path)
    return {"events_s": done.events_s, "peak_mb": peak_mb(), "scanner_mb": children_peak_mb()}


def bare(path: Path) -> Figures:
    """Put the rows of a catalogue into a table of another database."""
    copy = path.with_name("bare.db")
    with closing(sqlite3.connect(path)) as source:
        (sql,) = source.execute("SELECT sql FROM sqlite_master WHERE name = 'events'").fetchone()
        # In the order in which they lie in segments, as a reindex meets them.
        rows = source.execute("SELECT * FROM events ORDER BY segment_id, offset LIMIT 1000000").fetchall()
    with closing(sqlite3.connect(copy)) as target:
        target.execute("PRAGMA journal_mode = MEMORY")
        target.execute("PRAGMA synchronous = OFF")
        target.execute(sql)
        began = time.perf_counter()
        with target:
            target.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)
        seconds = time.perf_counter() - began
    return {"events_s": len(rows) / seconds}


def tasks(full: bool) -> dict[str, Task]:
    """Return the task, with fewer events in a quick run."""
    return {_TASK: Task(measure, (2_000_000 if full else 100_000,))}


BENCHMARK: Final = Benchmark(
    name="reindex",
    title="making the catalogue of a store again, beside a bare loop that inserts the same rows",
    tasks=tasks,
    claims=(Claim("reindex: events a second", Place(_TASK, "", "events_s"), relation=">=", must=400_000),),
)

if __name__ == "__main__":
    run([BENCHMARK], "python -m bench.reindex")
