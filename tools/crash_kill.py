"""The kill campaign: writing processes die at random moments, and everything is read back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import crash_writer
from crash_writer import DEADLINE_S, POLL_S, Call, Mark, Orders, mark_of, streams_of
from logstore.errors import LogstoreError
from logstore.storage import Log, LogOptions

_RUNS_A_STORE: Final = 10


class BrokenPromiseError(Exception):
    """A promise was broken."""


class Oracle:
    """What the writers of one store were told, and what was read from it.

    Attributes:
        acknowledged: Id of every acknowledged event, by its mark.
        shown: Mark of every event that was ever read, by id.
    """

    def __init__(self) -> None:
        self.acknowledged: dict[Mark, int] = {}
        self.shown: dict[int, Mark] = {}
        self._ids: dict[int, Mark] = {}
        self._last_calls: dict[tuple[int, int, int], Call] = {}

    def learn(self, report: Path) -> int:
        """Take up what a dead process acknowledged; return how many events."""
        learnt = 0
        for line in read_lines(report):
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

    def check(self, contents: Mapping[str, Sequence[tuple[int, bytes]]]) -> int:
        """Compare the ids and payloads of all streams; return how many events nobody had acknowledged.

        Raises:
            BrokenPromiseError: With what is wrong.
        """
        found: dict[Mark, int] = {}
        for stream, events in contents.items():
            found.update(self._check_stream(stream, events))
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


class Store:
    """One store under test, and what its writers were told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "store" / "events.db"
        self.reports = folder / "reports"
        self.reports.mkdir(parents=True)
        self.oracle = Oracle()

    async def verify(self, options: LogOptions) -> int:
        """Read everything back; return how many events there were that nobody had acknowledged.

        Raises:
            BrokenPromiseError: With what is wrong.
        """
        async with asyncio.timeout(DEADLINE_S), Log(self.path, options) as log:
            if log.health().status != "ok":
                raise BrokenPromiseError(f"after reopening: {log.health()}")
            contents = {
                stream: [event async for event in _all_events(log, stream)] for stream in streams_of(0) + streams_of(1)
            }
            others = self.oracle.check(contents)
            summaries = {summary.stream: summary.events for summary in log.stream_summaries()}
            if summaries != {stream: len(events) for stream, events in contents.items() if events}:
                raise BrokenPromiseError(f"the summaries say {summaries}, there are {Counter(self.oracle.shown)}")
            sample = list(itertools.islice(self.oracle.shown.items(), 0, None, max(1, len(self.oracle.shown) // 20)))
            for event_id, mark in sample:
                if (stream := await log.stream_of(str(event_id))) != mark.stream:
                    raise BrokenPromiseError(f"event {event_id} is said to be in {stream}: {mark}")
        return others


async def _all_events(log: Log, stream: str) -> AsyncIterator[tuple[int, bytes]]:
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
        self.report = Path(orders.oracle)
        self._errors = self.report.with_suffix(".stderr")
        with self._errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, crash_writer.__file__, json.dumps(dataclasses.asdict(orders))],
                stdin=subprocess.PIPE,
                stderr=stderr,
            )

    def wait_for(self, word: str) -> bool:
        """Return whether the process said a word, when it did or died.

        Raises:
            BrokenPromiseError: It did neither in time.
        """
        deadline = time.monotonic() + DEADLINE_S
        while word not in read_lines(self.report):
            if self._process.poll() is not None:
                return word in read_lines(self.report)
            if time.monotonic() > deadline:
                self.kill()
                raise BrokenPromiseError(f"no {word!r} from {self.report.name} within {DEADLINE_S:.0f} s")
            time.sleep(POLL_S)
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
            raise BrokenPromiseError(f"{self.report.name} ended with {self._process.returncode}:\n{errors}")


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
            self.figures["events acknowledged"] += store.oracle.learn(writer.report)
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
        shutil.rmtree(store.folder)

    def _orders(self, store: Store, rng: random.Random, run: int, process: int, *, dies: bool) -> Orders:
        return Orders(
            path=str(store.path),
            oracle=str(store.reports / f"{run:05d}-{process}"),
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
        self.figures["killed while opening"] += "ready" not in read_lines(first.report)
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
        self.figures["events read back"] += len(store.oracle.shown)
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
