#!/usr/bin/env python3
"""Break a store on purpose and look whether it keeps its promises: `python tools/crash.py kill --runs 200 --seed 1`.

Each campaign draws everything from its seed. A replay repeats every choice; at which instruction a process dies when
the clock decides it, not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

# Run as a script, this folder is on the path and the checkout is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logstore.errors import LogstoreError
from logstore.storage import Durability, Log, LogOptions
from logstore.storage.files import Disk

_DEADLINE_S: Final = 30.0
_RUNS_A_STORE: Final = 10
_WRITERS: Final = 4
_STREAMS: Final = 6
"""Of each slot; a slot is what one process serves, and another takes over."""
_POLL_S: Final = 0.002


# The process that is killed.


@dataclasses.dataclass(frozen=True)
class Orders:
    """What a writing process is told.

    Attributes:
        path: The catalogue of the store.
        oracle: File that gets a line for every acknowledged call.
        seed: What sizes and streams are drawn from.
        run: Number of the run.
        process: Number of the process in it, which is the slot that it serves; a line on its stdin gives it slot 0 too.
        die_at: Which change of the disk kills it, None when the campaign does.
        durability: As in `LogOptions`, like the rest.
        journal_file_bytes: Small, so that files rotate all the time.
        journal_bytes: Small, so that appends wait now and then.
        checkpoint_interval_s: Short, so that checkpoints run all the time.
        segment_bytes: Small, so that segments are sealed.
    """

    path: str
    oracle: str
    seed: int
    run: int
    process: int
    die_at: int | None
    durability: Durability
    journal_file_bytes: int
    journal_bytes: int
    checkpoint_interval_s: float
    segment_bytes: int


class DyingDisk(Disk):
    """The real disk; its n-th change kills the process, a write after half of it."""

    def __init__(self, die_at: int) -> None:
        self._changes = itertools.count(1)
        self._die_at = die_at

    def _change(self) -> None:
        if self._dies():
            self._die()

    def _dies(self) -> bool:
        return next(self._changes) == self._die_at

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def create(self, path: Path) -> int:
        """Count, then do it."""
        self._change()
        return super().create(path)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """Count, then do it."""
        if self._dies():
            super().write(fd, data[: len(data) // 2], offset)
            self._die()
        super().write(fd, data, offset)

    def extend(self, fd: int, length: int) -> None:
        """Count, then do it."""
        self._change()
        super().extend(fd, length)

    def sync(self, fd: int) -> None:
        """Count, then do it."""
        self._change()
        super().sync(fd)

    def sync_folder(self, folder: Path) -> None:
        """Count, then do it."""
        self._change()
        super().sync_folder(folder)

    def rename(self, source: Path, target: Path) -> None:
        """Count, then do it."""
        self._change()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        """Count, then do it."""
        self._change()
        super().unlink(path)


class Call(NamedTuple):
    """One append, of one event or several; `number` counts the calls of a writer."""

    run: int
    process: int
    writer: int
    number: int


class Mark(NamedTuple):
    """What a payload says of its event."""

    stream: str
    call: Call
    place: int
    of: int


def payload_of(mark: Mark) -> bytes:
    """Return the payload of an event: its mark, and bytes that follow from it."""
    text = "|".join(map(str, (mark.stream, *mark.call, mark.place, mark.of))) + "|"
    rng = random.Random(text)
    size = rng.randrange(20_000) if rng.random() < 0.02 else rng.randrange(800)
    return text.encode() + rng.randbytes(size)


def mark_of(payload: bytes) -> Mark | None:
    """Return what a payload says, or None when it is not what was stored."""
    fields = payload.split(b"|", 7)
    try:
        run, process, writer, number, index, count = map(int, fields[1:7])
        mark = Mark(fields[0].decode(), Call(run, process, writer, number), index, count)
    except ValueError:
        return None
    return mark if payload_of(mark) == payload else None


def streams_of(slot: int) -> list[str]:
    """Return the streams of a slot."""
    return [f"slot{slot}/stream{number}" for number in range(_STREAMS)]


async def write_until_killed(orders: Orders) -> None:
    """Open the store, serve the slot, and write from several tasks at once for ever."""
    disk = Disk() if orders.die_at is None else DyingDisk(orders.die_at)
    options = LogOptions(
        durability=orders.durability,
        journal_file_bytes=orders.journal_file_bytes,
        journal_bytes=orders.journal_bytes,
        checkpoint_interval_s=orders.checkpoint_interval_s,
        segment_bytes=orders.segment_bytes,
        memory_bytes=1 << 20,
        cached_events_per_stream=10,
        sync_interval_s=0.02,
    )
    inherit = asyncio.Event()
    loop = asyncio.get_running_loop()
    threading.Thread(target=_wait_for_word, args=(loop, inherit), daemon=True).start()
    log = Log(orders.path, options, disk)
    await log.open()
    await _serve(log, orders.process)
    report = os.open(orders.oracle, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(report, b"ready\n")
    streams = streams_of(orders.process)
    async with asyncio.TaskGroup() as tasks:
        for writer in range(_WRITERS):
            tasks.create_task(_write(log, orders, writer, streams, report))
        if orders.process > 0:
            await inherit.wait()
            await _serve(log, 0)
            os.write(report, b"inherited\n")
            streams += streams_of(0)


def _wait_for_word(loop: asyncio.AbstractEventLoop, inherit: asyncio.Event) -> None:
    if sys.stdin.readline():
        loop.call_soon_threadsafe(inherit.set)


async def _serve(log: Log, slot: int) -> None:
    """Make the session of a slot this process's own."""
    key = f"slot{slot}"
    if await log.sessions.find(key) is None:
        await log.sessions.open(key, b"")
        return
    own = (await log.sessions.open(f"of process {os.getpid()}", b"")).incarnation
    async with asyncio.timeout(_DEADLINE_S):
        while True:
            session = await log.sessions.take_over(key)
            if session is not None and session.incarnation == own:
                return
            await asyncio.sleep(_POLL_S)


