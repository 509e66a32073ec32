"""The resume campaign: many clients over many workers, while connections are cut and workers are killed.

Every call ends with its exact result, or the error of a worker that died; every report of progress comes once and in
order; every session outlives the worker that served it. Only a call that was cut off before its first event id, when
there is nothing to resume it with, ends without an answer.
"""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

# Run as a script, this folder is on the path and the checkout is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from crash_kill import BrokenPromiseError
from logstore.ops.verify.store import verify
from tests.mcp.rig import RigError, Workers
from tests.mcp.rig_balancer import Balancer, How
from tests.mcp.rig_client import Account, BrokenRuleError, Call, StubbornClient, check_counted
from tests.mcp.rig_orders import text_of_size

_CUT_PAUSE_S: Final = (0.1, 0.5)
_KILL_PAUSE_S: Final = (1.5, 4.0)
_DOWN_S: Final = (0.0, 0.5)
_HOWS: Final[tuple[How, ...]] = ("reset", "reset", "reset", "reset", "clean", "clean", "half")
_MOST_CUT: Final = 12
_LEAST_LIMIT_S: Final = 120.0
_LIMIT_A_CALL_S: Final = 0.5
_LISTENERS: Final = 5
"""Clients that also read their standalone stream, on which some of their calls announce things."""
_MEMORY_S: Final = 2.0
"""How long after a worker's death something may still come of it."""
_DEATH: Final = re.compile(r"worker|process|server (was|is|has)", re.IGNORECASE)
"""What the error of a call says whose worker died."""


class Play(Protocol):
    """What clients do in a run, and what breaks meanwhile.

    Attributes:
        waits: Seconds from each resume to its first event.
    """

    waits: list[float]

    async def play(self, calls: int, clients: int) -> None:
        """Do it."""
        ...

    def under_way(self) -> list[str]:
        """Return what is known of the calls that are not over."""
        ...


class ResumeCampaign:
    """Runs clients against workers, and breaks what is between and behind.

    Args:
        folder: Where the stores go.
        seed: What everything is drawn from.
        calls: How many calls, of all clients together.
        clients: How many clients.
        workers: How many workers.
        begin: Makes what is played, of the workers, the balancer, a seed and the figures; `Run` if None.
        **orders: As in `Workers.running`.

    Attributes:
        figures: What was counted.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        calls: int,
        clients: int,
        workers: int,
        begin: Callable[[Workers, Balancer, str, Counter[str]], Play] | None = None,
        **orders: Any,
    ) -> None:
        self.figures: Counter[str] = Counter()
        self._begin = begin or Run
        self._orders = orders
        self._folder = folder
        self._seed = seed
        self._calls = calls
        self._clients = clients
        self._workers = workers

    def run(self, number: int) -> None:
        """Do one run, over a store of its own.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        path = self._folder / f"{number:03d}" / "events.db"
        try:
            asyncio.run(self._run(path, f"{self._seed} {number}"))
        except (BrokenRuleError, RigError) as error:
            raise BrokenPromiseError(str(error)) from error
        except ExceptionGroup as group:
            broken, _ = group.split((BrokenRuleError, BrokenPromiseError, RigError))
            if broken is None:
                raise
            raise BrokenPromiseError("; ".join(str(error) for error in _leaves(broken))) from group
        report = verify(path)
        if not report.ok:
            raise BrokenPromiseError(f"verify finds something wrong with the store: {report}")

    def finish(self) -> None:
        """Nothing is left over from one run to the next."""

    async def _run(self, path: Path, seed: str) -> None:
        limit_s = max(_LEAST_LIMIT_S, self._calls * _LIMIT_A_CALL_S)
        async with (
            Workers.running(path, self._workers, **self._orders) as workers,
            Balancer.over(workers.ports) as balancer,
        ):
            run = self._begin(workers, balancer, seed, self.figures)
            try:
                async with asyncio.timeout(limit_s):
                    await run.play(self._calls, self._clients)
            except TimeoutError:
                raise BrokenPromiseError(f"not done in {limit_s} s; still under way: {run.under_way()}") from None
            if run.waits:
                median_ms = statistics.median(run.waits) * 1000
                self.figures["median ms from a resume to its first event"] = round(median_ms)


