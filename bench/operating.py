"""How long operating a large store takes, and how much memory: `python -m bench.operating`.

Backup, verify, export, the index made again, retention of the older half; each in a process of its own, so that its
peak memory is its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.benchmark import Benchmark
from bench.command import run
from bench.made import OLDER_HALF, make
from bench.memory import peak_mb
from bench.turns import Figures, Rows, Task, in_process
from logstore.ops.access import open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget
from logstore.ops.compaction.compact import compact
from logstore.ops.transfer.export import export_events
from logstore.ops.verify.store import verify
from logstore.storage.files import Disk
from logstore.storage.opening import OpenStore
from logstore.storage.options import MIB


def back_up(path: Path) -> int:
    """Copy what no backup has yet."""
    store = open_existing(path)
    done = create_backup(store, FolderTarget(path.with_name("backups")))
    store.close(empty=True)
    return done.events


def verify_all(path: Path) -> int:
    """Read every byte.

    Raises:
        RuntimeError: The store is damaged.
    """
    report = verify(path)
    if not report.ok:
        raise RuntimeError(f"{path} is damaged")
    return report.events


def export(path: Path) -> int:
    """Write everything as JSON."""
    return export_events(path, path.with_name("export.json"))


def reindex(path: Path) -> int:
    """Make a lost index again."""
    path.unlink()
    store = OpenStore(Disk(), path, 8 * MIB)
    events = store.catalogue.totals()[1]
    store.close(empty=True)
    return events


def retain(path: Path) -> int:
    """Drop the older half."""
    store = open_existing(path)
    done = compact(store, OLDER_HALF)
    store.close(empty=True)
    return sum(each.events for each in done.dropped)


JOBS: Final[dict[str, Callable[[Path], int]]] = {
    "backup": back_up,
    "backup again": back_up,
    "verify": verify_all,
    "export": export,
    "reindex": reindex,
    "retention of half": retain,
}
"""What is done to a store, in this order; each returns how many events it met."""


def operate(folder: Path, events: int) -> Rows:
    """Make a store, and do everything to it."""
    path = folder / "events.db"
    in_process(make, path, events)
    return {name: in_process(_timed, job, path) for name, job in JOBS.items()}


def _timed(job: Callable[[Path], int], path: Path) -> Figures:
    before = peak_mb()
    began = time.perf_counter()
    events = job(path)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "events": events,
        "events_s": events / seconds,
        "peak_mb": peak_mb(),
        "mb_before": before,
    }


def tasks(full: bool) -> dict[str, Task]:
    """Return the task, with fewer events in a quick run."""
    return {"logstore": Task(operate, (2_000_000 if full else 100_000,))}


BENCHMARK: Final = Benchmark(
    name="operating",
    title="operating a store of small events, half of them in streams of three",
    tasks=tasks,
    full_rounds=1,
)

if __name__ == "__main__":
    run([BENCHMARK], "python -m bench.operating")
