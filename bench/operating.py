"""How long operating a large store takes, and how much memory: `python -m bench.operating --events 10000000`.

Makes a store in which streams with files of their own and tiny streams in packs alternate, its events up to twenty days
old; then retention of the older half, verify, export, the index made again, two backups. Each in a process of its own,
so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from logstore.ops.access import open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget
from logstore.ops.compaction.compact import compact
from logstore.ops.transfer.export import export_events
from logstore.ops.verify.store import verify
from logstore.storage.files import Disk
from logstore.storage.header import frame_seed
from logstore.storage.ids import IdGenerator
from logstore.storage.opening import OpenStore
from logstore.storage.options import MIB, Retention
from logstore.storage.record import Event, encode_frame
from logstore.storage.tail import Run

_DAY_US: Final = 86_400_000_000
_DAYS: Final = 20
_LARGE: Final = 8
_LARGE_EVENTS: Final = 1_500
_TINY_EVENTS: Final = 3
_CHECKPOINT_EVENTS: Final = 20_000


def make(path: Path, events: int, payload_bytes: int) -> None:
    """Make a store of so many events."""
    store = OpenStore(Disk(), path, 8 * MIB)
    seed = frame_seed(store.store_id)
    ids = IdGenerator(1)
    payload = bytes(payload_bytes)
    start_us = time.time_ns() // 1000 - _DAYS * _DAY_US
    last: dict[str, int] = {}
    done = tiny = 0

    def run(stream: str, count: int) -> Run:
        nonlocal done
        made, frames = [], []
        for _ in range(count):
            time_us = start_us + done * _DAYS * _DAY_US // events
            event_id = ids.next(time_us)
            frames.append(encode_frame(Event(event_id, last.get(stream, 0), time_us, stream, 0, payload), seed))
            made.append(event_id)
            last[stream] = event_id
            done += 1
        return Run(stream, made, frames)

    while done < events:
        runs = [run(f"large-{each}", _LARGE_EVENTS) for each in range(_LARGE)]
        for _ in range((_CHECKPOINT_EVENTS - _LARGE * _LARGE_EVENTS) // _TINY_EVENTS):
            tiny += 1
            runs.append(run(f"tiny-{tiny}", _TINY_EVENTS))
            del last[f"tiny-{tiny}"]
        with store.checkpoint_lock():
            store.segments.write(runs, [], time.time_ns() // 1000)
        sys.stderr.write(f"\r{done:,} events")
    sys.stderr.write("\r\033[K")
    store.close(empty=True)


def retention(path: Path) -> str:
    """Drop the older half."""
    store = open_existing(path)
    done = compact(store, Retention(max_age_s=_DAYS / 2 * 86_400))
    store.close(empty=True)
    dropped = sum(each.events for each in done.dropped)
    return f"{dropped:,} events dropped, {done.removed_segments:,} files removed, {done.moved_events:,} events moved"


def verified(path: Path) -> str:
    """Read every byte."""
    return f"ok: {verify(path).ok}"


def exported(path: Path) -> str:
    """Write everything as JSON."""
    count = export_events(path, path.with_name("export.json"))
    return f"{count:,} events"


def reindexed(path: Path) -> str:
    """Make a lost index again."""
    path.unlink()
    store = OpenStore(Disk(), path, 8 * MIB)
    events = store.catalogue.totals()[1]
    store.close(empty=True)
    return f"{events:,} events"


def backed_up(path: Path) -> str:
    """Copy what no backup has yet."""
    store = open_existing(path)
    done = create_backup(store, FolderTarget(path.with_name("backups")))
    store.close(empty=True)
    return f"{done.bytes_copied:,} bytes copied, {done.bytes_reused:,} reused"


def _timed(job: Callable[[Path], str], path: Path, answer: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    words = job(path)
    took_s = time.monotonic() - started
    answer.put((took_s, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, words))


def measure(name: str, job: Callable[[Path], str], path: Path) -> None:
    """Run a job in a fresh process and print its time and peak memory."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_timed, args=(job, path, answer))
    process.start()
    took_s, before, peak, words = answer.get()
    process.join()
    sys.stdout.write(f"{name:<18}{took_s:8.1f} s  {peak >> 10:5} MB ({before >> 10} before)  {words}\n")
    sys.stdout.flush()


def main() -> None:
    """Make a store and measure."""
    parser = argparse.ArgumentParser(description="Time and memory of operating a large store.")
    parser.add_argument("--events", type=int, default=500_000, help="how many (default: %(default)s)")
    parser.add_argument("--payload-bytes", type=int, default=200, help="bytes an event (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to put the store (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="logstore-bench-"))
    path = folder / "events.db"
    started = time.monotonic()
    make(path, arguments.events, arguments.payload_bytes)
    sys.stdout.write(f"{arguments.events:,} events made in {time.monotonic() - started:.0f} s\n")
    jobs: list[tuple[str, Callable[[Path], str]]] = [
        ("backup", backed_up),
        ("backup again", backed_up),
        ("verify", verified),
        ("export", exported),
        ("reindex", reindexed),
        ("retention of half", retention),
        ("verify again", verified),
    ]
    for name, job in jobs:
        measure(name, job, path)
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
