"""Behind a stream's last event there is nothing, until there is: a replay is never told of an old look."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from logstore.errors import GapError, StoreClosedError
from logstore.storage import Event, Log
from tests.engine import in_segments, small

STORED = 5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture
async def events(path: Path) -> list[Event]:
    """A stream that is on disk only."""
    async with Log(path) as log:
        await log.append_many([("s", b"%d" % number, 0) for number in range(STORED)])
        return await log.read("s")


@pytest.fixture
async def log(path: Path, events: list[Event]) -> AsyncIterator[Log]:
    """The store opened anew: nothing of the stream is in memory."""
    async with Log(path, small(memory_bytes=1 << 20)) as log:
        yield log


async def resumed(log: Log, event: Event) -> AsyncGenerator[list[Event], None]:
    found = await log.resume(event.event_id)
    assert found is not None
    stream, pages = found
    assert stream == event.stream
    return pages


async def replayed(log: Log, event: Event, meanwhile: Callable[[], Awaitable[object]] | None = None) -> list[bytes]:
    """Replay what comes after an event; `meanwhile` happens while its first page is being sent."""
    found: list[bytes] = []
    async with aclosing(await resumed(log, event)) as pages:
        async for page in pages:
            found += [each.payload for each in page]
            if meanwhile is not None:
                await meanwhile()
                meanwhile = None
    return found


OLD = [b"%d" % number for number in range(1, STORED)]


async def test_the_disk_is_asked_once_when_nothing_comes_meanwhile(log: Log, events: list[Event]) -> None:
    before = log.stats().cache_misses
    assert await replayed(log, events[0]) == OLD
    assert log.stats().cache_misses == before + 1


async def test_an_event_of_this_process_is_found(log: Log, events: list[Event]) -> None:
    assert await replayed(log, events[0], lambda: log.append("s", b"new")) == [*OLD, b"new"]


async def test_an_event_that_went_to_segments_is_found(log: Log, events: list[Event]) -> None:
    async def append() -> None:
        await log.append("s", b"new")
        await in_segments(log)

    assert await replayed(log, events[0], append) == [*OLD, b"new"]


async def test_an_event_that_has_left_the_memory_again_is_found(log: Log, events: list[Event]) -> None:
    async def append() -> None:
        await log.append("s", b"new")
        await in_segments(log)
        assert "s" in log._tail.streams
        # Until there is no room left for it.
        for number in range(200):
            if "s" in log._tail.streams:
                await log.append_many([(f"other {number} {each}", bytes(20_000), 0) for each in range(10)])
                await in_segments(log)
        assert "s" not in log._tail.streams

    assert await replayed(log, events[0], append) == [*OLD, b"new"]


@pytest.mark.promise("many-processes")
async def test_an_event_of_another_process_is_found(log: Log, events: list[Event], path: Path) -> None:
    async with Log(path) as other:
        assert await replayed(log, events[0], lambda: other.append("s", b"new")) == [*OLD, b"new"]


@pytest.mark.promise("many-processes")
async def test_an_event_of_a_process_that_was_begun_again_since_is_found(
    log: Log, events: list[Event], path: Path
) -> None:
    async def append_and_begin_again() -> None:
        # The lane's mark is where it was before: nothing of the new opening is visible.
        await other.append("s", b"new")
        await other.close()
        await successor.open()

    other, successor = Log(path), Log(path)
    await other.open()
    try:
        assert await replayed(log, events[0], append_and_begin_again) == [*OLD, b"new"]
    finally:
        await successor.close()


@pytest.mark.promise("many-processes")
async def test_of_a_stream_in_memory_too(log: Log, path: Path) -> None:
    async with Log(path) as other:
        await log.read("own")
        first = await log.append("own", b"1")
        hits = log.stats().cache_hits
        assert await log.read("own", first) == []
        assert log.stats().cache_hits == hits + 1
        await other.append("own", b"2")
    async with Log(path):
        assert [event.payload for event in await log.read("own", first)] == [b"2"]


async def test_a_replay_that_a_close_overtakes_does_not_end_as_if_it_were_whole(log: Log) -> None:
    first = await log.append("own", b"1")
    await in_segments(log)
    assert log._parts is not None
    gate = threading.Event()
    held = asyncio.create_task(log._parts.read(gate.wait))
    resuming = asyncio.create_task(log.resume(first))
    await asyncio.sleep(0)
    closing = asyncio.create_task(log.close())
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(StoreClosedError):
        await resuming
    await asyncio.gather(held, closing)


# A resume is the stream and what comes after.


async def test_from_wherever_in_memory_or_on_disk(log: Log, path: Path) -> None:
    async with Log(path) as other:
        await log.append("s", b"of this process")
        await other.append("s", b"of the other")
        everything = await log.read("s")
        assert len(everything) == STORED + 2
        for opened in (log, other):
            for place, event in enumerate(everything):
                assert await replayed(opened, event) == [each.payload for each in everything[place + 1 :]]
    await in_segments(log)
    for place, event in enumerate(everything):
        assert await replayed(log, event) == [each.payload for each in everything[place + 1 :]]


async def test_over_many_pages(log: Log, path: Path) -> None:
    payloads = [b"%d" % number for number in range(3_000)]
    async with Log(path) as other:
        await other.append_many([("long", payload, 0) for payload in payloads])
    (first, *_) = await log.read("long")
    assert await replayed(log, first) == payloads[1:]


async def test_of_an_id_that_is_none(log: Log, events: list[Event]) -> None:
    for wrong in ("", "x", "-1", "1", str(events[-1].id + 1), "9" * 30):
        assert await log.resume(wrong) is None


async def test_up_to_a_hole(log: Log, events: list[Event], path: Path) -> None:
    segment = next((path.parent / "events-log" / "segments").iterdir())
    data = bytearray(segment.read_bytes())
    data[-3] ^= 1
    segment.write_bytes(bytes(data))
    async with aclosing(await resumed(log, events[0])) as pages:
        assert await anext(pages) == events[1:-1]
        with pytest.raises(GapError):
            await anext(pages)
    with pytest.raises(GapError):
        await log.resume(events[-2].event_id)
