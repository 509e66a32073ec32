"""The story of one call, scene by scene.

A third of the steps is sent while all is well, a third while the client is away, the rest after it came back. The tool
takes no step that was not allowed, so each event is where the story says it is, on any machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mcp import Client
from mcp.server.streamable_http import EventMessage

from logstore.cli.demo import look, page
from logstore.cli.demo.account import Entry, problems_in, text_of
from logstore.cli.demo.caller import Caller
from logstore.cli.demo.growing import StandstillError
from logstore.cli.demo.process import ServerProcess
from logstore.cli.demo.relay import Relay
from logstore.mcp import PersistentEventStore

_MOST_ROWS_A_PART: Final = 4


@dataclass(frozen=True)
class Plan:
    """What is sent when.

    Attributes:
        folder: Where everything lies.
        steps: Progress reports in all, 3 or more; the first is step 1.
    """

    folder: Path
    steps: int

    @property
    def catalogue(self) -> Path:
        """The path of the store."""
        return self.folder / "events.db"

    @property
    def cut_after(self) -> int:
        """The last step that the client sees before the cut."""
        return self.steps // 3

    @property
    def back_after(self) -> int:
        """The last step that is sent while the client is away."""
        return self.steps * 2 // 3

    @property
    def texts(self) -> list[str]:
        """What the events of the call say, in order."""
        return [*(f"step {step}" for step in range(1, self.steps + 1)), f"counted {self.steps} steps"]

    @property
    def texts_again(self) -> list[str]:
        """What the events of the second call say, in order."""
        return ["step 1", "counted 1 steps"]


async def tell(plan: Plan) -> list[str]:
    """Play and tell all scenes; return what is wrong.

    Raises:
        StandstillError: Something did not come.
    """
    caller, again = Caller(), Caller()
    page.heading("1. Two servers over one store, and a client")
    async with _server(plan) as server, _server(plan) as other:
        async with _connected(plan, server, other) as (relay, client):
            async with _calling(client, caller, plan.steps) as call:
                await _cut(plan, server, relay, caller)
                await _return(plan, server, other, relay, caller)
                await _finish(plan, server, caller, call)
            await _restart(plan, (server, other), relay, client, again)
        page.line("It could not close or flush anything. What it left on disk:")
        look.show_files(plan.catalogue)
    page.heading("6. Another process opens the store and replays the first call from disk")
    on_disk = await _replay(plan, caller)
    page.heading("7. Where it lies now")
    look.show_files(plan.catalogue)
    page.line()
    look.show_index(plan.catalogue, caller.event_ids.items[plan.cut_after])
    witnesses = {"server": server.stored.items, "client": caller.entries(), "disk": on_disk}
    return problems_in(plan.texts, witnesses) + problems_in(plan.texts_again, {"client, again": again.entries()})


def _server(plan: Plan) -> contextlib.AbstractAsyncContextManager[ServerProcess]:
    return ServerProcess.started(plan.catalogue, plan.folder / "server.log")


@contextlib.asynccontextmanager
async def _connected(plan: Plan, server: ServerProcess, other: ServerProcess) -> AsyncGenerator[tuple[Relay, Client]]:
    async with (
        Relay.to(server.port) as relay,
        # Newer revisions of the protocol than this mode speaks have no resume.
        Client(f"http://127.0.0.1:{relay.port}/mcp", mode="legacy") as client,
    ):
        sdk = importlib.metadata.version("mcp")
        page.fact(
            "servers",
            f"MCP SDK {sdk} and uvicorn, process {server.pid}, port {server.port}",
            f"another one, process {other.pid}, port {other.port}",
        )
        page.fact("store", str(plan.catalogue), "durability always: an event is on disk before it is sent")
        page.fact("client", f"the SDK's, through a relay on port {relay.port} that can cut and redirect")
        page.fact("logs", "server.log and client.log beside the store")
        # The first call would ask for the tools by itself, and be two requests.
        await client.list_tools()
        yield relay, client


@contextlib.asynccontextmanager
async def _calling(client: Client, caller: Caller, steps: int) -> AsyncGenerator[asyncio.Task[None]]:
    call = asyncio.create_task(caller.call(client.session, steps))
    try:
        yield call
    finally:
        call.cancel()
        # Why it failed is known from what did not come, or there is a better reason.
        with contextlib.suppress(asyncio.CancelledError, StandstillError):
            await call


async def _cut(plan: Plan, server: ServerProcess, relay: Relay, caller: Caller) -> None:
    page.heading(f"2. A tool call with {plan.steps} progress reports loses its connection")
    page.line(f"So that nothing depends on timing, the tool pauses after steps {plan.cut_after} and {plan.back_after}.")
    await server.allow(plan.cut_after)
    await _received(caller, plan.cut_after)
    page.fact("client", f"receives {page.span(1, plan.cut_after)}")
    relay.cut()
    page.fact("relay", f"resets the client's {relay.cuts} TCP connections, and lets nobody through")
    await server.allow(plan.back_after - plan.cut_after)
    await server.stored.reaches(plan.back_after)
    page.fact(
        "server",
        f"goes on and stores {page.span(plan.cut_after + 1, plan.back_after)}; "
        f"the client still knows {len(caller.texts.items)}",
    )


async def _return(plan: Plan, server: ServerProcess, other: ServerProcess, relay: Relay, caller: Caller) -> None:
    page.heading("3. The client comes back, and arrives at the other server")
    relay.redirect(other.port)
    relay.let_through()
    await relay.resumes.reaches(1)
    resume = relay.resumes.items[0]
    last = dict(server.stored.items).get(resume.last_event_id, "an event that was not stored")
    page.fact("client", f"asks: GET with Last-Event-ID {resume.last_event_id}, which is {last}")
    await _received(caller, plan.back_after)
    took_ms = (time.monotonic() - resume.at) * 1000
    page.fact("other", f"replays {page.span(plan.cut_after + 1, plan.back_after)} within {took_ms:.0f} ms")


async def _finish(plan: Plan, server: ServerProcess, caller: Caller, call: asyncio.Task[None]) -> None:
    await server.allow(plan.steps - plan.back_after)
    await server.stored.reaches(plan.steps + 1)
    # Not until so many messages came: one of them may have come twice, or never.
    await caller.texts.ends()
    await call
    await caller.event_ids.reaches(len(caller.texts.items) + 1)
    page.fact("client", f"receives {page.span(plan.back_after + 1, plan.steps)} and the result, live again")


async def _restart(
    plan: Plan, servers: tuple[ServerProcess, ServerProcess], relay: Relay, client: Client, again: Caller
) -> None:
    page.heading("4. Both servers are killed with SIGKILL, and one is started again")
    for server in servers:
        await server.kill()
    async with _server(plan) as started:
        relay.redirect(started.port)
        page.fact("server", f"process {started.pid}, port {started.port}, knows nothing but what is on disk")
        async with _calling(client, again, 1) as call:
            await started.allow(1)
            await call
            await again.event_ids.reaches(len(plan.texts_again) + 1)
        page.fact("client", f"calls the tool in the session that process {servers[0].pid} had opened,")
        page.fact("", "and receives step 1 and the result, without initializing again")
        page.heading("5. This server is killed, too")
        await started.kill()


async def _received(caller: Caller, events: int) -> None:
    await caller.texts.reaches(events)
    # One more: the first is that of the priming event.
    await caller.event_ids.reaches(events + 1)


async def _replay(plan: Plan, caller: Caller) -> list[Entry]:
    on_disk: list[Entry] = []

    async def collect(event: EventMessage) -> None:
        on_disk.append(Entry(str(event.event_id), text_of(event.message)))

    started = time.monotonic()
    async with PersistentEventStore(plan.catalogue) as store:
        opened = time.monotonic()
        await store.replay_events_after(caller.event_ids.items[0], collect)
        replayed = time.monotonic()
    page.line(
        f"Recovered and opened in {(opened - started) * 1000:.0f} ms, replayed in {(replayed - opened) * 1000:.0f} ms:"
    )
    _show_events(plan, on_disk)
    return on_disk


def _show_events(plan: Plan, events: list[Entry]) -> None:
    rows: list[tuple[str, str, str]] = []
    bounds = (0, plan.cut_after, plan.back_after, len(events))
    for first, last, how in zip(
        bounds, bounds[1:], ("live", "missed, replayed", "live, after the resume"), strict=False
    ):
        part = [(entry.event_id, entry.text, how) for entry in events[first:last]]
        if len(part) > _MOST_ROWS_A_PART:
            part = [part[0], (f"... {len(part) - 2} more", "...", how), part[-1]]
        rows += part
    page.table(rows, ("event id", "says", "reached the client"))