async def _write(log: Log, orders: Orders, writer: int, streams: Sequence[str], report: int) -> None:
    rng = random.Random(f"{orders.seed} {orders.run} {orders.process} {writer}")
    for number in itertools.count():
        call = Call(orders.run, orders.process, writer, number)
        count = rng.choice((1, 1, 1, 1, 2, 7))
        chosen = rng.choices(streams, k=count)
        marks = [Mark(stream, call, index, count) for index, stream in enumerate(chosen)]
        if count == 1:
            ids = [await log.append(marks[0].stream, payload_of(marks[0]))]
        else:
            ids = await log.append_many([(mark.stream, payload_of(mark), 0) for mark in marks])
        line = json.dumps([call, list(zip(chosen, ids, strict=True))])
        os.write(report, line.encode() + b"\n")
        # In the modes without a sync an append may not suspend at all.
        await asyncio.sleep(0)


# The campaign.


class BrokenPromiseError(Exception):
    """A promise was broken."""


class Store:
    """One store under test, and what its writers were told.

    Attributes:
        acknowledged: Id of every acknowledged event, by its mark.
        shown: Mark of every event that was ever read, by id.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "store" / "events.db"
        self.oracles = folder / "oracle"
        self.oracles.mkdir(parents=True)
        self.acknowledged: dict[Mark, int] = {}
        self.shown: dict[int, Mark] = {}
        self._ids: dict[int, Mark] = {}
        self._last_calls: dict[tuple[int, int, int], Call] = {}

    def learn(self, oracle: Path) -> int:
        """Take up what a dead process acknowledged; return how many events."""
        learnt = 0
        for line in read_lines(oracle):
            if not line.startswith("["):
                continue
            fields, events = json.loads(line)
            call = Call(*fields)
            self._last_calls[call[:3]] = call
            for index, (stream, event_id) in enumerate(events):
                mark, number = Mark(stream, call, index, len(events)), int(event_id)
                earlier = self._ids.setdefault(number, mark)
                if earlier != mark:
                    raise BrokenPromiseError(f"id {number} was given to {mark} and to {earlier}")
                self.acknowledged[mark] = number
                learnt += 1
        return learnt

    async def verify(self, options: LogOptions) -> int:
        """Read everything back; return how many events there were that nobody had acknowledged.

        Raises:
            BrokenPromiseError: With what is wrong.
        """
        found: dict[Mark, int] = {}
        async with asyncio.timeout(_DEADLINE_S), Log(self.path, options) as log:
            if log.health().status != "ok":
                raise BrokenPromiseError(f"after reopening: {log.health()}")
            for stream in streams_of(0) + streams_of(1):
                found.update(self._check_stream(stream, [event async for event in _all_events(log, stream)]))
            summaries = {summary.stream: summary.events for summary in log.stream_summaries()}
            if summaries != (counted := Counter(mark.stream for mark in found)):
                raise BrokenPromiseError(f"the summaries say {summaries}, there are {counted}")
            sample = list(itertools.islice(found.items(), 0, None, max(1, len(found) // 20)))
            for mark, event_id in sample:
                if await log.stream_of(str(event_id)) != mark.stream:
                    raise BrokenPromiseError(
                        f"event {event_id} is said to be in {await log.stream_of(str(event_id))}: {mark}"
                    )
        self._check_acknowledged(found)
        return self._check_others(found)

    def _check_stream(self, stream: str, events: Sequence[tuple[int, bytes]]) -> Iterator[tuple[Mark, int]]:
        last_id, last_turn = 0, (0, 0)
        seen: set[Mark] = set()
        for event_id, payload in events:
            mark = mark_of(payload)
            if mark is None or mark.stream != stream:
                raise BrokenPromiseError(
                    f"event {event_id} of {stream} holds what was never stored there: {payload[:80]!r}"
                )
            if mark in seen:
                raise BrokenPromiseError(f"{mark} is there twice")
            if event_id <= last_id or mark.call[:2] < last_turn:
                raise BrokenPromiseError(f"{mark}, event {event_id}, comes after {last_turn}, event {last_id}")
            earlier = self._ids.setdefault(event_id, mark)
            if earlier != mark:
                raise BrokenPromiseError(f"id {event_id} is {mark} now and was {earlier}")
            seen.add(mark)
            last_id, last_turn = event_id, mark.call[:2]
            yield mark, event_id

    def _check_acknowledged(self, found: dict[Mark, int]) -> None:
        lost = [mark for mark, event_id in self.acknowledged.items() if found.get(mark) != event_id]
        if lost:
            raise BrokenPromiseError(
                f"{len(lost)} acknowledged events are gone, the first of them {lost[0]}, the last {lost[-1]}"
            )
        gone = [mark for event_id, mark in self.shown.items() if found.get(mark) != event_id]
        if gone:
            raise BrokenPromiseError(f"{len(gone)} events were shown and are gone, the first of them {gone[0]}")
        self.shown = {event_id: mark for mark, event_id in found.items()}
        by_writer: dict[tuple[int, int, int], list[tuple[Call, int, int]]] = {}
        for mark, event_id in found.items():
            by_writer.setdefault(mark.call[:3], []).append((mark.call, mark.place, event_id))
        for writer, events in by_writer.items():
            in_order = [event_id for _, _, event_id in sorted(events)]
            if in_order != sorted(in_order):
                raise BrokenPromiseError(f"the events of writer {writer} are out of order")

    def _check_others(self, found: dict[Mark, int]) -> int:
        """Check the events that were written when their writer died: one call each writer, and that call whole."""
        others = [mark for mark in found if mark not in self.acknowledged]
        calls = Counter(mark.call for mark in others)
        counts = {mark.call: mark.of for mark in others}
        for call, events in calls.items():
            last = self._last_calls.get(call[:3])
            if call.number != (last.number + 1 if last else 0):
                raise BrokenPromiseError(f"{call} was stored, though the writer's last acknowledged call was {last}")
            if events != counts[call]:
                raise BrokenPromiseError(
                    f"{events} of the {counts[call]} events of {call} were stored, all or none were promised"
                )
        return len(others)


async def _all_events(log: Log, stream: str) -> Any:
    after: str | None = None
    while events := await log.read(stream, after, 500):
        for event in events:
            yield event.id, event.payload
        after = events[-1].event_id


def read_lines(path: Path) -> list[str]:
    """Return the whole lines of a file, none when it does not exist; a killed writer may leave half of one."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().split("\n")[:-1]
    return []


