"""The server of the demonstration, a program of its own: `python -m logstore.cli.demo.server CATALOGUE SOCKET_FD`.

An ordinary MCP server, but for two things: its tool takes a step when a number on stdin allows it, and it tells on
stdout, a JSON object a line, what its store holds. It ends when stdin does, so that it never outlives who started it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys

import msgspec
import uvicorn
from mcp.server.mcpserver import Context, MCPServer

from logstore.cli.demo.account import text_of
from logstore.errors import LogstoreError
from logstore.mcp import PersistentEventStore, resumable_http_app
from logstore.mcp.messages import decode
from logstore.mcp.scope import current_session
from logstore.storage import FLAG_FINAL, FLAG_PRIMING

RETRY_MS = 250
"""What the server tells clients to wait before they come back."""


class Ready(msgspec.Struct, tag=True):
    """The store is open, and whoever connects is served."""


class Refused(msgspec.Struct, tag=True):
    """The store cannot be opened."""

    reason: str


class Stored(msgspec.Struct, tag=True):
    """An event of the call is on disk."""

    event_id: str
    text: str


def counting_server(store: PersistentEventStore, allowed: asyncio.Semaphore, tasks: asyncio.TaskGroup) -> MCPServer:
    """Return a server whose tool counts, a step whenever it is allowed one, and reports each as progress."""
    server = MCPServer("demonstration")

    @server.tool()
    async def count(steps: int, ctx: Context) -> str:
        """Count, and report every step."""
        session = current_session.get()
        assert session is not None, "the server is behind the resume layer"
        # It may have no event yet that is stored: the tool need not wait for the disk.
        tasks.create_task(tell_what_is_stored(store, session.name_of(ctx.request_id)))
        for step in range(1, steps + 1):
            await allowed.acquire()
            await ctx.report_progress(step, steps, f"step {step}")
        return f"counted {steps} steps"

    return server


async def tell_what_is_stored(store: PersistentEventStore, stream: str) -> None:
    """Tell every event of a stream as it becomes readable, which is after it is on disk."""
    async for event in (await store.log()).follow(stream):
        if not event.flags & FLAG_PRIMING:
            _tell(Stored(event.event_id, text_of(decode(event))))
        if event.flags & FLAG_FINAL:
            return


async def obey(allowed: asyncio.Semaphore) -> None:
    """Allow as many steps as stdin says; end the process when stdin does."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        for _ in range(int(line)):
            allowed.release()
    # Not a shutdown, which waits for clients.
    os._exit(1)


async def serve(catalogue: str, listener: socket.socket) -> None:
    """Serve until the process is killed or its stdin ends."""
    async with PersistentEventStore(catalogue, durability="always") as store, asyncio.TaskGroup() as tasks:
        allowed = asyncio.Semaphore(0)
        tasks.create_task(obey(allowed))
        app = resumable_http_app(counting_server(store, allowed, tasks), store, retry_interval=RETRY_MS)
        # Not uvicorn's own settings of logging: they print to stdout.
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        _tell(Ready())
        await server.serve(sockets=[listener])


def _tell(what: Ready | Refused | Stored) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Serve as the command line says; a store that cannot be opened is told."""
    catalogue, socket_fd = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(serve(catalogue, socket.socket(fileno=int(socket_fd))))
    except LogstoreError as error:
        _tell(Refused(str(error)))


if __name__ == "__main__":
    main()
