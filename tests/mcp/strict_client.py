"""A client that hides nothing: each request's stream as the server sends it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Self

import httpx2

PROTOCOL = "2025-11-25"


@dataclass
class Sse:
    """One event as it came over the wire; `message` is None for a priming event."""

    id: str | None = None
    message: dict[str, Any] | None = None


class Stream:
    """The events of one response, as they come."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sse:
        event, empty = Sse(), True
        async for line in self._lines:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "id":
                event.id, empty = value, False
            elif name == "data":
                event.message, empty = json.loads(value) if value else None, False
            elif not line and not empty:
                return event
        raise StopAsyncIteration

    async def rest(self) -> list[Sse]:
        """Return what is left until the server ends the stream."""
        return [event async for event in self]


class StrictClient:
    """One session with a server.

    Attributes:
        session_id: Given by the server.
    """

    def __init__(self, http: httpx2.AsyncClient, url: str, token: str | None) -> None:
        self._http = http
        self._url = url
        self._token = token
        self.session_id: str | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, port: int, token: str | None = None) -> AsyncGenerator[StrictClient, None]:
        """Open a session, with a bearer token where the server asks for one."""
        async with httpx2.AsyncClient(timeout=20) as http:
            client = cls(http, f"http://127.0.0.1:{port}/mcp", token)
            info = {"protocolVersion": PROTOCOL, "capabilities": {}, "clientInfo": {"name": "strict", "version": "1"}}
            async with client.request(0, "initialize", info) as stream:
                client.session_id = stream.response.headers["mcp-session-id"]
                await stream.rest()
            await client.notify("notifications/initialized")
            yield client

    @contextlib.asynccontextmanager
    async def request(self, request_id: int | str, method: str, params: dict[str, Any]) -> AsyncGenerator[Stream, None]:
        """POST a request and yield its stream."""
        body = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
        async with self._http.stream("POST", self._url, json=body, headers=self._headers()) as response:
            yield Stream(response)

    def call(
        self, request_id: int | str, tool: str, **arguments: Any
    ) -> contextlib.AbstractAsyncContextManager[Stream]:
        """Call a tool; its progress is asked for under the request's id."""
        params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": request_id}}
        return self.request(request_id, "tools/call", params)

    async def notify(self, method: str) -> None:
        """Send a notification."""
        body = {"jsonrpc": "2.0", "method": method}
        response = await self._http.post(self._url, json=body, headers=self._headers())
        assert response.status_code == 202

    def another(self) -> StrictClient:
        """Return a client without a session, over the same connections."""
        return StrictClient(self._http, self._url, self._token)

    def opened(self, method: str, body: bytes) -> contextlib.AbstractAsyncContextManager[httpx2.Response]:
        """Send whatever there is to send, and give the response as long as the block lasts."""
        headers = {"content-type": "application/json", **self._headers()}
        return self._http.stream(method, self._url, content=body, headers=headers)

    async def send(self, method: str, body: bytes) -> int:
        """Send whatever there is to send, and return the status."""
        async with self.opened(method, body) as response:
            return response.status_code

    @contextlib.asynccontextmanager
    async def resume(self, last_event_id: str | None) -> AsyncGenerator[Stream, None]:
        """GET a stream after an event, or the standalone one, and yield it."""
        headers = self._headers() | ({} if last_event_id is None else {"last-event-id": last_event_id})
        async with self._http.stream("GET", self._url, headers=headers) as response:
            yield Stream(response)

    async def end(self) -> int:
        """End the session; return the status."""
        return (await self._http.delete(self._url, headers=self._headers())).status_code

    def _headers(self) -> dict[str, str]:
        headers = {"accept": "application/json, text/event-stream", "mcp-protocol-version": PROTOCOL}
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token}"
        return headers | ({} if self.session_id is None else {"mcp-session-id": self.session_id})
