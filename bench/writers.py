"""Tasks that store one event after another, as the SDK does in each session."""

from __future__ import annotations

import asyncio
import resource
import time
from array import array
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from mcp.server.streamable_http import EventMessage, EventStore
from mcp_types import JSONRPCNotification

from bench.messages import MESSAGE
from bench.percentiles import percentiles
from bench.turns import Figures

_TRIAL_EVENTS: Final = 64
_CHECKED_EVENTS: Final = 50
_DESCRIPTORS: Final = 8192
StreamOf = Callable[[int, int], str]
"""Names the stream of a writer's event: by number of the writer, and of the event."""


class Written(NamedTuple):
    """What writers did.

    Attributes:
        events: Events that were acknowledged.
        seconds: From the first call to the last acknowledgement.
        times_s: How long each event took from call to acknowledgement.
    """

    events: int
    seconds: float
    times_s: array[float]

    @property
    def figures(self) -> Figures:
        """Events a second, and percentiles of the times in microseconds."""
        return {"events_s": self.events / self.seconds, **percentiles(self.times_s)}


def row_of(writers: int) -> str:
    """Return the name of a row of results."""
    return "1 writer" if writers == 1 else f"{writers:,} writers"


def stream_a_writer(writer: int, event: int) -> str:
    """Give each writer one stream."""
    return f"writer-{writer}"


async def write(
    store: EventStore,
    writers: int,
    events: int,
    *,
    message: JSONRPCNotification = MESSAGE,
    stream_of: StreamOf = stream_a_writer,
) -> Written:
    """Store events and see to it that the last ones come back.

    Args:
        store: Where.
        writers: How many tasks.
        events: How many in all, a multiple of `writers`.
        message: What each event holds.
        stream_of: Which stream it goes to.

    Raises:
        RuntimeError: The store does not give back what it acknowledged.
    """
    times_s = array("d")
    ids: deque[str] = deque(maxlen=_CHECKED_EVENTS)

    async def one(writer: int) -> None:
        last = time.perf_counter()
        for number in range(events // writers):
            event_id = await store.store_event(stream_of(writer, number), message)
            now = time.perf_counter()
            times_s.append(now - last)
            last = now
            if writer == 0:
                ids.append(event_id)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for writer in range(writers):
            tasks.create_task(one(writer))
    seconds = time.perf_counter() - started
    if stream_of is stream_a_writer:
        await _expect(store, list(ids))
    return Written(events, seconds, times_s)


async def write_for(
    store: EventStore, writers: int, seconds: float, *, message: JSONRPCNotification = MESSAGE
) -> Written:
    """Store as many events as take about so long, by the time that a few take."""
    trial = await write(store, writers, max(1, _TRIAL_EVENTS // writers) * writers, message=message)
    a_writer = max(1, round(seconds * trial.events / trial.seconds / writers))
    return await write(store, writers, a_writer * writers, message=message)


def allow_connections() -> None:
    """Let this process have as many connections as there are writers."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, _DESCRIPTORS), most))


async def _expect(store: EventStore, ids: list[str]) -> None:
    found: list[str | None] = []

    async def collect(event: EventMessage) -> None:
        found.append(event.event_id)

    await store.replay_events_after(ids[0], collect)
    if found != ids[1:]:
        raise RuntimeError(f"the store acknowledged {ids[1:]} and gave back {found}")
