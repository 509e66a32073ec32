"""Several real processes on one store."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from logstore.storage import Log
from logstore.storage.files import Disk
from tests.engine import deadline, eventually, in_segments, payloads, process, read_all, small

PRELUDE = """
import asyncio, os, sys
from pathlib import Path
from logstore.errors import StoreClosedError
from logstore.storage import Log, LogOptions
from tests.engine import SMALL, read_all, small

path = Path(sys.argv[1])

def say(*words):
    os.write(1, " ".join(map(str, words)).encode() + b"\\n")

async def listen():
    return (await asyncio.to_thread(sys.stdin.readline)).rstrip()
"""

OWNER = (
    PRELUDE
    + """
async def main():
    log = Log(path, small(durability=sys.argv[2]))
    await log.sessions.open("session", b"data")
    for number in range(1_000_000):
        await log.append("stream", b"A %d" % number)
        say(number)

asyncio.run(main())
"""
)

HEIR = (
    PRELUDE
    + """
async def main():
    async with Log(path, small(durability=sys.argv[2])) as log:
        own = (await log.sessions.open(sys.argv[3], b"")).incarnation
        say("open")
        assert (await log.sessions.take_over("session")).incarnation != own
        say("the owner lives")
        assert await listen() == "take over"
        session = living = await log.sessions.find("session")
        while session.incarnation == living.incarnation:
            session = await log.sessions.take_over("session")
        say("mine" if session.incarnation == own else "not mine")
        if session.incarnation == own:
            assert session.data == b"data"
            last = (await read_all(log, "stream"))[-1]
            say(last.payload.decode())
            for number in range(300):
                await log.append("stream", b"B %d" % number)
            say("written")
        await listen()

asyncio.run(main())
"""
)


@pytest.mark.promise("kill-loses-nothing", "followers-miss-nothing", "one-owner")
@pytest.mark.parametrize("durability", ["always", "interval", "os"])
async def test_a_session_goes_on_in_another_process_while_a_third_reads_along(tmp_path: Path, durability: str) -> None:
    path = tmp_path / "events.db"
    followed: list[bytes] = []
    with process(OWNER, path, durability) as owner:
        assert await owner.line() == "0"
        with process(HEIR, path, durability, "heir-1") as heir:
            async with Log(path, small()) as log, deadline():

                async def follow() -> None:
                    async for event in log.follow("stream"):
                        followed.append(event.payload)

                following = asyncio.create_task(follow())
                assert [await heir.line(), await heir.line()] == ["open", "the owner lives"]
                acknowledged = 0
                while acknowledged < 500:
                    acknowledged = int(await owner.line())
                owner.kill()
                acknowledged = int([str(acknowledged), *await owner.rest_after_kill()][-1])
                heir.say("take over")
                assert await heir.line() == "mine"
                last = int((await heir.line()).removeprefix("A "))
                assert acknowledged <= last <= acknowledged + 1
                assert await heir.line() == "written"
                expected = [b"A %d" % number for number in range(last + 1)] + [b"B %d" % n for n in range(300)]
                await eventually(lambda: len(followed) >= len(expected), "all followed")
                following.cancel()
                assert followed == expected
                assert await payloads(log, "stream") == expected
            heir.say("end")
            assert await heir.rest() == []
    async with Log(path) as log:
        assert await payloads(log, "stream") == expected
        assert await log.sessions.find("session") is not None


@pytest.mark.promise("one-owner")
async def test_of_two_that_take_a_session_over_at_once_one_has_it(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    with ExitStack() as stack:
        owner = stack.enter_context(process(OWNER, path, "always"))
        assert await owner.line() == "0"
        heirs = [stack.enter_context(process(HEIR, path, "always", f"heir-{n}")) for n in range(2)]
        for heir in heirs:
            assert [await heir.line(), await heir.line()] == ["open", "the owner lives"]
        owner.kill()
        for heir in heirs:
            heir.say("take over")
        said = [await heir.line() for heir in heirs]
        assert sorted(said) == ["mine", "not mine"]
        for heir, word in zip(heirs, said, strict=True):
            if word == "mine":
                await heir.line()
                assert await heir.line() == "written"
            heir.say("end")
            assert await heir.rest() == []
    async with Log(path) as log:
        found = await payloads(log, "stream")
        assert found[-300:] == [b"B %d" % number for number in range(300)]


WRITES_AND_READS = (
    PRELUDE
    + """
