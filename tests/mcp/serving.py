"""A real server in this process, a client's connection that can be cut, and what both need."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator
from typing import Any

import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from starlette.applications import Starlette

from logstore.mcp.base import LogEventStore
from logstore.storage import FLAG_FINAL

DEADLINE_S = 20.0


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@contextlib.asynccontextmanager
async def served(app: Starlette) -> AsyncGenerator[int, None]:
    """Serve an app on a free port; yield the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    port: int = listener.getsockname()[1]
    server = _Server(uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=2))
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(sockets=[listener]))
        up = tasks.create_task(server.up.wait())
        await asyncio.wait({serving, up}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        assert server.started
        try:
            yield port
        finally:
            server.should_exit = True
    listener.close()


class Relay:
    """Passes bytes between a client and a server until it is told to cut.

    Attributes:
        port: Where the client connects to.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self._target = target
        self._open: set[asyncio.StreamWriter] = set()
        self._passing = asyncio.Event()
        self._passing.set()

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, port: int) -> AsyncGenerator[Relay, None]:
        """Open a relay to a port of this machine."""
        relay = cls(port)
        server = await asyncio.start_server(relay._accept, "127.0.0.1", 0)
        relay.port = server.sockets[0].getsockname()[1]
        try:
            yield relay
        finally:
            server.close()
            relay.cut()
            await server.wait_closed()

    def cut(self) -> None:
        """Break every connection, as a network does: a reset, no goodbye."""
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    def hold(self) -> None:
        """Let nobody through who connects from here on."""
        self._passing.clear()

    def release(self) -> None:
        """Let those through who waited."""
        self._passing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._passing.wait()
        try:
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, back_writer}
        with contextlib.suppress(OSError):
            await asyncio.gather(_pass_on(reader, back_writer), _pass_on(back_reader, writer))
        self._open -= {writer, back_writer}
        for end in (writer, back_writer):
            end.close()
            with contextlib.suppress(OSError):
                await end.wait_closed()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()


class Steps:
    """A tool's progress, one step at a time, as a test allows."""

    def __init__(self) -> None:
        self._allowed = asyncio.Semaphore(0)
        self.done = 0
        self._changed = asyncio.Condition()

    def allow(self, steps: int) -> None:
        """Let the tool report so many more steps."""
        for _ in range(steps):
            self._allowed.release()

    async def next(self) -> None:
        """Wait until another step is allowed; called by the tool."""
        await self._allowed.acquire()

    async def reported(self) -> None:
        """Say that a step was reported; called by the tool."""
        async with self._changed:
            self.done += 1
            self._changed.notify_all()

    async def until(self, done: int) -> None:
        """Wait until the tool has reported so many steps."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.done >= done)


def counting_server(steps: Steps, **options: Any) -> MCPServer:
    """Return a server with a tool that counts in steps and reports each as progress."""
    server = MCPServer("counting", **options)

    @server.tool()
    async def count(to: int, label: str, ctx: Context) -> str:
        """Count."""
        for step in range(1, to + 1):
            await steps.next()
            await ctx.report_progress(step, to, f"{label} {step}")
            await steps.reported()
        return f"{label} counted to {to}"

    return server


async def response_stored(store: LogEventStore) -> None:
    """Wait until the stream that was written last has its response."""
    stats = store.get_stream_stats()
    newest = max(stats, key=lambda name: int(stats[name]["last_event_id"]))
    async for event in (await store.log()).follow(newest):
        if event.flags & FLAG_FINAL:
            break


class Progress:
    """What a client was told, and a way to wait for it."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._changed = asyncio.Condition()

    async def __call__(self, progress: float, total: float | None, message: str | None) -> None:
        async with self._changed:
            self.seen.append(message or "")
            self._changed.notify_all()

    async def until(self, count: int) -> None:
        """Wait until so many reports came."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.seen) >= count)
