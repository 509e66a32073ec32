"""How fast a stream is replayed: `python -m bench.replay`.

What a client has missed, one event or a thousand, through the SDK's `EventStore`. This store from memory, where the
newest events of each stream are, and from disk, opened anew; the others read as they always do.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

from mcp.server.streamable_http import EventMessage, EventStore

from bench.benchmark import Benchmark
from bench.claims import Claim
from bench.command import run
from bench.messages import MESSAGE
from bench.peers import PEERS
from bench.peers.ours import logstore
from bench.percentiles import percentiles
from bench.pictures import draw_bars
from bench.turns import Figures, Place, Round, Rows, Task

MISSED: Final = (1, 1_000)
STREAMS: Final = 8
_MEMORY: Final = "logstore from memory"
_DISK: Final = "logstore from disk"
_SQLITE: Final = "mcp-persist SQLite"
_QUICK_S: Final = 0.2
_FULL_S: Final = 1.0
_LEFT_OUT: Final = {"logstore always", "logstore interval", "logstore os", "Redis Streams always"}
"""How events were written makes no difference for reading them."""


def peer(folder: Path, name: str, seconds: float) -> Rows:
    """Measure a peer."""
    return asyncio.run(_peer(folder, name, seconds))


async def _peer(folder: Path, name: str, seconds: float) -> Rows:
    async with PEERS[name].open(folder) as store:
        return await _replayed(store, await _filled(store), seconds, PEERS[name].keeps)


def ours(folder: Path, from_disk: bool, seconds: float) -> Rows:
    """Measure this store."""
    return asyncio.run(_ours(folder, from_disk, seconds))


async def _ours(folder: Path, from_disk: bool, seconds: float) -> Rows:
    def opened() -> AbstractAsyncContextManager[EventStore]:
        return logstore(folder / "events.db", durability="interval", memory_cache_size=max(MISSED) + 1)

    async with opened() as store:
        ids = await _filled(store)
        if not from_disk:
            return await _replayed(store, ids, seconds, None)
    # Opened anew it has nothing in memory.
    async with opened() as store:
        return await _replayed(store, ids, seconds, None)


async def _filled(store: EventStore) -> list[list[str]]:
    """Fill streams, and return the ids of each."""

    async def fill(stream: int) -> list[str]:
        return [await store.store_event(f"stream-{stream}", MESSAGE) for _ in range(max(MISSED) + 1)]

    return await asyncio.gather(*map(fill, range(STREAMS)))


async def _replayed(store: EventStore, ids: list[list[str]], seconds: float, keeps: int | None) -> Rows:
    return {
        f"{missed:,} missed": await _replay(
            store, [stream[-1 - missed :][-(keeps or len(stream)) :] for stream in ids], seconds
        )
        for missed in MISSED
    }


async def _replay(store: EventStore, expected: list[list[str]], seconds: float) -> Figures:
    """Replay what comes after the first of each stream's ids, one stream after another and again.

    Raises:
        RuntimeError: Something else came.
    """
    found: list[str | None] = []

    async def collect(event: EventMessage) -> None:
        found.append(event.event_id)

    times_s = array("d")
    events = 0
    began = last = time.perf_counter()
    while last - began < seconds or len(times_s) < len(expected):
        ids = expected[len(times_s) % len(expected)]
        found.clear()
        await store.replay_events_after(ids[0], collect)
        now = time.perf_counter()
        times_s.append(now - last)
        last = now
        events += len(found)
        if found != ids[1:]:
            raise RuntimeError(f"after {ids[0]} came {len(found)} events that are not the {len(ids) - 1} stored")
    return {"events_s": events / (last - began), **percentiles(times_s)}


def tasks(full: bool) -> dict[str, Task]:
    """Return the tasks of this store, and one for each peer."""
    seconds = _FULL_S if full else _QUICK_S
    peers = {name: Task(peer, (name, seconds), (name,)) for name in PEERS if name not in _LEFT_OUT}
    return {_MEMORY: Task(ours, (False, seconds)), _DISK: Task(ours, (True, seconds)), **peers}


def _claim(words: str, task: str, missed: int, must: float) -> Claim:
    place, base = (Place(name, f"{missed:,} missed", "events_s") for name in (task, _SQLITE))
    return Claim(f"{words}, {missed:,} missed: rate, to {_SQLITE}'s", of=place, relation=">=", must=must, to=base)


CLAIMS: Final = tuple(
    _claim(words, task, missed, must)
    for words, task, must in (("from memory", _MEMORY, 5), ("from disk", _DISK, 3))
    for missed in reversed(MISSED)
)


def draw(rounds: list[Round], folder: Path) -> list[Path]:
    """Draw the rates of replays."""
    panels = {
        "replay of 1,000 events: events a second": Place("", "1,000 missed", "events_s"),
        "replay of 1 event: µs": Place("", "1 missed", "p50_us"),
    }
    return draw_bars(rounds, panels, list(tasks(True)), folder / "replay.svg", logarithmic=True)


BENCHMARK: Final = Benchmark(
    name="replay",
    title="events of 600 bytes that a client missed, sent again",
    tasks=tasks,
    claims=CLAIMS,
    quick_rounds=2,
    draw=draw,
)

if __name__ == "__main__":
    run([BENCHMARK], "python -m bench.replay")
