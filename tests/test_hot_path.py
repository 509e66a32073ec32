"""The hot paths take no more steps than they did: a change that makes one a quarter slower is seen on any machine.

Steps are instructions and calls (see `tests.steps`), not time. They are compared to a loop that does the same with
nothing between, counted in the same process, so that releases of Python make little difference. A bound is a tenth
above what a path takes; when the path gets shorter its bound must too, or it no longer sees a quarter.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import repeat
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

import msgspec
import pytest
from google_crc32c import extend
from mcp.server.streamable_http import EventMessage
from mcp_types import JSONRPCNotification

from logstore.mcp import PersistentEventStore, base
from logstore.storage import Event, Log, record
from logstore.storage.files import Disk
from logstore.storage.header import KIND_JOURNAL, FileHeader, frame_seed
from logstore.storage.journal import JournalWriter, scan_journal
from logstore.storage.record import FRAME_HEADER, encode_frame
from tests.steps import counted

EVENTS: Final = 64
TASKS: Final = 16
MESSAGE: Final = JSONRPCNotification(jsonrpc="2.0", method="notifications/message", params={"data": "x" * 500})

Work = Callable[[], Awaitable[object]]


def quiet_store(folder: Path, durability: Any) -> PersistentEventStore:
    """A store in which nothing happens by the clock."""
    return PersistentEventStore(
        folder / "events.db",
        durability=durability,
        sync_interval_s=3600.0,
        memory_cache_size=10 * EVENTS,
        maintenance_interval_s=3600.0,
    )


async def steps_of(work: Work) -> int:
    """The fewest steps that some work takes of a few times: what the clock adds is not of it."""
    taken: list[int] = []
    for _ in range(4):
        with counted() as steps:
            await work()
        taken.append(steps.taken)
    # What a function is when it is counted for the first time is not counted.
    return min(taken[1:])


@asynccontextmanager
async def appending(folder: Path) -> AsyncGenerator[tuple[Work, Work]]:
    """Storing an event in the call, as `interval` and `os` do."""
    fd = os.open(folder / "bare", os.O_RDWR | os.O_CREAT)
    frames: list[bytes] = []

    async def bare() -> None:
        offset = 0
        for number in range(EVENTS):
            payload = MESSAGE.__pydantic_serializer__.to_json(MESSAGE)
            body = msgspec.msgpack.encode(Event(number, number, time.time_ns(), "s", 0, payload))
            frame = FRAME_HEADER.pack(len(body), extend(7, body)) + body
            offset += os.pwrite(fd, frame, offset)
            frames.append(frame)

    async with quiet_store(folder, "interval") as store:

        async def work() -> None:
            for _ in range(EVENTS):
                await store.store_event("s", MESSAGE)

        await work()
        try:
            yield work, bare
        finally:
            os.close(fd)


@asynccontextmanager
async def queueing(folder: Path) -> AsyncGenerator[tuple[Work, Work]]:
    """Storing events from many tasks with one commit, as `always` does: the loop writes, the kernel syncs."""
    waiting: list[tuple[bytes, asyncio.Future[None]]] = []

    async def bare() -> None:
        for number in range(EVENTS):
            payload = MESSAGE.__pydantic_serializer__.to_json(MESSAGE)
            body = msgspec.msgpack.encode(Event(number, number, time.time_ns(), "s", 0, payload))
            future: asyncio.Future[None] = asyncio.Future()
            waiting.append((FRAME_HEADER.pack(len(body), extend(7, body)) + body, future))
            future.set_result(None)
            await future

    async with quiet_store(folder, "always") as store:

        async def one(stream: str) -> None:
            for _ in range(EVENTS // TASKS):
                await store.store_event(stream, MESSAGE)

        async def work() -> None:
            await asyncio.gather(*(one(f"stream-{number}") for number in range(TASKS)))

        yield work, bare


@asynccontextmanager
async def replaying(folder: Path) -> AsyncGenerator[tuple[Work, Work]]:
    """Replaying a stream that is in memory."""
    found: list[EventMessage] = []

    async def collect(event: EventMessage) -> None:
        found.append(event)

    payload = MESSAGE.__pydantic_serializer__.to_json(MESSAGE)
    body = encode_frame(Event(1, 0, 0, "s", 0, payload), 7)[FRAME_HEADER.size :]

    async def bare() -> None:
        for _ in range(EVENTS):
            event = msgspec.msgpack.decode(body, type=Event)
            message = JSONRPCNotification.__pydantic_validator__.validate_json(event.payload)
            await collect(EventMessage(message, str(event.id)))

    async with quiet_store(folder, "os") as store:
        ids = [await store.store_event("s", MESSAGE) for _ in range(EVENTS + 1)]

        async def work() -> None:
            found.clear()
            await store.replay_events_after(ids[0], collect)
            assert len(found) == EVENTS

        yield work, bare


@asynccontextmanager
async def reading(folder: Path) -> AsyncGenerator[tuple[Work, Work]]:
    """Reading a stream from segments, in the thread that reads."""
    async with quiet_store(folder, "os") as store:
        ids = [await store.store_event("s", MESSAGE) for _ in range(EVENTS + 1)]
    # Opened again, it has nothing in memory.
    async with quiet_store(folder, "os") as store:
        log = await store.log()
        assert isinstance(log, Log)
        assert log._parts is not None
        reader = log._parts.reader
        frames = [encode_frame(Event(1, 0, 0, "s", 0, b"x" * 600), frame_seed(1))] * EVENTS

        async def work() -> None:
            assert len(reader.read("s", int(ids[0]), EVENTS, []).events) == EVENTS

        async def bare() -> None:
            check_and_decode(frames)

        yield work, bare


@asynccontextmanager
async def recovering(folder: Path) -> AsyncGenerator[tuple[Work, Work]]:
    """Reading a journal that a dead process left."""
    path = folder / "0000000001.journal"
    header = FileHeader(kind=KIND_JOURNAL, store_id=1, salt=1)
    frames = [encode_frame(Event(each, 0, 0, "s", 0, b"x" * 600), header.seed) for each in range(EVENTS)]
    writer = JournalWriter(Disk(), path, header)
    writer.write(frames)
    writer.close()
    data = path.read_bytes()

    async def work() -> None:
        assert len(scan_journal(data, path).frames) == EVENTS

    async def bare() -> None:
        check_and_decode(frames)

    yield work, bare


def check_and_decode(frames: list[bytes]) -> None:
    """What reading frames cannot do without."""
    seed = frame_seed(1)
    for frame in frames:
        length, checksum = FRAME_HEADER.unpack_from(frame)
        body = frame[FRAME_HEADER.size : FRAME_HEADER.size + length]
        assert extend(seed, body) == checksum
        assert msgspec.msgpack.decode(body, type=Event).stream == "s"


class Hot(NamedTuple):
    """A path.

    Attributes:
        prepared: Gives the path's work and the loop that it is compared to.
        bound: How many times as many steps the path may take.
        module: Where a function is that it calls once an event.
        function: Its name.
    """

    prepared: Callable[[Path], AbstractAsyncContextManager[tuple[Work, Work]]]
    bound: float
    module: ModuleType
    function: str


PATHS: Final = {
    "append in the call": Hot(appending, 9.7, base, "encode"),
    "append in a batch": Hot(queueing, 5.5, base, "encode"),
    "replay from memory": Hot(replaying, 3.45, base, "decode"),
    "read from segments": Hot(reading, 2.5, record, "_decode_event"),
    "read from a journal": Hot(recovering, 1.68, record, "_decode_event"),
}


def slower(function: Callable[..., Any], steps: int) -> Callable[..., Any]:
    """A function that takes so many steps more."""

    def called(*arguments: Any) -> Any:
        for _ in repeat(None, steps // 3):
            pass
        return function(*arguments)

    return called


@pytest.mark.parametrize("path", PATHS)
async def test_a_path_takes_no_more_steps_than_it_did_and_a_quarter_more_is_seen(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = PATHS[path]
    async with hot.prepared(tmp_path) as (work, reference):
        reference_steps = await steps_of(reference)
        steps = await steps_of(work)
        assert steps / reference_steps <= hot.bound, "this path has become slower"
        more = slower(getattr(hot.module, hot.function), steps // EVENTS // 4)
        monkeypatch.setattr(hot.module, hot.function, more)
        assert await steps_of(work) / reference_steps > hot.bound, "this path has become faster: lower its bound"
