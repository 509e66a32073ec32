"""What the servers of the rig can do: tools whose every step a test allows, and tools that go by themselves."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any, Protocol

from fastmcp import Context as FastContext
from fastmcp import FastMCP
from fastmcp.server.auth.providers.jwt import StaticTokenVerifier
from mcp.server.auth.provider import AccessToken, TokenVerifier
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context, MCPServer
from pydantic import AnyHttpUrl, BaseModel

from tests.mcp.rig_orders import USERS, text_of_size


class Link:
    """The test's hold on the tools of this process: what they may do comes in, what they did goes out."""

    def __init__(self) -> None:
        self._allowed: dict[str, int] = {}
        self._changed = asyncio.Condition()
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self, port: int) -> asyncio.Task[None]:
        """Connect to the test; return the task that listens to it."""
        reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        return asyncio.create_task(self._listen(reader))

    def tell(self, what: str, **details: Any) -> None:
        """Say something to the test."""
        assert self._writer is not None
        self._writer.write(json.dumps({"what": what, "pid": os.getpid(), **details}).encode() + b"\n")

    async def step(self, label: str, step: int) -> None:
        """Wait until a call may take a step; steps count from 1."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._allowed.get(label, 0) >= step)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        async for line in reader:
            async with self._changed:
                self._allowed.update(json.loads(line))
                self._changed.notify_all()
        # The test is gone, and nobody would end this process.
        os._exit(1)


class _Session(Protocol):
    async def send_resource_updated(self, uri: str) -> None: ...


class _Context(Protocol):
    """What a tool may do with either framework's context."""

    @property
    def session(self) -> _Session: ...

    async def report_progress(self, progress: float, total: float | None, message: str | None) -> None: ...

    async def close_sse_stream(self) -> None: ...


class Answer(BaseModel):
    """What a user says when asked."""

    word: str


class Tools:
    """The tools, whatever the framework.

    Args:
        link: To the test.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    async def count(self, to: int, label: str, close_at: int, ctx: _Context) -> str:
        """Take each step when the test allows it, and report it as progress."""
        self._link.tell("started", label=label)
        for step in range(1, to + 1):
            await self._link.step(label, step)
            await ctx.report_progress(step, to, f"{label} {step}")
            self._link.tell("reported", label=label, steps=step)
            if step == close_at:
                await ctx.close_sse_stream()
                self._link.tell("closed", label=label)
        await self._link.step(label, to + 1)
        self._link.tell("finished", label=label)
        return f"{label} counted to {to}"

    async def stroll(self, to: int, label: str, pause_ms: float, told: bool, ctx: _Context) -> str:
        """Report steps at a pace of its own; the test is told of it if it wants that."""
        if told:
            self._link.tell("started", label=label)
        for step in range(1, to + 1):
            await asyncio.sleep(pause_ms / 1000)
            await ctx.report_progress(step, to, f"{label} {step}")
        return f"{label} counted to {to}"

    async def announce(self, to: int, label: str, ctx: _Context) -> str:
        """Send notifications on the standalone stream."""
        for step in range(1, to + 1):
            await ctx.session.send_resource_updated(f"note://{label}/{step}")
        return f"{label} announced {to}"

    @staticmethod
    def large(size: int, label: str) -> str:
        """Return much."""
        return text_of_size(label, size)

    @staticmethod
    def process(label: str = "") -> str:
        """Return the id of the process that serves the session."""
        return str(os.getpid())


def mcp_server(link: Link, *, auth: bool) -> MCPServer:
    """Return a server of the SDK with the tools."""
    options: dict[str, Any] = {}
    if auth:
        settings = AuthSettings(issuer_url=AnyHttpUrl("http://127.0.0.1"), resource_server_url=None)
        options = {"token_verifier": _Users(), "auth": settings}
    server, tools = MCPServer("rig", **options), Tools(link)

    @server.tool()
    async def count(to: int, label: str, ctx: Context, close_at: int = 0) -> str:
        return await tools.count(to, label, close_at, ctx)

    @server.tool()
    async def stroll(to: int, label: str, pause_ms: float, ctx: Context, told: bool = False) -> str:
        return await tools.stroll(to, label, pause_ms, told, ctx)

    @server.tool()
    async def announce(to: int, label: str, ctx: Context) -> str:
        return await tools.announce(to, label, ctx)

    @server.tool()
    async def ask(question: str, ctx: Context) -> str:
        answer = await ctx.elicit(question, Answer)
        return answer.data.word if answer.action == "accept" else answer.action

    server.tool()(tools.large)
    server.tool()(tools.process)
    return server


def fastmcp_server(link: Link, *, auth: bool) -> FastMCP[None]:
    """Return a FastMCP server with the tools."""
    verifier = StaticTokenVerifier({user: {"client_id": user, "sub": user} for user in USERS})
    server: FastMCP[None] = FastMCP("rig", auth=verifier if auth else None)
    tools = Tools(link)

    @server.tool
    async def count(to: int, label: str, ctx: FastContext, close_at: int = 0) -> str:
        return await tools.count(to, label, close_at, ctx)

    @server.tool
    async def stroll(to: int, label: str, pause_ms: float, ctx: FastContext, told: bool = False) -> str:
        return await tools.stroll(to, label, pause_ms, told, ctx)

    @server.tool
    async def announce(to: int, label: str, ctx: FastContext) -> str:
        return await tools.announce(to, label, ctx)

    @server.tool
    async def ask(question: str, ctx: FastContext) -> str:
        answer = await ctx.elicit(question, Answer)
        return answer.data.word if answer.action == "accept" else answer.action

    server.tool(tools.large)
    server.tool(tools.process)
    return server


class _Users(TokenVerifier):
    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id=token, scopes=[], subject=token) if token in USERS else None
