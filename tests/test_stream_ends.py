"""Behind a stream's last event there is nothing, until there is: whoever asks again is never told of an old look."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from logstore.errors import GapError
from logstore.storage import Log
from tests.engine import eventually, in_segments, small


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture
async def last(path: Path) -> str:
    """A store whose stream is on disk only; the id of its last event."""
    async with Log(path) as log:
        return (await log.append_many([("s", b"%d" % number, 0) for number in range(5)]))[-1]


@pytest.fixture
async def log(path: Path, last: str) -> AsyncIterator[Log]:
    """The store opened anew, and read to its end."""
    async with Log(path, small(memory_bytes=1 << 20)) as log:
        assert len(await log.read("s")) == 5
        assert await log.read("s", last) == []
        yield log


async def shown(log: Log, after: str) -> list[bytes]:
    return [event.payload for event in await log.read("s", after)]


async def test_the_disk_is_asked_once(log: Log, last: str) -> None:
    before = log.stats()
    for _ in range(3):
        assert await log.read("s", last) == []
    after = log.stats()
    assert (after.cache_misses, after.cache_hits) == (before.cache_misses, before.cache_hits + 3)


async def test_an_event_of_this_process_is_found(log: Log, last: str) -> None:
    await log.append("s", b"new")
    assert await shown(log, last) == [b"new"]
    await in_segments(log)
    assert await shown(log, last) == [b"new"]


@pytest.mark.promise("many-processes")
async def test_an_event_of_another_process_is_found(log: Log, last: str, path: Path) -> None:
    async with Log(path) as other:
        assert await shown(log, last) == []
        await other.append("s", b"new")
        assert await shown(log, last) == [b"new"]
    assert await shown(log, last) == [b"new"]


async def test_an_event_that_has_left_the_memory_again_is_found(log: Log, last: str) -> None:
    await log.append("s", b"new")
    await in_segments(log)
    assert "s" in log._tail.streams
    # Until there is no room left for it.
    for number in range(200):
        if "s" not in {owner.name for owner in log._tail.streams.values()}:
            break
        await log.append_many([(f"other {number} {each}", bytes(20_000), 0) for each in range(10)])
        await in_segments(log)
    assert "s" not in log._tail.streams
    assert await shown(log, last) == [b"new"]


async def test_a_page_that_is_full_is_not_the_last(log: Log, path: Path) -> None:
    async with Log(path) as other:
        events = await other.read("s")
        for limit in range(1, 7):
            after: str | None = None
            found: list[bytes] = []
            while page := await log.read("s", after, limit):
                found += [event.payload for event in page]
                after = page[-1].event_id
            assert found == [event.payload for event in events]


# In one look.


async def test_a_resume_is_the_stream_and_what_comes_after(log: Log, path: Path) -> None:
    async with Log(path) as other:
        await log.append("s", b"of this process")
        await other.append("s", b"of the other")
        events = await log.read("s")
        assert len(events) == 7
        for opened in (log, other):
            for place, event in enumerate(events):
                assert await opened.resume(event.event_id) == ("s", events[place + 1 :])
                assert await opened.resume(event.event_id, 2) == ("s", events[place + 1 :][:2])
    await eventually(lambda: log.stats().unsegmented_bytes == 0)
    for place, event in enumerate(events):
        assert await log.resume(event.event_id) == ("s", events[place + 1 :])


async def test_of_an_id_that_is_none_there_is_no_resume(log: Log, last: str) -> None:
    for wrong in ("", "x", "-1", "1", str(int(last) + 1), "9" * 30):
        assert await log.resume(wrong) is None


async def test_a_resume_after_which_events_are_gone_says_so(log: Log, path: Path) -> None:
    events = await log.read("s")
    async with Log(path) as other:
        segment = next((path.parent / "events-log" / "segments").iterdir())
        data = bytearray(segment.read_bytes())
        data[-3] ^= 1
        segment.write_bytes(bytes(data))
        with pytest.raises(GapError):
            await other.resume(events[-2].event_id)
        assert await other.resume(events[0].event_id) == ("s", events[1:-1])
