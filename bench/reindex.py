"""How fast a lost catalogue is made again: `python -m bench.reindex --events 2000000`.

The store is written through the engine: 200 streams with nine tenths of the events, the rest in streams of three. What
is shown is the `logstore reindex` of it without its catalogue, against a bare loop that puts the same rows into the
same table with `executemany`, unsynced: what SQLite itself takes. Both take turns, since machines are never quiet.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from tabulate import tabulate

from logstore.ops.reindex import reindex_at
from logstore.storage import Log, LogOptions

STREAMS: Final = 200
EVENTS_OF_A_SMALL_STREAM: Final = 3
BATCH: Final = 1_000
_T = TypeVar("_T")
_KIB: Final = 1024 if sys.platform == "linux" else 1


class Result(NamedTuple):
    """What a run gave.

    Attributes:
        events_s: Events a second.
        peak_mb: Most resident memory of the process, and of the one that scans for it.
    """

    events_s: float
    peak_mb: tuple[float, float]


def write_store(path: str, events: int) -> None:
    """Write events of 100 to 700 bytes."""
    asyncio.run(_write_store(Path(path), events))


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


def reindex(path: str) -> Result:
    """Make the catalogue of a store again that has none."""
    for suffix in ("", "-wal", "-shm"):
        Path(path + suffix).unlink(missing_ok=True)
    done = reindex_at(Path(path))
    return Result(done.events_s, _peaks())


def bare(path: str) -> Result:
    """Put the rows of a catalogue into a table of another database."""
    copy = Path(f"{path}.bare")
    with closing(sqlite3.connect(path)) as source:
        (sql,) = source.execute("SELECT sql FROM sqlite_master WHERE name = 'events'").fetchone()
        # In the order in which they lie in segments, as a reindex meets them.
        rows = source.execute("SELECT * FROM events ORDER BY segment_id, offset LIMIT 1000000").fetchall()
    with closing(sqlite3.connect(copy)) as target:
        target.execute("PRAGMA journal_mode = MEMORY")
        target.execute("PRAGMA synchronous = OFF")
        target.execute(sql)
        started = time.perf_counter()
        with target:
            target.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)
        taken = time.perf_counter() - started
    copy.unlink()
    return Result(len(rows) / taken, _peaks())


def _peaks() -> tuple[float, float]:
    """Return the most memory of this process and of its children, in MB."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, children = (resource.getrusage(each).ru_maxrss * _KIB / 1e6 for each in who)
    return own, children


def in_process(task: Callable[..., _T], *arguments: Any) -> _T:
    """Run a task in a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(task, *arguments).result()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=2_000_000, help="events in the store")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each takes")
    parser.add_argument(
        "--folder", type=Path, help="where to write; the system's folder for temporary files if not given"
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="logstore-bench-", dir=arguments.folder))
    try:
        path = folder / "events.db"
        in_process(write_store, str(path), arguments.events)
        runs = [(in_process(reindex, str(path)), in_process(bare, str(path))) for _ in range(arguments.rounds)]
    finally:
        shutil.rmtree(folder)
    table = [
        (
            f"{ours.events_s:,.0f}",
            f"{theirs.events_s:,.0f}",
            f"{ours.events_s / theirs.events_s:.2f}",
            *(f"{peak:.0f}" for peak in ours.peak_mb),
        )
        for ours, theirs in runs
    ]
    headers = ("reindex, events/s", "bare loop, rows/s", "ratio", "peak MB", "scanner's peak MB")
    print(tabulate(table, headers=headers, disable_numparse=True, stralign="right"))
    print(
        f"\nmedian {statistics.median(ours.events_s for ours, _ in runs):,.0f} events/s of {arguments.events:,} events"
    )


if __name__ == "__main__":
    main()
