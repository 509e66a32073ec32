"""Making the catalogue of a store again from its segments, while others use the store."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Generator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final, NamedTuple

from logstore.errors import LogstoreError, WriteFailedError
from logstore.ops.access import find_store
from logstore.ops.progress import Progress, silent
from logstore.storage.files import Disk
from logstore.storage.opening import OpenStore
from logstore.storage.options import LogOptions
from logstore.storage.segment import segment_numbers, segment_path

_WORTH_A_PROCESS_BYTES: Final = 128 << 20


class Reindexed(NamedTuple):
    """What the catalogue holds now, and how long it took to make it."""

    events: int
    streams: int
    segments: int
    seconds: float

    @property
    def events_s(self) -> int:
        """Events indexed a second."""
        return round(self.events / self.seconds)


def reindex_at(path: Path, progress: Progress = silent, disk: Disk | None = None) -> Reindexed:
    """Make the catalogue again from the segments; missing, damaged or out of date, it does not matter.

    Stores that are open in other processes go on, and take up the new one. On return it is on disk. What retention has
    dropped stays dropped, unless the catalogue that knew of it cannot be read.

    Args:
        path: The catalogue.
        progress: Told how many bytes of segments are indexed.
        disk: The file door.

    Raises:
        NotAStoreError: There is no store at the path.
        WriteFailedError: The disk refused; the message says what is there.
        LogstoreError: The store cannot be opened, or a process that read segments was killed.
    """
    started = time.monotonic()
    root = find_store(path)
    disk = disk or Disk()
    try:
        with _scanners(_segment_bytes(disk, root)) as scanners:
            store = OpenStore(disk, path, LogOptions().segment_bytes, scanners)
            try:
                # When there was none, or a damaged one, the store has made it just now.
                if store.made is None:
                    store.reindex(lambda done, total: progress("bytes of segments indexed", done, total))
                streams, events, _ = store.catalogue.totals()
                segments = len(store.catalogue.segment_sizes())
            finally:
                store.close(empty=True)
    except BrokenExecutor as error:
        raise LogstoreError(f"{path} is as it was: a process that read segments was killed; try again") from error
    except (OSError, sqlite3.Error) as error:
        standing = "it is as it was" if path.exists() else "there is none now, the next opening makes it"
        raise WriteFailedError(f"the catalogue {path} cannot be made again, {standing}: {error}") from error
    return Reindexed(events, streams, segments, time.monotonic() - started)


def _segment_bytes(disk: Disk, root: Path) -> int:
    total = 0
    for number in segment_numbers(disk, root):
        with contextlib.suppress(FileNotFoundError):
            # Compaction may be done with it meanwhile.
            total += segment_path(root, number).stat().st_size
    return total


@contextlib.contextmanager
def _scanners(size: int) -> Generator[Executor | None]:
    """Give a process that reads the segments of a large store: threads would take turns at the interpreter."""
    if size < _WORTH_A_PROCESS_BYTES:
        yield None
        return
    # Not forked: other threads of this process may hold locks.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as scanners:
        yield scanners
