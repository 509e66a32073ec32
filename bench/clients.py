"""Clients that load a server: as little work as can be, since they share the machine with it."""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

PROTOCOL: Final = "2025-11-25"


class Client:
    """One session with a server, over one kept connection."""

    def __init__(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._port = port
        self._reader = reader
        self._writer = writer
        self._session = ""
        self._number = 0

    @classmethod
    @asynccontextmanager
    async def connected(cls, port: int) -> AsyncGenerator[Client]:
        """Open a session."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        client = cls(port, reader, writer)
        try:
            info = {"protocolVersion": PROTOCOL, "capabilities": {}, "clientInfo": {"name": "bench", "version": "1"}}
            head, _ = await client._post({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": info})
            client._session = head["mcp-session-id"]
            await client._post({"jsonrpc": "2.0", "method": "notifications/initialized"})
            yield client
        finally:
            writer.close()
            await writer.wait_closed()

    async def call(self) -> int:
        """Call the tool, asking for its progress, and return how many messages came.

        Raises:
            RuntimeError: The call did not end with a result.
        """
        self._number += 1
        params = {
            "name": "stroll",
            "arguments": {"label": "n"},
            "_meta": {"progressToken": self._number},
        }
        body = {"jsonrpc": "2.0", "id": self._number, "method": "tools/call", "params": params}
        _, data = await self._post(body)
        if b'"result"' not in data:
            raise RuntimeError(f"a call ended with {data[-300:]!r}")
        return data.count(b'"jsonrpc"')

    async def _post(self, body: dict[str, Any]) -> tuple[dict[str, str], bytes]:
        content = json.dumps(body).encode()
        head = (
            f"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\ncontent-type: application/json\r\n"
            f"accept: application/json, text/event-stream\r\ncontent-length: {len(content)}\r\n"
        )
        if self._session:
            head += f"mcp-session-id: {self._session}\r\nmcp-protocol-version: {PROTOCOL}\r\n"
        self._writer.write(head.encode() + b"\r\n" + content)
        status, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        data = await self._body(headers)
        if status.split(" ")[1] not in ("200", "202"):
            raise RuntimeError(f"{status}: {data[:300]!r}")
        return headers, data

    async def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return await self._reader.readexactly(int(headers.get("content-length", "0")))
        pieces: list[bytes] = []
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            pieces.append((await self._reader.readexactly(size + 2))[:-2])
        await self._reader.readexactly(2)
        return b"".join(pieces)


async def make_calls(clients: list[Client], calls: int) -> array[float]:
    """Make calls, each client one after another; return how long each took, in seconds."""
    times_s = array("d")

    async def one(client: Client) -> None:
        for _ in range(calls // len(clients)):
            began = time.perf_counter()
            await client.call()
            times_s.append(time.perf_counter() - began)

    async with asyncio.TaskGroup() as tasks:
        for client in clients:
            tasks.create_task(one(client))
    return times_s
