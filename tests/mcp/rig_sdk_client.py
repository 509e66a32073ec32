"""The SDK's own client, looked at: what carries its call, which events reach it, and what it makes of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult, TextContent

from tests.mcp.rig_balancer import Balancer, Connection
from tests.mcp.rig_client import BrokenRuleError

_TIMEOUT: Final = httpx2.Timeout(30, read=300)
"""As the SDK has it when it makes its own HTTP client."""


@asynccontextmanager
async def sdk_client(balancer: Balancer) -> AsyncGenerator[tuple[Client, Wire]]:
    """Open a session; its tools are listed, or a call might list them itself."""
    wire = Wire(balancer)
    url = f"http://127.0.0.1:{balancer.port}/mcp"
    async with (
        httpx2.AsyncClient(transport=wire, timeout=_TIMEOUT) as http,
        # Newer revisions of the protocol than this mode speaks have no resume.
        Client(streamable_http_client(url, http_client=http), mode="legacy") as client,
    ):
        await client.list_tools()
        yield client, wire


@dataclass(eq=False)
class Carrier:
    """A response that carries a call, or a part of it.

    Attributes:
        connection: What brings it.
        over: Whether the client has read it to its end, however that came, or closed it.
        wait_s: Seconds from the request to the first event; 0 without one.
    """

    connection: Connection
    over: bool = False
    wait_s: float = 0.0


@dataclass
class WatchedCall:
    """What came of a call of the tool `count`.

    Attributes:
        label: Its label.
        carriers: What carried it, one after the other: the first is the answer to its POST, the others resumes.
        ids: Every event id that reached the client, in order.
        reports: What its progress said, in order.
        cuts: How often it was cut on purpose, and then resumed.
    """

    label: str
    carriers: list[Carrier] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)
    cuts: int = 0

    async def hear(self, progress: float, total: float | None, message: str | None) -> None:
        """Take a report of progress."""
        self.reports.append(message or "")

    def check(self, steps: int, result: CallToolResult) -> None:
        """Check that each event and each report came once, in order, and the result is the exact one.

        Raises:
            BrokenRuleError: Something else came.
        """
        if self.reports != [f"{self.label} {step}" for step in range(1, steps + 1)]:
            raise BrokenRuleError(f"{self.label}: of {steps} reports these came: {self.reports}")
        if any(int(after) <= int(before) for before, after in pairwise(self.ids)):
            raise BrokenRuleError(f"{self.label}: these events came: {self.ids}")
        if len(self.ids) != steps + 2:
            raise BrokenRuleError(f"{self.label}: {len(self.ids)} events came, not {steps + 2}")
        texts = [content.text if isinstance(content, TextContent) else content for content in result.content]
        if result.is_error or texts != [f"{self.label} counted to {steps}"]:
            raise BrokenRuleError(f"{self.label}: the result is {result}")


class Wire(httpx2.AsyncBaseTransport):
    """The HTTP of one of the SDK's clients, looked at: what carries the call under way, and which ids have reached it.

    Only who sits here knows what a reset cannot take away any more.
    """

    def __init__(self, balancer: Balancer) -> None:
        # No idle connection is kept: where a server closes one as the next POST goes out on it, the client ends.
        self._http = httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_keepalive_connections=0))
        self._balancer = balancer
        self._call = WatchedCall("")
        self._changed = asyncio.Condition()

    def begin(self, label: str) -> WatchedCall:
        """Watch the call that comes next; one at a time."""
        self._call = WatchedCall(label)
        return self._call

    async def reached(self, *, carriers: int, ids: int = 0) -> None:
        """Wait until so many responses have carried the call under way, and so many ids have reached the client."""
        call = self._call
        async with self._changed:
            await self._changed.wait_for(lambda: len(call.carriers) >= carriers and len(call.ids) >= ids)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Pass a request on, and note what carries the call."""
        began = _now()
        response = await self._http.handle_async_request(request)
        if not self._carries_call(request):
            return response
        port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
        # The newest: a port may come again.
        connection = next(each for each in reversed(self._balancer.log) if each.client == port)
        call, carrier = self._call, Carrier(connection)
        call.carriers.append(carrier)
        await self._tell()

        async def take(event_id: str) -> None:
            carrier.wait_s = carrier.wait_s or _now() - began
            call.ids.append(event_id)
            await self._tell()

        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _WatchedStream(response.stream, carrier, take)
        return response

    async def aclose(self) -> None:
        """Close what is open."""
        await self._http.aclose()

    def _carries_call(self, request: httpx2.Request) -> bool:
        if request.method == "GET":
            # The standalone stream is not the call's.
            return request.headers.get("last-event-id") in self._call.ids
        return request.method == "POST" and json.loads(request.content).get("method") == "tools/call"

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class _WatchedStream(httpx2.AsyncByteStream):
    """The body of a response; the ids of its events are told when their last byte is about to be handed on."""

    def __init__(
        self, stream: httpx2.AsyncByteStream, carrier: Carrier, take: Callable[[str], Awaitable[None]]
    ) -> None:
        self._stream = stream
        self._carrier = carrier
        self._take = take

    async def __aiter__(self) -> AsyncIterator[bytes]:
        event_id, line_begun = "", b""
        try:
            async for data in self._stream:
                *lines, line_begun = (line_begun + data).split(b"\n")
                for line in lines:
                    name, _, value = line.rstrip(b"\r").partition(b":")
                    if name == b"id":
                        event_id = value.strip().decode()
                    elif not name and event_id:
                        await self._take(event_id)
                        event_id = ""
                yield data
        finally:
            self._carrier.over = True

    async def aclose(self) -> None:
        """Close what is open."""
        self._carrier.over = True
        await self._stream.aclose()


def _now() -> float:
    return asyncio.get_running_loop().time()
