"""What a store holds and how it does, seen from outside: totals, sizes, and the figures of each process that has it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from logstore.errors import DamageError
from logstore.ops.access import StoreView
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.backup.rotation import list_backups
from logstore.ops.statistics_index import (
    INDEXED,
    Damage,
    Maintenance,
    Segments,
    Sessions,
    StreamFigures,
    indexed_figures,
)
from logstore.ops.transfer.event_json import iso_time
from logstore.storage.figures import Figures, ProcessStats, read_figures
from logstore.storage.files import Disk, lock_holders
from logstore.storage.lane import Marks, is_held, lane_folders

Status = Literal["ok", "degraded", "failed"]

_SILENT_S: Final = 90.0
"""A process publishes its figures once a minute at least."""
_BYTES_PER_MB: Final = 1 << 20


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A process that has the store open, or had it and died.

    Attributes:
        lane: Its lane.
        pid: Its process id, None when neither it nor the system tells.
        alive: Whether it holds the lane.
        version: Of this package; None, like all that follows, of one that publishes nothing: a command at work, say.
        opened: ISO time at which it opened the store.
        published: ISO time of its figures.
        age_s: Age of its figures in seconds.
        status: What it says of its health, `unknown` when it says nothing.
        reason: Why it is not well.
        since: ISO time since when.
        stats: Its figures, see `ProcessStats`.
    """

    lane: int
    pid: int | None
    alive: bool
    version: str | None = None
    opened: str | None = None
    published: str | None = None
    age_s: float | None = None
    status: str = "unknown"
    reason: str | None = None
    since: str | None = None
    stats: ProcessStats | None = None


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on disk.

    Attributes:
        catalogue: The SQLite files.
        journals: Journal files, of all lanes.
        segments: Segment files.
        damaged: What recovery and repair kept aside.
        other: Registry, locks, marks.
        database: All of these.
        backups: The default folder for backups.
    """

    catalogue: int
    journals: int
    segments: int
    damaged: int
    other: int
    database: int
    backups: int


class Backups(msgspec.Struct, frozen=True, kw_only=True):
    """Backups in the default folder.

    Attributes:
        count: How many can be restored.
        newest: ISO time at which the newest of these was begun.
        oldest: Likewise the oldest.
        unusable: How many cannot be restored.
    """

    count: int
    newest: str | None
    oldest: str | None
    unusable: int


class StoreStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A store at one moment. What stands in the catalogue alone is None when that cannot be read.

    Attributes:
        path: The catalogue.
        at: ISO time of the look.
        status: `ok`; `degraded` when a process is, says nothing any more, or the catalogue cannot be read; `failed`
            when a process is.
        problems: What is not as it should be, one sentence each.
        total_events: Events, those included that are in journals only.
        total_streams: Streams that have events.
        first_event_id: The oldest event.
        first_time: When it was stored, ISO.
        last_event_id: The newest event.
        last_time: When it was stored, ISO.
        sizes: Bytes on disk.
        database_size_mb: All but the backups, in mebibytes.
        segments: Segment files.
        sessions: MCP sessions.
        processes: Who has the store open, or had it and died.
        backups: What there is to restore.
        damage: Damaged places that were found, newest first.
        maintenance: What was done last, by task.
        streams: Totals of every stream, None when they were not asked for.
    """

    path: str
    at: str
    status: Status
    problems: list[str]
    total_events: int | None
    total_streams: int | None
    first_event_id: str | None
    first_time: str | None
    last_event_id: str | None
    last_time: str | None
    sizes: Sizes
    database_size_mb: float
    segments: Segments | None
    sessions: Sessions | None
    processes: list[Process]
    backups: Backups
    damage: list[Damage] | None
    maintenance: list[Maintenance] | None
    streams: list[StreamFigures] | None = None