async def main():
    own, other = sys.argv[2:4]
    async with Log(path, small()) as log:
        say("open")
        await listen()
        for number in range(400):
            await log.append(own, b"%d" % number)
        say("written")
        await listen()
        for stream in (own, other):
            events = await read_all(log, stream)
            assert [event.payload for event in events] == [b"%d" % number for number in range(400)], stream
            for event in events[::50]:
                assert await log.stream_of(event.event_id) == stream
            assert await log.read(stream, events[200].event_id) == events[201:]
    say("read")

asyncio.run(main())
"""
)


@pytest.mark.promise("many-processes")
async def test_each_of_two_writing_processes_reads_all_of_both(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    with process(WRITES_AND_READS, path, "a", "b") as first, process(WRITES_AND_READS, path, "b", "a") as second:
        for word in ("open", "written"):
            for each in (first, second):
                assert await each.line() == word
            for each in (first, second):
                each.say("go on")
        for each in (first, second):
            assert await each.rest() == ["read"]
    async with Log(path) as log:
        for stream in ("a", "b"):
            assert await payloads(log, stream) == [b"%d" % number for number in range(400)]


STARTS_AT_ONCE = (
    PRELUDE
    + """
async def main():
    say("ready")
    await listen()
    async with Log(path, small()) as log:
        event_id = await log.append(f"of {os.getpid()}", b"1")
        say(os.getpid(), event_id)
        await listen()

asyncio.run(main())
"""
)


@pytest.mark.promise("many-processes")
async def test_processes_that_open_a_new_store_at_once_share_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "events.db"
    with ExitStack() as stack:
        all_of_them = [stack.enter_context(process(STARTS_AT_ONCE, path)) for _ in range(6)]
        for each in all_of_them:
            assert await each.line() == "ready"
        for each in all_of_them:
            each.say("go")
        said = [(await each.line()).split() for each in all_of_them]
        for each in all_of_them:
            each.say("end")
            assert await each.rest() == []
    assert len({event_id for _, event_id in said}) == 6
    async with Log(path) as log:
        for pid, event_id in said:
            assert [event.event_id for event in await read_all(log, f"of {pid}")] == [event_id]
            assert await log.stream_of(event_id) == f"of {pid}"


ECHO = (
    PRELUDE
    + """
async def main():
    async with Log(path, small(checkpoint_interval_s=float(sys.argv[2]))) as log:
        say("open")
        while line := await listen():
            await log.append("live", line.encode())

asyncio.run(main())
"""
)


@pytest.mark.promise("followers-miss-nothing")
@pytest.mark.parametrize("checkpoint_interval_s", [0.01, 3600])
async def test_a_follower_sees_what_another_process_appends_at_once(
    tmp_path: Path, checkpoint_interval_s: float
) -> None:
    path = tmp_path / "events.db"
    with process(ECHO, path, str(checkpoint_interval_s)) as writer:
        assert await writer.line() == "open"
        async with Log(path, small()) as log, deadline():
            events = log.follow("live")
            loop = asyncio.get_running_loop()
            delays = []
            for number in range(40):
                started = loop.time()
                writer.say(f"{number}")
                event = await anext(events)
                delays.append(loop.time() - started)
                assert event.payload == b"%d" % number
            await events.aclose()  # type: ignore[attr-defined]
            # Half of them within twice the promise, on a busy machine.
            assert sorted(delays)[len(delays) // 2] < 0.1
        writer.say("")
        await writer.rest()


DIES_OVER_A_JOURNAL = (
    PRELUDE
    + """
async def main():
    log = Log(path, small(durability="os", checkpoint_interval_s=3600))
    for number in range(50):
        await log.append("one", b"%d" % number)
    say("written")
    await listen()

