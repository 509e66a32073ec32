"""What is left of the appends while the store is compacted or backed up: `python -m bench.beside`.

Tasks append all the time, each event on disk before it is acknowledged. After a while the work begins, in the thread in
which a running store does it; the rate during it stands beside the rate before and after.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from bench.benchmark import Benchmark
from bench.claims import Claim
from bench.command import run
from bench.made import OLDER_HALF, make
from bench.messages import MESSAGE
from bench.peers.ours import logstore
from bench.turns import Place, Rows, Task, in_process
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget
from logstore.ops.compaction.compact import compact
from logstore.storage import Log
from logstore.storage.opening import OpenStore

WRITERS: Final = 128


def compacted(store: OpenStore) -> None:
    """Drop the older half of the events, and compact what is left."""
    compact(store, OLDER_HALF)


def backed_up(store: OpenStore) -> None:
    """Make a first backup, which copies everything."""
    create_backup(store, FolderTarget(store.root.with_name("backups")))


def appends(folder: Path, job: Callable[[OpenStore], Any], events: int, idle_s: float) -> Rows:
    """Measure appends beside a job on a store of so many events, and `idle_s` before and after it."""
    in_process(make, folder / "events.db", events)
    return asyncio.run(_appends(folder, job, idle_s))


async def _appends(folder: Path, job: Callable[[OpenStore], Any], idle_s: float) -> Rows:
    done = 0
    stopped = False

    async def one(stream: str) -> None:
        nonlocal done
        while not stopped:
            await store.store_event(stream, MESSAGE)
            done += 1

    async with logstore(folder / "events.db", durability="always") as store, asyncio.TaskGroup() as tasks:
        log = store.opened
        assert isinstance(log, Log)
        for writer in range(WRITERS):
            tasks.create_task(one(f"writer-{writer}"))
        await asyncio.sleep(idle_s / 2)
        marks = [(time.perf_counter(), done)]
        for step in (asyncio.sleep(idle_s), log.maintain(job), asyncio.sleep(idle_s)):
            await step
            marks.append((time.perf_counter(), done))
        stopped = True
    (before, during, after) = (
        (events - events_0) / (time_s - time_0) for (time_0, events_0), (time_s, events) in pairwise(marks)
    )
    return {
        "": {
            "events_s": during,
            "events_s_without": (before + after) / 2,
            "share": during / ((before + after) / 2),
            "seconds": marks[2][0] - marks[1][0],
        }
    }


_COMPACTION: Final = "beside compaction"
_BACKUP: Final = "beside a backup"


def tasks(full: bool) -> dict[str, Task]:
    """Return a task for each kind of work, on a smaller store in a quick run."""
    events, idle_s = (2_000_000, 3.0) if full else (200_000, 0.5)
    return {
        _COMPACTION: Task(appends, (compacted, events, idle_s)),
        _BACKUP: Task(appends, (backed_up, events, idle_s)),
    }


BENCHMARK: Final = Benchmark(
    name="beside",
    title=f"appends from {WRITERS} tasks while the store is worked on, and without",
    tasks=tasks,
    claims=tuple(
        Claim(f"appends {task}: rate, to that without", Place(task, "", "share"), relation=">=", must=0.7)
        for task in (_COMPACTION, _BACKUP)
    ),
)

if __name__ == "__main__":
    run([BENCHMARK], "python -m bench.beside")
