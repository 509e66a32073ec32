"""How fast events are stored: `python -m bench.append`, or with `--full` the runs of a million and more.

Needs the extra `bench`, which is part of what `python3 tools/check.py` installs.

Each run has a process of its own, so that its memory is its own. The contenders take turns, so that a busy minute
of the machine hits all of them; ratios are formed within a round, and what is shown is the median over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import platform
import re
import resource
import sqlite3
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Final, Literal

import msgspec
from tabulate import tabulate

from bench.stores import MESSAGE, STORES, Store

WRITERS: Final = 128


@dataclass(frozen=True)
class Run:
    """One contender at one task.

    Attributes:
        contender: `bare`, or a key of `STORES`.
        writers: Tasks that each store one event after another; for the bare loop, events a sync.
        events: Events in all.
        events_per_stream: After so many, a writer goes on with a new stream; 0 for one stream a writer.
    """

    contender: str
    writers: int
    events: int
    events_per_stream: int = 0


@dataclass(frozen=True)
class Result:
    """What one run gave.

    Attributes:
        events_s: Acknowledged events a second.
        p50_us: Median time from call to acknowledgement in microseconds; NaN where it was not noted.
        p99_us: The 99th percentile of that.
        close_s: Seconds that closing the store took, with what it still had to write.
        peak_mb: Most resident memory that the process ever had, interpreter and libraries included, in MB.
        files: Files that the run left.
    """

    events_s: float
    p50_us: float
    p99_us: float
    close_s: float
    peak_mb: float
    files: int


def perform(run: Run, folder: str) -> Result:
    """Perform one run in this process, in a folder of its own below `folder`."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=folder) as own:
        times = array("d")
        if run.contender == "bare":
            seconds, close_s = write_bare(run, Path(own) / "bare", times), 0.0
        else:
            seconds, close_s = asyncio.run(write_events(run, Path(own) / "events.db", times))
        files = sum(entry.is_file() for entry in Path(own).rglob("*"))
    percentiles = statistics.quantiles(times, n=100) if times else [math.nan] * 99
    return Result(
        events_s=run.events / seconds,
        p50_us=percentiles[49] * 1e6,
        p99_us=percentiles[98] * 1e6,
        close_s=close_s,
        peak_mb=peak_memory_bytes() / 1e6,
        files=files,
    )