class Writer:
    """A writing process."""

    def __init__(self, store: Store, orders: Orders) -> None:
        self.oracle = Path(orders.oracle)
        self._errors = self.oracle.with_suffix(".stderr")
        with self._errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "writer", json.dumps(dataclasses.asdict(orders))],
                stdin=subprocess.PIPE,
                stderr=stderr,
            )

    def wait_for(self, word: str) -> bool:
        """Return whether the process said a word, when it did or died.

        Raises:
            BrokenPromiseError: It did neither in time.
        """
        deadline = time.monotonic() + _DEADLINE_S
        while word not in read_lines(self.oracle):
            if self._process.poll() is not None:
                return word in read_lines(self.oracle)
            if time.monotonic() > deadline:
                self.kill()
                raise BrokenPromiseError(f"no {word!r} from {self.oracle.name} within {_DEADLINE_S:.0f} s")
            time.sleep(_POLL_S)
        return True

    def live(self, seconds: float) -> None:
        """Let the process work for some time, or until it dies."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def give_slot_0(self) -> None:
        """Have it serve the streams of the process that died."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"inherit\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        """End the process as a crash does."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def check(self) -> None:
        """Look how it ended.

        Raises:
            BrokenPromiseError: Not by a kill, or it saw damage.
        """
        errors = self._errors.read_text()
        if self._process.returncode != -signal.SIGKILL or "ERROR" in errors or "Traceback" in errors:
            raise BrokenPromiseError(f"{self.oracle.name} ended with {self._process.returncode}:\n{errors}")


class KillCampaign:
    """Kills writers at random moments, and reads everything back.

    Args:
        folder: Where the stores go.
        seed: What everything is drawn from.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._store: Store | None = None
        self.figures: Counter[str] = Counter()

    def run(self, number: int) -> None:
        """Do one run: one process, or two of which the second inherits.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        rng = random.Random(f"{self._seed} {number}")
        if self._store is None or number % _RUNS_A_STORE == 0:
            self._store = Store(self._folder / f"{number:05d}")
        store = self._store
        two = rng.random() < 0.3
        writers = [
            Writer(store, self._orders(store, rng, number, process, dies=rng.random() < 0.5))
            for process in range(2 if two else 1)
        ]
        try:
            self._kill(rng, writers)
        finally:
            for writer in writers:
                writer.kill()
        self.figures["kills"] += len(writers)
        for writer in writers:
            writer.check()
            self.figures["events acknowledged"] += store.learn(writer.oracle)
        last = number % _RUNS_A_STORE == _RUNS_A_STORE - 1
        # Now and then nobody looks, so that the next writer finds what the last one left, and is killed over it.
        if last or rng.random() < 0.6:
            self._verify(store, rng)
        if last:
            self.finish()

    def finish(self) -> None:
        """Read the store back once more without its index.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        store, self._store = self._store, None
        if store is None or not store.path.exists():
            return
        self._verify(store, random.Random(self._seed))
        for suffix in ("", "-wal", "-shm"):
            store.path.with_name(store.path.name + suffix).unlink(missing_ok=True)
        self._verify(store, random.Random(self._seed))
        self.figures["stores indexed again"] += 1
        shutil.rmtree(store.path.parent.parent)

    def _orders(self, store: Store, rng: random.Random, run: int, process: int, *, dies: bool) -> Orders:
        return Orders(
            path=str(store.path),
            oracle=str(store.oracles / f"{run:05d}-{process}"),
            seed=self._seed,
            run=run,
            process=process,
            # A store that is opened changes the disk some forty times, a commit twice.
            die_at=int(2 ** rng.uniform(0, 10)) if dies else None,
            durability=rng.choice(("always", "interval", "os")),
            journal_file_bytes=64 << 10,
            journal_bytes=rng.choice((128 << 10, 512 << 10)),
            checkpoint_interval_s=rng.choice((0.01, 0.03, 0.2)),
            segment_bytes=rng.choice((64 << 10, 256 << 10)),
        )

    def _kill(self, rng: random.Random, writers: Sequence[Writer]) -> None:
        first = writers[0]
        if rng.random() < 0.2:
            # While it starts, opens, recovers.
            first.live(rng.uniform(0.2, 0.5))
        elif first.wait_for("ready"):
            first.live(rng.expovariate(1 / 0.15))
        first.kill()
        self.figures["killed while opening"] += "ready" not in read_lines(first.oracle)
        for heir in writers[1:]:
            if heir.wait_for("ready"):
                heir.give_slot_0()
                if rng.random() < 0.7:
                    self.figures["slots inherited"] += heir.wait_for("inherited")
                heir.live(rng.expovariate(1 / 0.1))

    def _verify(self, store: Store, rng: random.Random) -> None:
        options = LogOptions(durability=rng.choice(("always", "interval", "os")), segment_bytes=64 << 10)
        errors = _Errors()
        logging.getLogger("logstore").addHandler(errors)
        try:
            others = asyncio.run(store.verify(options))
        except (LogstoreError, OSError) as error:
            raise BrokenPromiseError(f"the store cannot be read: {error!r}") from error
        finally:
            logging.getLogger("logstore").removeHandler(errors)
        if errors.lines:
            raise BrokenPromiseError("the store was opened with errors:\n" + "\n".join(errors.lines))
        self.figures["times read back"] += 1
        self.figures["events read back"] += len(store.shown)
        self.figures["most events of unfinished calls in a store"] = max(
            self.figures["most events of unfinished calls in a store"], others
        )