class Run:
    """One run.

    Args:
        workers: Who serves.
        balancer: Before them.
        seed: What everything is drawn from.
        figures: What is counted.

    Attributes:
        waits: Seconds from each resume to its first event.
    """

    def __init__(self, workers: Workers, balancer: Balancer, seed: str, figures: Counter[str]) -> None:
        self._workers = workers
        self._balancer = balancer
        self._seed = seed
        self._figures = figures
        self._open: dict[str, Call] = {}
        self.waits: list[float] = []
        self._deaths: list[tuple[float, int]] = []

    async def play(self, calls: int, clients: int) -> None:
        """Open the sessions, let the clients call while things break, and have each call once more in peace.

        Raises:
            BrokenPromiseError: A promise was broken.
            BrokenRuleError: One of those of the protocol.
        """
        people = [await StubbornClient.connected(self._balancer.port) for _ in range(clients)]
        async with self._breaking(), asyncio.TaskGroup() as tasks:
            for number, client in enumerate(people):
                share = calls // clients + (number < calls % clients)
                tasks.create_task(self._person(client, number, share))
        for number, client in enumerate(people):
            call = await client.call("stroll", f"last-{number}", to=2, pause_ms=0)
            check_counted(call, 2, f"last-{number} counted to 2")
            if call.result is None:
                raise BrokenPromiseError(f"the session of client {number} is broken: {call.error}")
        self._figures["sessions that outlived it all"] += len(people)

    def under_way(self) -> list[str]:
        """Return what is known of the calls that are not over."""
        return [
            f"{call.name} (request {call.request_id}, {call.resumes} resumes, last id {call.ids[-1:]})"
            for call in self._open.values()
        ]

    @asynccontextmanager
    async def _breaking(self) -> AsyncGenerator[None]:
        """Cut connections and kill workers meanwhile; in the end all workers run."""
        stopping = asyncio.Event()
        async with asyncio.TaskGroup() as breakers:
            breakers.create_task(self._cut(stopping))
            breakers.create_task(self._kill(stopping))
            try:
                yield
            finally:
                stopping.set()

    async def _cut(self, stopping: asyncio.Event) -> None:
        rng = random.Random(f"{self._seed} cut")
        while not await comes_within(stopping, rng.uniform(*_CUT_PAUSE_S)):
            how = rng.choice(_HOWS)
            share = rng.random() ** 2
            victims = [connection for connection in self._balancer.open if rng.random() < share][:_MOST_CUT]
            cut = await self._balancer.cut(how, victims.__contains__)
            self._figures[f"connections cut: {how}"] += len(cut)

    async def _kill(self, stopping: asyncio.Event) -> None:
        rng = random.Random(f"{self._seed} kill")
        while not await comes_within(stopping, rng.uniform(*_KILL_PAUSE_S)):
            worker = self._workers[rng.randrange(len(self._workers))]
            # Before: its connections may be seen to end before this process hears that it has ended.
            self._deaths.append((_now(), worker.port))
            await worker.kill()
            self._figures["workers killed"] += 1
            await asyncio.sleep(rng.uniform(*_DOWN_S))
            await worker.start()

    async def _person(self, client: StubbornClient, number: int, calls: int) -> None:
        rng = random.Random(f"{self._seed} client {number}")
        notes = Account(f"notes of client {number}")
        listening = asyncio.create_task(client.listen(notes)) if number < _LISTENERS else None
        announced: list[Call] = []
        for turn in range(calls):
            label = f"client{number}-call{turn}"
            kind = rng.random()
            began = _now()
            if listening is not None and kind < 0.3:
                announced.append(await self._call(client, label, "announce", 1 + rng.randrange(5)))
            elif kind > 0.95:
                await self._call(client, label, "large", rng.randrange(200_000))
            else:
                await self._call(client, label, "stroll", rng.randrange(30), rng.uniform(1, 40))
            self._figures["milliseconds in calls"] += int((_now() - began) * 1000)
        if listening is not None:
            await self._check_notes(client, notes, listening, announced)

    async def _call(self, client: StubbornClient, label: str, tool: str, size: int, pause_ms: float = 0.0) -> Call:
        began = _now()
        call = self._open[label] = client.begin(label)
        if tool == "large":
            await client.run(call, tool, size=size)
            check_counted(call, 0, text_of_size(label, size))
        elif tool == "announce":
            await client.run(call, tool, to=size)
            check_counted(call, 0, f"{label} announced {size}")
        else:
            await client.run(call, tool, to=size, pause_ms=pause_ms)
            check_counted(call, size, f"{label} counted to {size}")
        del self._open[label]
        self._account_for(call, began)
        return call

    def _account_for(self, call: Call, began: float) -> None:
        self._figures["calls"] += 1
        self._figures["events received"] += len(call.ids)
        self._figures["resumes"] += call.resumes
        self.waits += call.waits
        if call.result is not None:
            self._figures["exact results"] += 1
        elif call.error is not None:
            self._figures[f"errors: {call.error['message'][:90]}"] += 1
            if not _DEATH.search(call.error["message"]) or not self._died(began):
                raise BrokenPromiseError(f"{call.name} ended with {call.error}, and no worker had died")
        else:
            self._figures[f"without an answer: {self._reason(call, began)}"] += 1

    def _reason(self, call: Call, began: float) -> str:
        """Return why a call ended before its first event id.

        Raises:
            BrokenPromiseError: Nothing was broken on purpose.
        """
        connection = next((each for each in self._balancer.log if each.tag == call.tags[0]), None)
        if connection is None or connection.cut:
            # Without one, it was cut before the balancer had read the request.
            return "cut before the first id"
        if any(port == connection.backend for port in self._died(began)):
            # Nobody was left to say so: its connections ended with it.
            return "the worker that it was sent to died before the first id"
        raise BrokenPromiseError(f"{call.name} ended without an answer, and nothing was cut: {connection}")

    def _died(self, since: float) -> list[int]:
        """Return the ports of the workers that died since a time, or so short before that it may still show."""
        return [port for dead, port in self._deaths if dead > since - _MEMORY_S]

    async def _check_notes(
        self, client: StubbornClient, notes: Account, listening: asyncio.Task[None], announced: list[Call]
    ) -> None:
        """Check that from the first that came on, nothing that was announced is missing."""
        if notes.texts:
            # Whatever else is under way comes before this one.
            label = _end_label(notes)
            while f"note://{label}/1" not in notes.texts:
                await client.call("announce", label, to=1)
        listening.cancel()
        await asyncio.wait({listening})
        if not listening.cancelled():
            listening.result()
        self._figures["notes received"] += len(notes.texts)
        check_notes(notes, announced)


