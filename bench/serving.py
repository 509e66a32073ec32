"""A server to measure, in a process of its own.

The SDK's HTTP server with one tool that reports progress three times and answers, which is five events a call. With the
store of a peer as the SDK takes it, with this store behind its resume layer, or with none.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.streamable_http import EventStore
from starlette.applications import Starlette

from bench.peers import PEERS
from logstore.mcp import resumable_http_app
from logstore.mcp.base import LogEventStore

NO_STORE: Final = "no store"
_REPORTS: Final = 3
_KEEP_ALIVE_S: Final = 3_600
"""A client waits while another server has its turn."""


def tool_server() -> MCPServer:
    """Return a server of the SDK with the tool."""
    server = MCPServer("bench")

    @server.tool()
    async def stroll(label: str, ctx: Context) -> str:
        for step in range(1, _REPORTS + 1):
            await ctx.report_progress(step, _REPORTS, f"{label} {step}")
        return f"{label} has arrived"

    return server


def app_for(store: EventStore | None) -> Starlette:
    """Return an app that keeps its events in a store, as that store is meant to be used."""
    if isinstance(store, LogEventStore):
        return resumable_http_app(tool_server(), store)
    return tool_server().streamable_http_app(event_store=store)


@asynccontextmanager
async def _opened(name: str, folder: Path) -> AsyncGenerator[EventStore | None]:
    if name == NO_STORE:
        yield None
        return
    async with PEERS[name].open(folder) as store:
        yield store


def serve(told: Connection, name: str, folder: Path) -> None:
    """Serve until a signal says otherwise; the port is told to whoever started this process."""
    logging.basicConfig(level=logging.WARNING)
    # uvicorn raises the signal again once it has ended: to die of that would leave what the store runs, such as Redis.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    asyncio.run(_serve(told, name, folder))


async def _serve(told: Connection, name: str, folder: Path) -> None:
    # Of its protocol TCP must be said here: without that asyncio lets small packets wait for an acknowledgement, 40 ms.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        async with _opened(name, folder) as store:
            config = uvicorn.Config(
                app_for(store), log_level="warning", timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=1
            )
            # The listener is open: who connects from here on is served.
            told.send(listener.getsockname()[1])
            await uvicorn.Server(config).serve(sockets=[listener])