class _Errors(logging.Handler):
    """Keeps what the engine logs as an error: nothing was damaged, so there must be none."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())


def kill(runs: int, seed: int, folder: Path) -> int:
    """Run the campaign, progress on stderr and the report on stdout; return 1 when a promise was broken."""
    started = time.monotonic()
    campaign = KillCampaign(folder, seed)
    done, failure = 0, ""
    try:
        for number in range(runs):
            _progress(f"run {number + 1} of {runs}, {campaign.figures['events acknowledged']} events acknowledged")
            campaign.run(number)
            done += 1
        campaign.finish()
    except BrokenPromiseError as error:
        failure = str(error)
    _progress("\n")
    _say(f"kill campaign, seed {seed}: {done} of {runs} runs in {time.monotonic() - started:.0f} s")
    for name, figure in campaign.figures.items():
        _say(f"{figure:>12,}  {name}")
    if not failure:
        _say("every acknowledged event was there, once, in order, with its payload; no id was given out twice")
        return 0
    _say(f"FAILED in run {done}: {failure}")
    _say(f"the store is kept in {folder}; to repeat:  python tools/crash.py kill --runs {done + 1} --seed {seed}")
    return 1


def _progress(text: str) -> None:
    ending = "" if text.endswith("\n") else "\r"
    if sys.stderr.isatty() or not ending:
        sys.stderr.write(text + ending)
        sys.stderr.flush()
    elif " 1 of" in text or int(text.split()[1]) % 20 == 0:
        sys.stderr.write(text + "\n")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main(arguments: Iterable[str] | None = None) -> int:
    """Parse, run, return the exit status: 0 fine, 1 a promise was broken, 2 wrong usage."""
    parser = argparse.ArgumentParser(description="Break a store on purpose and look whether it keeps its promises.")
    campaigns = parser.add_subparsers(dest="campaign", required=True, metavar="CAMPAIGN")
    killing = campaigns.add_parser(
        "kill",
        help="writing processes killed at random moments",
        description="Kill writing processes at random moments, open the store again, and look for what was lost.",
    )
    killing.add_argument("--runs", type=int, default=200, help="how many times (default: %(default)s)")
    killing.add_argument("--seed", type=int, help="what everything is drawn from (default: from the clock, printed)")
    killing.add_argument("--folder", type=Path, help="where to put the stores (default: a temporary folder)")
    writing = campaigns.add_parser("writer")
    writing.add_argument("orders")
    parsed = parser.parse_args(None if arguments is None else list(arguments))
    if parsed.campaign == "writer":
        logging.basicConfig(level=logging.WARNING)
        asyncio.run(write_until_killed(Orders(**json.loads(parsed.orders))))
        return 0
    seed = time.time_ns() % 1_000_000 if parsed.seed is None else parsed.seed
    folder = parsed.folder or Path(tempfile.mkdtemp(prefix="logstore-crash-"))
    status = kill(parsed.runs, seed, folder)
    if status == 0 and parsed.folder is None:
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
