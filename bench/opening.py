"""How long a store takes to open after a crash: `python -m bench.opening`.

A process fills the journal, so that nothing of it is in segments, and is killed. Then the store is opened with its
usual settings: what takes time is reading the journal and moving it into segments.
"""

from __future__ import annotations

import asyncio
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from bench.benchmark import Benchmark
from bench.claims import Claim
from bench.command import run
from bench.messages import MESSAGE, wire_bytes
from bench.peers.ours import logstore
from bench.turns import Place, Rows, Task, beside
from logstore.storage import Log, LogOptions
from logstore.storage.options import MIB

STREAMS: Final = 128
_JOURNAL_BYTES: Final = LogOptions().journal_bytes
_BATCH: Final = 1_024
_FULL: Final = "64 MiB of journal"


def reopen(folder: Path, journal_bytes: int = _JOURNAL_BYTES) -> Rows:
    """Fill the journal of a store in a process, kill it, and measure the opening.

    Raises:
        RuntimeError: The store does not have everything that was acknowledged.
    """
    with beside(_fill, folder, journal_bytes) as (process, told):
        events: int = told.recv()
        process.kill()
    return asyncio.run(_open(folder, events))


def _fill(told: Connection, folder: Path, journal_bytes: int) -> None:
    asyncio.run(_append(told, folder, journal_bytes))


async def _append(told: Connection, folder: Path, journal_bytes: int) -> None:
    options = LogOptions(
        # Nothing goes to segments.
        journal_file_bytes=2 * journal_bytes,
        journal_bytes=4 * journal_bytes,
        memory_bytes=8 * journal_bytes,
        checkpoint_interval_s=3_600.0,
    )
    payload = wire_bytes(MESSAGE)
    events = 0
    async with Log(folder / "events.db", options) as log:
        journals = log.folder / "lanes" / "0000"
        while sum(each.stat().st_size for each in journals.glob("*.journal")) < journal_bytes:
            await log.append_many([(f"stream-{number % STREAMS}", payload, 0) for number in range(_BATCH)])
            events += _BATCH
        told.send(events)
        await asyncio.sleep(3_600.0)


async def _open(folder: Path, events: int) -> Rows:
    began = time.perf_counter()
    async with logstore(folder / "events.db", durability="always") as store:
        opened = time.perf_counter()
        await store.store_event("stream-0", MESSAGE)
        stored = time.perf_counter()
        log = store.opened
        assert isinstance(log, Log)
        found = sum(summary.events for summary in log.stream_summaries())
    if found != events + 1:
        raise RuntimeError(f"{events} events were acknowledged, the store has {found - 1}")
    return {"": {"open_s": opened - began, "first_event_ms": (stored - opened) * 1e3, "events": events}}


def tasks(full: bool) -> dict[str, Task]:
    """Return the task, with a smaller journal in a quick run."""
    return {_FULL: Task(reopen)} if full else {"8 MiB of journal": Task(reopen, (8 * MIB,))}


BENCHMARK: Final = Benchmark(
    name="opening",
    title="opening a store whose process was killed with a full journal",
    tasks=tasks,
    claims=(Claim("opening after SIGKILL, full journal: seconds", Place(_FULL, "", "open_s"), relation="<=", must=1),),
)

if __name__ == "__main__":
    run([BENCHMARK], "python -m bench.opening")
