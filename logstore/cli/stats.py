"""`logstore stats`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from logstore.cli.output import (
    StorePath,
    age,
    ago,
    json_option,
    line_width,
    say_figures,
    say_json,
    say_table,
    short_time,
    shown,
    size,
)

if TYPE_CHECKING:
    from logstore.ops.statistics import Process, StoreStatistics
    from logstore.storage.figures import ProcessStats
    from logstore.storage.latency import Latency


@click.command(
    "stats",
    epilog="\b\nExamples:\n  logstore stats InternalStorage/events.db\n"
    "  logstore stats InternalStorage/events.db --json | jq .status",
)
@click.argument("db", type=StorePath)
@json_option
@click.pass_context
def command(ctx: click.Context, db: Path, *, as_json: bool) -> None:
    """Show what a store holds, how large it is, and how the processes do that have it open.

    Exits with 1 when it is not well: a process says so, or says nothing any more, or the catalogue cannot be read.
    Changes nothing. `lag` is the age of the oldest event that is in no segment yet. Half of the operations took no
    longer than p50, 99 of 100 no longer than p99.
    """
    from msgspec import to_builtins

    from logstore.ops.statistics import store_statistics

    found = store_statistics(db, per_stream=False)
    if as_json:
        figures = to_builtins(found)
        # `logstore streams` has them.
        del figures["streams"]
        say_json(figures)
    else:
        _say(found)
    ctx.exit(0 if found.status == "ok" else 1)


def _say(found: StoreStatistics) -> None:
    click.echo(f"{found.path}: {found.status}")
    for problem in found.problems:
        click.echo(f"  {problem}")
    click.echo()
    say_figures(list(_totals(found)))
    if found.processes:
        click.echo()
        say_table([_process_row(process) for process in found.processes], _PROCESS_HEADERS)
    timed = [process for process in found.processes if process.alive and process.stats is not None]
    if timed:
        click.echo()
        say_table([row for process in timed for row in _latency_rows(process)], _LATENCY_HEADERS)
    if found.maintenance:
        click.echo()
        say_table(
            [
                (each.task, ago(each.finished), str(each.pid), shown(_summary(each.summary), line_width() - 40))
                for each in found.maintenance
            ],
            ("maintenance", "done", "pid", ""),
        )


def _totals(found: StoreStatistics) -> Iterator[tuple[str, Any]]:
    if found.total_events is not None:
        yield "events", f"{found.total_events:,} in {found.total_streams:,} streams"
    if found.first_time is not None and found.last_time is not None:
        yield "stored", f"{short_time(found.first_time)} to {short_time(found.last_time)} UTC, {ago(found.last_time)}"
    sizes = found.sizes
    yield (
        "on disk",
        f"{size(sizes.database)}: segments {size(sizes.segments)}, catalogue {size(sizes.catalogue)}, "
        f"journals {size(sizes.journals)}",
    )
    if sizes.damaged:
        yield "kept aside", f"{size(sizes.damaged)} in damaged/, what was torn or damaged"
    segments = found.segments
    if segments is not None:
        live = f", {100 * segments.live_bytes / segments.bytes:.0f}% live" if segments.bytes else ""
        dropped = f", {segments.dropped:,} on their way out" if segments.dropped else ""
        yield "segments", f"{segments.files:,} files, {segments.packs:,} of them packs{live}{dropped}"
    if found.sessions is not None:
        yield "sessions", f"{found.sessions.open:,} open, {found.sessions.ended:,} ended"
    backups = found.backups
    newest = f", the newest {ago(backups.newest)}, {size(sizes.backups)} in all" if backups.newest else ""
    yield "backups", f"{backups.count:,}{newest}"
    if found.damage is not None:
        yield "damage", f"{len(found.damage):,} places" if found.damage else "none known"


_PROCESS_HEADERS = ("pid", "health", "figures", "open for", "appended", "lag", "memory", "cache hits")


def _process_row(process: Process) -> tuple[Any, ...]:
    stats = process.stats
    if stats is None or process.opened is None or process.age_s is None:
        return (str(process.pid or "?"), "", "none: a command at work", *[""] * 5)
    return (
        str(process.pid),
        process.status if process.alive else "died",
        f"{age(process.age_s)} ago",
        ago(process.opened).removesuffix(" ago"),
        f"{stats.appended:,}",
        age(stats.checkpoint_lag_s),
        size(stats.memory_bytes),
        _hits(stats),
    )


def _hits(stats: ProcessStats) -> str:
    reads = stats.cache_hits + stats.cache_misses
    return f"{100 * stats.cache_hits / reads:.0f}% of {reads:,}" if reads else "no reads"


_LATENCY_HEADERS = ("pid", "latency, ms", "count", "p50", "p99", "longest")


def _latency_rows(process: Process) -> Iterator[tuple[Any, ...]]:
    assert process.stats is not None
    for operation, latency in process.stats.latencies.items():
        yield (str(process.pid), operation, latency.count, *_milliseconds(latency))


def _milliseconds(latency: Latency) -> tuple[str, str, str]:
    if not latency.count:
        return "", "", ""
    p50, p99, longest = (f"{each / 1000:,.2f}" for each in (latency.p50_us, latency.p99_us, latency.max_us))
    return p50, p99, longest


def _summary(summary: Any) -> str:
    """Return what a task says of itself, without what is nothing."""
    if not isinstance(summary, dict):
        return "" if summary is None else str(summary)
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in summary.items() if value)