def store_statistics(path: Path, *, per_stream: bool = True, disk: Disk | None = None) -> StoreStatistics:
    """Look at a store, whoever has it open and whatever is damaged, and change nothing.

    Args:
        path: The catalogue.
        per_stream: Whether to give the totals of every stream, which takes longest.
        disk: The file door.

    Raises:
        NotAStoreError: There is no store at the path.
        StoreLockedError: A restore is under way.
        FormatVersionError: A newer release wrote it.
    """
    disk = disk or Disk()
    now_us = time.time_ns() // 1000
    with StoreView(path, disk) as view:
        processes = list(_processes(disk, view.root, now_us))
        problems = [problem for process in processes for problem in _problems_of(process)]
        status: Status = "degraded" if problems else "ok"
        if any(process.alive and process.status == "failed" for process in processes):
            status = "failed"
        indexed: dict[str, Any] = dict.fromkeys(INDEXED)
        try:
            indexed = indexed_figures(view, per_stream=per_stream)
        except DamageError as error:
            problems.append(str(error))
            status = "failed" if status == "failed" else "degraded"
        sizes = _sizes(path, view.root)
    if indexed["damage"]:
        problems.append(f"{len(indexed['damage'])} damaged places are known; run `logstore verify {path}`")
    backups = _backups(path)
    if backups.unusable:
        problems.append(f"{backups.unusable} backups in {default_backups(path)} cannot be restored")
    return StoreStatistics(
        path=str(path),
        at=iso_time(now_us),
        status=status,
        problems=problems,
        sizes=sizes,
        database_size_mb=round(sizes.database / _BYTES_PER_MB, 3),
        processes=processes,
        backups=backups,
        **indexed,
    )


# What processes tell.


def _processes(disk: Disk, root: Path, now_us: int) -> Iterator[Process]:
    for number, folder in lane_folders(disk, root):
        alive = is_held(disk, folder)
        figures = read_figures(disk, folder)
        if figures is not None and (not alive or figures.incarnation == _incarnation(disk, folder)):
            yield _process(number, alive, figures, now_us)
        elif alive:
            pids = lock_holders(folder / "lock")
            yield Process(lane=number, pid=pids[0] if pids else None, alive=True)


def _incarnation(disk: Disk, folder: Path) -> int:
    try:
        with contextlib.closing(Marks(disk, folder, look_only=True)) as marks:
            return marks.incarnation
    except FileNotFoundError:
        return 0


def _process(number: int, alive: bool, figures: Figures, now_us: int) -> Process:
    return Process(
        lane=number,
        pid=figures.pid,
        alive=alive,
        version=figures.version,
        opened=iso_time(figures.opened_us),
        published=iso_time(figures.published_us),
        age_s=round(max(0, now_us - figures.published_us) / 1_000_000, 3),
        status=figures.status,
        reason=figures.reason,
        since=None if figures.since_us is None else iso_time(figures.since_us),
        stats=figures.stats,
    )


def _problems_of(process: Process) -> Iterator[str]:
    if not process.alive:
        return
    if process.status in ("degraded", "failed"):
        volatile = process.stats.volatile_events if process.stats is not None else 0
        memory_only = f" ({volatile:,} events are in memory only)" if volatile else ""
        yield f"process {process.pid} is {process.status}: {process.reason}{memory_only}"
    if process.age_s is not None and process.age_s > _SILENT_S:
        yield (
            f"process {process.pid} has published no figures for {process.age_s:.0f} s: it hangs, is stopped, or "
            f"cannot write to its lane {process.lane}"
        )


# What lies on disk.


def _sizes(path: Path, root: Path) -> Sizes:
    catalogue = _size([path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm")])
    lanes = list(_files(root / "lanes"))
    journals = _size([file for file in lanes if file.suffix == ".journal"])
    segments, damaged, log = (_size(_files(folder)) for folder in (root / "segments", root / "damaged", root))
    return Sizes(
        catalogue=catalogue,
        journals=journals,
        segments=segments,
        damaged=damaged,
        other=max(0, log - journals - segments - damaged),
        database=catalogue + log,
        backups=_size(_files(default_backups(path))),
    )


def _files(folder: Path) -> Iterator[Path]:
    for inner, _, names in os.walk(folder):
        yield from (Path(inner, name) for name in names)


def _size(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        # Checkpointed, rotated or compacted since the look at its folder.
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def _backups(path: Path) -> Backups:
    found = list_backups(FolderTarget(default_backups(path)))
    whole = sorted(backup.begun for backup in found if backup.problem is None)
    return Backups(
        count=len(whole),
        newest=whole[-1] if whole else None,
        oldest=whole[0] if whole else None,
        unusable=len(found) - len(whole),
    )
