"""The store in memory stays within its bounds, and says when that cost a reader something."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logstore.errors import ConfigurationError, GapError
from logstore.mcp import InMemoryEventStore
from logstore.mcp.memory import MemoryLog
from logstore.storage import Event
from tests.mcp.test_contract import messages_after, note, replayed


async def test_of_a_long_stream_the_newest_events_stay() -> None:
    store = InMemoryEventStore(max_events_per_stream=3)
    ids = [await store.store_event("s", note(number)) for number in range(10)]
    assert store.get_stream_stats()["s"]["events"] == 3
    assert await messages_after(store, ids[8]) == [note(9)]


@pytest.mark.promise("memory-store-bounded")
async def test_a_gap_raises_and_the_last_event_before_it_is_no_gap() -> None:
    store = InMemoryEventStore(max_events_per_stream=3)
    ids = [await store.store_event("s", note(number)) for number in range(10)]
    # Who has the last one that went has missed nothing of what is kept.
    assert await messages_after(store, ids[6]) == [note(7), note(8), note(9)]
    for event_id in ids[:6]:
        with pytest.raises(GapError, match=event_id):
            await replayed(store, event_id)


@pytest.mark.promise("memory-store-bounded")
async def test_all_streams_together_stay_within_the_budget() -> None:
    log = MemoryLog(1000, 100_000, 1000)
    for number in range(1000):
        await log.append(f"s{number % 7}", b"x" * 1000)
    kept = log.stream_summaries()
    assert 50_000 < sum(summary.bytes for summary in kept) <= 100_000
    # The oldest of all went, whatever their stream.
    assert {summary.stream for summary in kept} == {f"s{number}" for number in range(7)}


async def test_an_event_larger_than_the_budget_is_kept_while_it_is_the_newest() -> None:
    log = MemoryLog(1000, 1000, 1000)
    small = await log.append("s", b"small")
    large = await log.append("s", b"x" * 100_000)
    assert [event.event_id for event in await log.read("s", small)] == [large]


@pytest.mark.promise("memory-store-bounded")
async def test_the_stream_longest_without_an_event_goes_first() -> None:
    log = MemoryLog(1000, 1 << 20, 2)
    first = await log.append("a", b"1")
    await log.append("b", b"2")
    await log.append("a", b"3")
    dropped = await log.append("b", b"4")
    await log.append("a", b"5")
    await log.append("c", b"6")
    assert {summary.stream for summary in log.stream_summaries()} == {"a", "c"}
    assert await log.stream_of(first) == "a"
    with pytest.raises(GapError):
        await log.stream_of(dropped)


@asynccontextmanager
async def replaying() -> AsyncGenerator[tuple[MemoryLog, AsyncGenerator[list[Event], None]]]:
    """A log with room for one stream, and a replay that has sent all that there is of it."""
    log = MemoryLog(1000, 1 << 20, 1)
    first = await log.append("s", b"1")
    await log.append("s", b"2")
    found = await log.resume(first)
    assert found is not None
    async with aclosing(found[1]) as pages:
        assert [event.payload for event in await anext(pages)] == [b"2"]
        yield log, pages


@pytest.mark.promise("no-hole-passed-over")
async def test_a_replay_whose_stream_is_dropped_and_begun_again_meanwhile_is_told() -> None:
    async with replaying() as (log, pages):
        for stream in ("s", "other", "s"):
            await log.append(stream, b"more")
        with pytest.raises(GapError):
            await anext(pages)


async def test_a_replay_that_has_everything_ends_though_its_stream_is_dropped() -> None:
    async with replaying() as (log, pages):
        await log.append("other", b"3")
        assert [page async for page in pages] == []


@pytest.mark.promise("unknown-id-is-none")
async def test_ids_of_an_earlier_store_are_unknown() -> None:
    earlier = InMemoryEventStore()
    old = await earlier.store_event("s", note(1))
    await asyncio.to_thread(lambda: None)
    store = InMemoryEventStore(max_events_per_stream=1)
    # Not made in the same millisecond.
    while int(new := await store.store_event("s", note(2))) <= int(old):
        store = InMemoryEventStore(max_events_per_stream=1)
    assert await replayed(store, old) == (None, [])
    assert await replayed(store, str(int(new) + 1)) == (None, [])


async def first(events: AsyncIterator[Event], count: int) -> list[bytes]:
    return [(await anext(events)).payload for _ in range(count)]


async def test_a_follower_gets_what_was_there_and_what_comes() -> None:
    log = MemoryLog(1000, 1 << 20, 10)
    start = await log.append("s", b"0")
    await log.append("s", b"1")
    followed = log.follow("s", start)
    assert await first(followed, 1) == [b"1"]
    waiting = asyncio.create_task(first(followed, 2))
    await log.append("other", b"-")
    await log.append_many([("s", b"2", 0), ("s", b"3", 0)])
    assert await waiting == [b"2", b"3"]


async def test_a_follower_of_a_stream_that_does_not_exist_yet_gets_its_first_event() -> None:
    log = MemoryLog(1000, 1 << 20, 10)
    waiting = asyncio.create_task(first(log.follow("s"), 1))
    await asyncio.sleep(0)
    await log.append("s", b"1")
    assert await waiting == [b"1"]


@pytest.mark.promise("memory-store-bounded")
async def test_a_follower_that_was_too_slow_is_told() -> None:
    log = MemoryLog(2, 1 << 20, 1)
    start = await log.append("s", b"0")
    followed = log.follow("s", start)
    await log.append("s", b"1")
    await first(followed, 1)
    for _ in range(4):
        await log.append("s", b"x")
    with pytest.raises(GapError):
        await anext(followed)


async def test_a_follower_of_a_stream_that_is_dropped_is_told() -> None:
    log = MemoryLog(10, 1 << 20, 1)
    start = await log.append("s", b"0")
    waiting = asyncio.create_task(first(log.follow("s", start), 1))
    await asyncio.sleep(0)
    await log.append("other", b"1")
    with pytest.raises(GapError):
        await waiting


async def test_closing_ends_followers() -> None:
    log = MemoryLog(10, 1 << 20, 10)
    followed = log.follow("s")
    waiting = asyncio.create_task(anext(followed, None))
    await asyncio.sleep(0)
    await log.close()
    assert await waiting is None


@pytest.mark.promise("no-hole-passed-over")
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 300)), max_size=60),
    st.integers(1, 6),
    st.integers(1, 4000),
    st.integers(1, 4),
)
async def test_a_read_is_whole_or_a_gap_whatever_was_dropped(
    appends: list[tuple[str, int]], max_events: int, max_bytes: int, max_streams: int
) -> None:
    log = MemoryLog(max_events, max_bytes, max_streams)
    model: dict[str, list[tuple[str, bytes]]] = {}
    for number, (stream, size) in enumerate(appends):
        payload = f"{number}".encode().ljust(size, b".")
        model.setdefault(stream, []).append((await log.append(stream, payload), payload))
    for stream, events in model.items():
        for position, (event_id, _) in enumerate(events):
            try:
                if await log.stream_of(event_id) != stream:
                    raise AssertionError("an id of another stream")
                found = await log.read(stream, event_id)
            except GapError:
                continue
            assert [(event.event_id, event.payload) for event in found] == events[position + 1 :]
    # The newest event of all is always there.
    if appends:
        stream = appends[-1][0]
        assert await log.read(stream, model[stream][-1][0]) == []


def test_a_setting_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_events_per_stream must be"):
        InMemoryEventStore(max_events_per_stream=0)
