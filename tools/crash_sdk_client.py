"""The campaign of the SDK's own client: within its limits every call is exact, whatever breaks and wherever it resumes.

Its limits are told in `logstore/docs/deploying.md`. A call gets either one abrupt cut, after its first event id has
reached the client, or several clean ends; meanwhile workers are restarted gracefully, one after the other, each taken
out of the balancer first, as in a rolling deployment. No worker is killed: that ends its calls, which is for the resume
campaign.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import httpx2
from mcp import Client, MCPError

# Run as a script, this folder is on the path and the checkout is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from crash_kill import BrokenPromiseError
from crash_resume import ResumeCampaign, comes_within
from tests.mcp.rig import Workers
from tests.mcp.rig_balancer import Balancer, How
from tests.mcp.rig_sdk_client import WatchedCall, Wire, sdk_client

_RETRY_MS: Final = 50
_DRAIN_S: Final = 25.0
"""A call has to wait for its cuts, on a busy machine for seconds, and a stop may not end it meanwhile."""
_STEPS: Final = (1, 20)
_CLEAN_ENDS: Final = (2, 5)
_PAUSE_S: Final = 0.01
"""How long after an event a connection is cut, at most; the next ones are on their way then."""
_ABRUPT: Final[tuple[How, ...]] = ("reset", "reset", "half")
_EARLY_ANSWERS: Final = 0.3
"""The share of the calls that may be answered before their last cut."""
_RESTART_PAUSE_S: Final = (0.3, 3.0)
_LOOK_AGAIN_S: Final = 0.002


@dataclass(frozen=True)
class Cut:
    """When a connection of a call is cut.

    Attributes:
        how: In which way.
        steps: How many more steps the tool may take now.
        ids: How many event ids of the call have to reach the client first, the priming event's included.
        pause_s: How long to wait after that.
    """

    how: How
    steps: int
    ids: int
    pause_s: float


@dataclass(frozen=True)
class Plan:
    """What is done with a call.

    Attributes:
        steps: How many steps it takes.
        cuts: One after the other.
        answered_early: Whether it may be answered before the last cut, which then may come too late.
    """

    steps: int
    cuts: Sequence[Cut]
    answered_early: bool

    @classmethod
    def drawn(cls, rng: random.Random) -> Plan:
        """Draw one abrupt cut or several clean ends."""
        steps = rng.randint(*_STEPS)
        count = 1 if rng.random() < 0.5 else rng.randint(*_CLEAN_ENDS)
        cuts: list[Cut] = []
        allowed, seen = 0, 1
        for _ in range(count):
            allowed, before = rng.randint(allowed, steps), allowed
            seen = rng.randint(seen, 1 + allowed)
            how = rng.choice(_ABRUPT) if count == 1 else "clean"
            cuts.append(Cut(how, allowed - before, seen, rng.choice((0.0, rng.uniform(0, _PAUSE_S)))))
        return cls(steps, cuts, rng.random() < _EARLY_ANSWERS)


class SdkRun:
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
        self._open: dict[str, WatchedCall] = {}
        self.waits: list[float] = []

    async def play(self, calls: int, clients: int) -> None:
        """Let the clients call while their connections are cut and the workers restarted.

        Raises:
            BrokenPromiseError: A promise was broken, in a group.
        """
        stopping = asyncio.Event()
        async with asyncio.TaskGroup() as breakers:
            breakers.create_task(self._restart(stopping))
            try:
                async with asyncio.TaskGroup() as people:
                    for number in range(clients):
                        people.create_task(self._person(number, calls // clients + (number < calls % clients)))
            finally:
                stopping.set()

    def under_way(self) -> list[str]:
        """Return what is known of the calls that are not over."""
        return [
            f"{call.label} ({len(call.ids)} events up to {call.ids[-1:]}, {len(call.reports)} reports; carried by "
            f"{[(carrier.connection.backend, carrier.connection.cut, carrier.over) for carrier in call.carriers]})"
            for call in self._open.values()
        ]

    async def _restart(self, stopping: asyncio.Event) -> None:
        """Restart one worker after the other, as is done without anybody noticing: first nothing new is sent there."""
        rng = random.Random(f"{self._seed} restart")
        while len(self._workers) > 1 and not await comes_within(stopping, rng.uniform(*_RESTART_PAUSE_S)):
            worker = self._workers[rng.randrange(len(self._workers))]
            self._balancer.towards(*(other.port for other in self._workers.others(worker)))
            # A connection that the worker has not accepted when it stops listening is reset, which kills a client.
            while any(each.backend == worker.port and not each.to_client for each in self._balancer.open):  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_AGAIN_S)
            await worker.restart()
            self._balancer.towards()
            self._figures["workers restarted"] += 1

    async def _person(self, number: int, calls: int) -> None:
        rng = random.Random(f"{self._seed} client {number}")
        try:
            async with sdk_client(self._balancer) as (client, wire):
                for turn in range(calls):
                    await self._call(client, wire, f"client{number}-call{turn}", Plan.drawn(rng))
        except* (MCPError, httpx2.HTTPError) as group:
            raise BrokenPromiseError(
                f"client {number} got {group.exceptions!r}, and nothing was broken then"
            ) from group

    async def _call(self, client: Client, wire: Wire, label: str, plan: Plan) -> None:
        """Call until a call was cut as planned; each that was not is exact, too."""
        least = min(len(plan.cuts), 2)
        call = await self._attempt(client, wire, label, plan)
        while call.cuts < least:
            self._figures["calls besides that were over before they were cut"] += 1
            plan, label = replace(plan, answered_early=False), f"{label}-again"
            call = await self._attempt(client, wire, label, plan)
        self._figures["calls"] += 1
        self._figures[f"calls with {'one abrupt cut' if least == 1 else 'several clean ends'}"] += 1

    async def _attempt(self, client: Client, wire: Wire, label: str, plan: Plan) -> WatchedCall:
        call = self._open[label] = wire.begin(label)
        began = _now()
        async with asyncio.TaskGroup() as tasks:
            breaking = tasks.create_task(self._break(wire, call, plan))
            arguments = {"to": plan.steps, "label": label}
            try:
                result = await client.call_tool("count", arguments, progress_callback=call.hear)
            except MCPError as error:
                raise BrokenPromiseError(f"{label} ended with {error!r}: {self.under_way()}") from error
            breaking.cancel()
        call.check(plan.steps, result)
        del self._open[label]
        self._count(call, _now() - began)
        return call

    def _count(self, call: WatchedCall, seconds: float) -> None:
        backends = [carrier.connection.backend for carrier in call.carriers]
        self._figures["exact results"] += 1
        self._figures["reports received"] += len(call.reports)
        self._figures["events received"] += len(call.ids)
        self._figures["resumes"] += len(backends) - 1
        elsewhere = sum(before != after for before, after in pairwise(backends))
        self._figures["resumes on another worker than before"] += elsewhere
        self._figures["milliseconds in calls"] += int(seconds * 1000)
        self.waits += [resume.wait_s for resume in call.carriers[1:] if resume.wait_s]

    async def _break(self, wire: Wire, call: WatchedCall, plan: Plan) -> None:
        """Let a call take its steps, and cut it meanwhile."""
        conductor = self._workers.conductor
        known = 0
        for cut in plan.cuts:
            conductor.allow(call.label, cut.steps)
            if plan.answered_early and cut is plan.cuts[-1]:
                conductor.allow_all(call.label)
            await wire.reached(carriers=known + 1, ids=cut.ids)
            await asyncio.sleep(cut.pause_s)
            known = len(call.carriers)
            if await self._was_cut(call, cut.how):
                await wire.reached(carriers=known + 1)
                call.cuts += 1
                self._figures[f"connections cut: {cut.how}"] += 1
        conductor.allow_all(call.label)

    async def _was_cut(self, call: WatchedCall, how: How) -> bool:
        """Cut what carries a call, if that is still within the limits of the client."""
        carrier = call.carriers[-1]
        if how != "clean" and len(call.carriers) > 1:
            # The end of its worker came first; the client does not get over an abrupt cut of a resumed connection.
            return False
        while not carrier.over:
            if await self._balancer.cut(how, lambda each: each is carrier.connection):
                return True
            # In the middle of a chunk.
            await asyncio.sleep(_LOOK_AGAIN_S)
        return False


def _now() -> float:
    return asyncio.get_running_loop().time()


SdkCampaign: Final = partial(ResumeCampaign, begin=SdkRun, retry_interval=_RETRY_MS, drain_s=_DRAIN_S)
"""A `ResumeCampaign` in which the SDK's client calls."""