asyncio.run(main())
"""
)


@pytest.mark.promise("kill-loses-nothing", "dead-adopted")
async def test_what_a_process_left_that_died_is_brought_to_segments_by_those_that_live(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with deadline(), Log(path, small()) as log:
        with process(DIES_OVER_A_JOURNAL, path) as dying:
            assert await dying.line() == "written"
            journals = list(path.parent.glob("events-log/lanes/0001/*.journal"))
            assert journals
        await eventually(lambda: not any(each.exists() for each in journals), "adopted")
        assert await payloads(log, "one") == [b"%d" % number for number in range(50)]
        (summary,) = log.stream_summaries()
        assert summary.events == 50


FORKS = (
    PRELUDE
    + """
import signal

async def main():
    log = Log(path, small())
    async with log:
        await log.append("one", b"parent")
        child = os.fork()
        if child == 0:
            await in_child(log)
            os._exit(0)
        say(child)
        await log.append("one", b"parent again")
        await listen()

async def in_child(log):
    for attempt in (log.append("one", b"child"), log.append_many([("one", b"child", 0)]), log.read("one"),
                    log.sessions.open("key", b"")):
        try:
            await attempt
        except StoreClosedError:
            say("refused")
    await log.close()
    # Its own store it may have.
    other = Log(path.with_name("other.db"), small())
    try:
        await other.append("one", b"child")
    except BaseException as error:
        say(repr(error))
    signal.pause()

asyncio.run(main())
"""
)


@pytest.mark.promise("forked-child")
async def test_a_forked_child_may_not_write_and_holds_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    with process(FORKS, path) as parent:
        said: list[str] = []
        # In any order, and what becomes of the child's own store is told as well.
        while said.count("refused") < 4 or not any(line.isdigit() for line in said):
            said.append(await parent.line())
        child = next(int(line) for line in said if line.isdigit())
        parent.kill()
        try:
            # The child lives.
            os.kill(child, 0)
            for name in ("lanes/0000/lock", "store.lock", "checkpoint.lock", "registry.lock"):
                lock = Disk().lock(tmp_path / "events-log" / name)
                assert lock is not None, f"the child holds {name}"
                lock.release()
            async with Log(path, small()) as log:
                assert await payloads(log, "one") in ([b"parent"], [b"parent", b"parent again"])
        finally:
            os.kill(child, signal.SIGKILL)


FORKS_WHILE_A_THREAD_WAITS = """
import os, signal, sys, threading
from pathlib import Path
from logstore.storage.files import Disk

disk, path = Disk(), Path(sys.argv[1])
first = disk.lock(path)
waits = threading.Event()
second = []

def wait():
    waits.set()
    second.append(disk.lock(path, wait=True))

thread = threading.Thread(target=wait)
thread.start()
waits.wait()
locks = Path("/proc/locks")
while "->" not in locks.read_text():
    pass
child = os.fork()
if child == 0:
    signal.pause()
first.release()
thread.join()
second[0].release()
third = disk.lock(path)
print("free" if third is not None else "held by the child", flush=True)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
"""


@pytest.mark.promise("forked-child")
async def test_a_lock_that_a_thread_waits_for_does_not_stay_with_a_forked_child(tmp_path: Path) -> None:
    with process(FORKS_WHILE_A_THREAD_WAITS, tmp_path / "lock") as forks:
        assert await forks.line() == "free"
        await forks.rest()


async def test_two_stores_in_one_process_do_not_mix(tmp_path: Path) -> None:
    first, second = Log(tmp_path / "first.db", small()), Log(tmp_path / "second.db", small())
    async with first, second, deadline():
        for number in range(200):
            await first.append("one", b"first %d" % number)
            await second.append("one", b"second %d" % number)
        await in_segments(first)
        for name, log in (("first", first), ("second", second)):
            assert await payloads(log, "one") == [f"{name} {number}".encode() for number in range(200)]
        # Ids are drawn apart, so two stores may have some in common.
        strangers = {each.event_id for each in await read_all(first, "one")}
        strangers -= {each.event_id for each in await read_all(second, "one")}
        for event_id in strangers:
            assert await second.stream_of(event_id) is None


@pytest.mark.promise("many-processes")
async def test_one_store_opened_twice_in_one_process_is_shared(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path, small()) as first, Log(path, small()) as second, deadline():
        for number in range(200):
            await first.append("of the first", b"%d" % number)
            await second.append("of the second", b"%d" % number)
        for log in (first, second):
            for stream in ("of the first", "of the second"):
                assert await payloads(log, stream) == [b"%d" % number for number in range(200)]