def write_bare(run: Run, path: Path, times: array[float]) -> float:
    """Append the events' wire bytes to a file, one sync for `run.writers` of them; return the seconds it took."""
    data = MESSAGE.model_dump_json(by_alias=True, exclude_unset=True).encode() * run.writers
    sync = getattr(os, "fdatasync", os.fsync)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    started = last = time.perf_counter()
    for _ in range(run.events // run.writers):
        os.write(fd, data)
        sync(fd)
        now = time.perf_counter()
        times.append(now - last)
        last = now
    os.close(fd)
    return last - started


async def write_events(run: Run, path: Path, times: array[float]) -> tuple[float, float]:
    """Have all writers store their events; return the seconds until the last acknowledgement, and those of closing."""
    store = STORES[run.contender](path)
    await store.store_event("opens the store", MESSAGE)
    per_writer = run.events // run.writers
    started = time.perf_counter()
    if run.writers == 1:
        await write_timed(store, per_writer, times)
    else:
        await asyncio.gather(*(write(store, n, per_writer, run.events_per_stream) for n in range(run.writers)))
    acknowledged = time.perf_counter()
    await store.close()
    closed = time.perf_counter()
    expect_rows(path, per_writer * run.writers + 1)
    return acknowledged - started, closed - acknowledged


async def write(store: Store, writer: int, events: int, events_per_stream: int) -> None:
    """Store events one after another, as the SDK does in a session."""
    for number in range(events):
        stream = number // events_per_stream if events_per_stream else 0
        await store.store_event(f"{writer}-{stream}", MESSAGE)


async def write_timed(store: Store, events: int, times: array[float]) -> None:
    """Store events one after another and note the time of each."""
    last = time.perf_counter()
    for _ in range(events):
        await store.store_event("0-0", MESSAGE)
        now = time.perf_counter()
        times.append(now - last)
        last = now


def expect_rows(path: Path, rows: int) -> None:
    """Check that the store did its work: a closed one has every event in its table `events`, ours as the original's."""
    with closing(sqlite3.connect(path)) as database:
        (found,) = database.execute("SELECT count(*) FROM events").fetchone()
    if found != rows:
        raise RuntimeError(f"{path.name} has {found} events, {rows} were acknowledged")


def peak_memory_bytes() -> int:
    """Return the most memory that this process ever had resident."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    # Not ru_maxrss here: Linux hands it down from the parent.
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


Figure = Callable[[dict[str, Result]], float]
"""Computes a number from the results of one round, which are known by the names of the runs."""


@dataclass(frozen=True)
class Claim:
    """A figure that must stay below a bound, or reach it."""

    words: str
    figure: Figure
    relation: Literal["<=", ">="]
    bound: float


@dataclass(frozen=True)
class Case:
    """Runs that take turns, and what must hold between them."""

    runs: dict[str, Run]
    claims: list[Claim]


BARE_1: Final = "bare loop, 1 writer"
BARE_128: Final = "bare loop, 128 events a sync"
ORIGINAL_1: Final = "original, 1 writer"
ORIGINAL_128: Final = "original, 128 writers"
OURS_1: Final = "logstore, 1 writer"
OURS_128: Final = "logstore, 128 writers"
OURS_TINY: Final = "logstore, 128 writers, streams of 3"


def cases(full: bool) -> dict[str, Case]:
    """Return all cases by name; the full ones store more than a million events, and a million streams."""
    one_writer = 10_000 if full else 2_000
    many_writers = Run("logstore", WRITERS, WRITERS * (8192 if full else 1024))
    tiny_streams = WRITERS * (7813 if full else 391)
    return {
        "latency": Case(
            runs={
                BARE_1: Run("bare", 1, one_writer),
                ORIGINAL_1: Run("original", 1, one_writer // 2),
                OURS_1: Run("logstore", 1, one_writer),
            },
            claims=[
                Claim("1 writer: mean time of an event, to the bare loop's", rate(BARE_1, OURS_1), "<=", 1.6),
                Claim("1 writer: median time of an event, to the bare loop's", median_time(OURS_1, BARE_1), "<=", 1.6),
            ],
        ),
        "bulk": Case(
            runs={
                BARE_128: Run("bare", WRITERS, many_writers.events // 2),
                ORIGINAL_128: Run("original", WRITERS, many_writers.events // 16),
                OURS_128: many_writers,
            },
            claims=[
                Claim("128 writers: rate, to the original's", rate(OURS_128, ORIGINAL_128), ">=", 5),
                Claim("128 writers: peak memory, MB", lambda by: by[OURS_128].peak_mb, "<=", 250),
            ],
        ),
        "tiny": Case(
            runs={OURS_128: many_writers, OURS_TINY: Run("logstore", WRITERS, 3 * tiny_streams, events_per_stream=3)},
            claims=[
                Claim("streams of 3: rate, to long streams", rate(OURS_TINY, OURS_128), ">=", 0.6),
                Claim("streams of 3: peak memory, MB", lambda by: by[OURS_TINY].peak_mb, "<=", 250),
                Claim("streams of 3: files", lambda by: by[OURS_TINY].files, "<=", 6000),
            ],
        ),
    }


def rate(run: str, other: str) -> Figure:
    """Return the figure that tells how many times as fast as another a run is."""
    return lambda by: by[run].events_s / by[other].events_s


def median_time(run: str, other: str) -> Figure:
    """Return the figure that tells how many times as long as in another run an event takes."""
    return lambda by: by[run].p50_us / by[other].p50_us


def take_turns(runs: dict[str, Run], rounds: int, folder: str) -> list[dict[str, Result]]:
    """Perform all runs in turn, as often as there are rounds, every other round backwards."""
    results: list[dict[str, Result]] = []
    for number in range(rounds):
        names = list(runs) if number % 2 == 0 else list(reversed(runs))
        results.append({})
        for name in names:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                results[-1][name] = process.submit(perform, runs[name], folder).result()
    return results


def typical(results: list[Result]) -> Result:
    """Return the median of each figure."""
    return Result(*map(statistics.median, zip(*map(astuple, results), strict=True)))


def runs_table(runs: dict[str, Run], rounds: list[dict[str, Result]]) -> str:
    """Return what each run gave."""
    rows = [[name, run.events, *astuple(typical([by[name] for by in rounds]))] for name, run in runs.items()]
    return tabulate(
        rows,
        headers=["", "events", *(field.name for field in fields(Result))],
        floatfmt=("", "", ",.0f", ",.0f", ",.0f", ".2f", ",.0f", ".0f"),
        intfmt=",",
    )


def claims_table(claims: list[Claim], rounds: list[dict[str, Result]]) -> str:
    """Return what must hold, and whether it does."""
    rows: list[list[str]] = []
    for claim in claims:
        figure = statistics.median(claim.figure(by) for by in rounds)
        holds = figure <= claim.bound if claim.relation == "<=" else figure >= claim.bound
        rows.append([claim.words, f"{claim.relation} {claim.bound:g}", f"{figure:.4g}", "yes" if holds else "NO"])
    return tabulate(rows, headers=["", "must be", "is", "holds"], disable_numparse=True)


def main() -> None:
    """Run the chosen cases and print what they gave."""
    parser = argparse.ArgumentParser(prog="python -m bench.append", description="How fast events are stored.")
    parser.add_argument("--full", action="store_true", help="store a million events and more; takes minutes")
    parser.add_argument("--case", action="append", choices=list(cases(False)), help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs (%(default)s)")
    parser.add_argument("--dir", default=".", help="where the stores are written and removed again: on a real disk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure of every round to FILE")
    arguments = parser.parse_args()

    chosen = [case for name, case in cases(arguments.full).items() if name in (arguments.case or cases(False))]
    runs = {name: run for case in chosen for name, run in case.runs.items()}
    claims = [claim for case in chosen for claim in case.claims]
    rounds = take_turns(runs, arguments.rounds, arguments.dir)
    print(f"Events of 600 bytes, synced before they are acknowledged. Medians of {arguments.rounds} rounds.\n")
    if not arguments.full:
        print("This is a quick run, hardly more than a burst. What must hold is meant for --full.\n")
    print(runs_table(runs, rounds), claims_table(claims, rounds), sep="\n\n")
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.encode({"machine": machine(), "runs": runs, "rounds": rounds}))


def machine() -> dict[str, str | int | None]:
    """Return what the figures were measured with."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{name: version(name) for name in ("mcp-logstore", "mcp", "aiosqlite", "msgspec")},
    }


if __name__ == "__main__":
    main()