def check_notes(notes: Account, announced: list[Call]) -> None:
    """Check a standalone stream: each note once, and in order, and none missing from the first that came on.

    Of a call that ended with an error, the last ones may be.

    Raises:
        BrokenPromiseError: Something else came.
    """
    came: dict[str, list[int]] = {}
    for text in notes.texts:
        label, _, step = text.removeprefix("note://").rpartition("/")
        came.setdefault(label, []).append(int(step))
    if unknown := came.keys() - {call.name for call in announced} - {_end_label(notes)}:
        raise BrokenPromiseError(f"{notes.name}: nobody of this session announced {unknown}")
    first = next(iter(came), None)
    begun = False
    for call in announced:
        steps = came.get(call.name, [])
        begun = begun or call.name == first
        start = steps[0] if steps and call.name == first else 1
        if steps != list(range(start, start + len(steps))):
            raise BrokenPromiseError(f"{notes.name}: of {call.name} came {steps}")
        if begun and call.result is not None and start + len(steps) - 1 != int(call.text.rpartition(" ")[2]):
            raise BrokenPromiseError(f"{notes.name}: of {call.name} came {steps}, and it {call.text}")


def _end_label(notes: Account) -> str:
    return f"end-of-{notes.name.replace(' ', '-')}"


async def comes_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait so long for an event; return whether it came."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def _now() -> float:
    return asyncio.get_running_loop().time()
