"""What is left of a burst when it does not end: `python -m bench.sustained`.

Ten million events with everything on: index, segments, retention and compaction by the schedule, each event on disk
before it is acknowledged, 64 MB for tail and cache. Then some of them are looked up by id. Beside it short bursts,
and a million streams of three events.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from pathlib import Path
from typing import Final

from bench.benchmark import Benchmark
from bench.claims import Claim
from bench.command import run
from bench.memory import peak_mb, watched
from bench.messages import MESSAGE
from bench.peers.ours import logstore
from bench.percentiles import percentiles
from bench.pictures import draw_course
from bench.turns import Place, Round, Rows, Task
from bench.writers import write
from logstore.mcp.base import EventLog, LogEventStore

WRITERS: Final = 128
_MEMORY_BYTES: Final = 64_000_000
_MOST_MB: Final = 250
_BURST_EVENTS: Final = WRITERS * 128
"""Less than a journal file, so that nothing of it goes to segments meanwhile."""
_BURSTS: Final = 8
_LOOKUPS: Final = 5_000


def bursts(folder: Path, count: int = _BURSTS, events: int = _BURST_EVENTS) -> Rows:
    """Measure bursts, each into a new store."""
    return asyncio.run(_bursts(folder, count, events))


async def _bursts(folder: Path, count: int, events: int) -> Rows:
    seconds: list[float] = []
    for number in range(count):
        path = folder / f"{number}.db"
        async with logstore(path, durability="always", memory_cache_bytes=_MEMORY_BYTES) as store:
            seconds.append((await write(store, WRITERS, events)).seconds)
    return {"": {"events_s": count * events / sum(seconds)}}


def sustained(folder: Path, events: int, events_a_stream: int = 0, lookups: int = _LOOKUPS) -> Rows:
    """Measure many events.

    Args:
        folder: Where to write.
        events: How many.
        events_a_stream: After so many a writer goes on with a new stream; 0 for one stream a writer.
        lookups: Events to look up by id afterwards.
    """
    rows = asyncio.run(_sustained(folder, events, events_a_stream, lookups))
    rows[""]["files"] = sum(entry.is_file() for entry in folder.rglob("*"))
    return rows


async def _sustained(folder: Path, events: int, events_a_stream: int, lookups: int) -> Rows:
    ids = array("q")
    every = max(1, events // lookups)
    done = 0

    async def one(store: LogEventStore, writer: int) -> None:
        nonlocal done
        for number in range(events // WRITERS):
            stream = number // events_a_stream if events_a_stream else 0
            event_id = await store.store_event(f"{writer}-{stream}", MESSAGE)
            done += 1
            if done % every == 0:
                ids.append(int(event_id))

    path = folder / "events.db"
    async with logstore(path, durability="always", memory_cache_bytes=_MEMORY_BYTES) as store:
        began = time.perf_counter()
        with watched(lambda: done) as course:
            async with asyncio.TaskGroup() as tasks:
                for writer in range(WRITERS):
                    tasks.create_task(one(store, writer))
        seconds = time.perf_counter() - began
        peak = peak_mb()
    closed = time.perf_counter() - began
    # Opened again it has everything on disk and nothing in memory.
    async with logstore(path, durability="always") as store:
        times_s = await _look_up(await store.log(), ids)
    return {
        "": {
            "events_s": done / seconds,
            "peak_mb": peak,
            "growth": course.growth,
            "close_s": closed - seconds,
            "seconds": course.seconds,
            "memory_mb": course.memory_mb,
            "events": course.events,
        },
        "lookup by id": percentiles(times_s),
    }


async def _look_up(log: EventLog, ids: array[int]) -> list[float]:
    """Ask for the streams of events, in no order, and return how long each answer took."""
    order = list(ids)
    random.Random(1).shuffle(order)
    times_s: list[float] = []
    for event_id in order:
        began = time.perf_counter()
        stream = await log.stream_of(str(event_id))
        times_s.append(time.perf_counter() - began)
        assert stream is not None
    return times_s


BURST: Final = "bursts"
LONG: Final = "sustained"
TINY: Final = "sustained, streams of 3 events"


def tasks(full: bool) -> dict[str, Task]:
    """Return ten million events and a million streams, or fewer of both."""
    long, tiny = (78_125, 3 * 7_813) if full else (1_563, 3 * 261)
    return {
        BURST: Task(bursts),
        LONG: Task(sustained, (WRITERS * long,)),
        TINY: Task(sustained, (WRITERS * tiny, 3)),
    }


CLAIMS: Final = (
    Claim(
        "ten million events: rate, to bursts",
        of=Place(LONG, "", "events_s"),
        relation=">=",
        must=0.6,
        goal=0.7,
        to=Place(BURST, "", "events_s"),
    ),
    Claim("ten million events: peak memory, MB", of=Place(LONG, "", "peak_mb"), relation="<=", must=_MOST_MB),
    Claim("ten million events: memory, last quarter to second", of=Place(LONG, "", "growth"), relation="<=", must=1.1),
    Claim("lookup of an id among them: p99, µs", of=Place(LONG, "lookup by id", "p99_us"), relation="<=", must=1_000),
    Claim(
        "a million streams of 3 events: rate, to that of ten million events",
        of=Place(TINY, "", "events_s"),
        relation=">=",
        must=0.6,
        goal=0.75,
        to=Place(LONG, "", "events_s"),
    ),
    Claim(
        "a million streams of 3 events: peak memory, MB", of=Place(TINY, "", "peak_mb"), relation="<=", must=_MOST_MB
    ),
    Claim("a million streams of 3 events: files", of=Place(TINY, "", "files"), relation="<=", must=6_000),
)


def draw(rounds: list[Round], folder: Path) -> list[Path]:
    """Draw rate and memory over the events."""
    courses = {f"{WRITERS} streams": LONG, "streams of 3 events": TINY}
    return draw_course(rounds, courses, _MOST_MB, folder / "sustained.svg")


BENCHMARK: Final = Benchmark(
    name="sustained",
    title=f"events of 600 bytes from {WRITERS} tasks, on disk when acknowledged, for minutes",
    tasks=tasks,
    claims=CLAIMS,
    draw=draw,
    full_rounds=2,
)

if __name__ == "__main__":
    run([BENCHMARK], "python -m bench.sustained")
