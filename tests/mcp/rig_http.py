"""One HTTP request on a connection of its own, by hand: nothing is retried, and a cut is told from an end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Self

from tests.mcp.strict_client import Sse


class BrokenConnectionError(Exception):
    """The connection ended before the response did."""


class Exchange:
    """A response as it comes.

    Attributes:
        status: HTTP status.
        headers: By lower-case name.
    """

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._reader = reader
        self._lines: list[bytes] = []
        self._partial = b""
        self._over = False

    @classmethod
    @contextlib.asynccontextmanager
    async def begun(
        cls, port: int, verb: str, headers: Mapping[str, str], body: Any = None, path: str = "/mcp"
    ) -> AsyncGenerator[Exchange]:
        """Send a request, with a body in JSON; yield when the response's headers are there.

        Raises:
            BrokenConnectionError: They never came; also when raised inside.
        """
        content = b"" if body is None else json.dumps(body).encode()
        lines = {"host": f"127.0.0.1:{port}", "connection": "close", "content-length": str(len(content)), **headers}
        if content:
            lines["content-type"] = "application/json"
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        except OSError as error:
            raise BrokenConnectionError(str(error)) from None
        try:
            writer.write(f"{verb} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + content)
            exchange = cls(reader)
            await exchange._read_head()
            yield exchange
        finally:
            # However it ends, the server sees at once that nobody listens.
            writer.transport.abort()

    @property
    def is_stream(self) -> bool:
        """Whether events come."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sse:
        """Return the next whole event.

        Raises:
            StopAsyncIteration: The server ended the response.
            BrokenConnectionError: The connection ended.
        """
        while True:
            if b"" in self._lines:
                end = self._lines.index(b"")
                block, self._lines = self._lines[:end], self._lines[end + 1 :]
                if event := _event_of(block):
                    return event
                continue
            piece = await self._piece()
            if piece is None:
                raise StopAsyncIteration
            *lines, self._partial = (self._partial + piece).split(b"\n")
            self._lines += [line.removesuffix(b"\r") for line in lines]

    async def rest(self) -> list[Sse]:
        """Return the events up to the end that the server makes."""
        return [event async for event in self]

    async def body(self) -> bytes:
        """Return the whole body."""
        pieces = []
        while (piece := await self._piece()) is not None:
            pieces.append(piece)
        return b"".join(pieces)

    async def _read_head(self) -> None:
        head = await self._take(self._reader.readuntil(b"\r\n\r\n"))
        status, *lines = head.decode("latin-1").rstrip().split("\r\n")
        self.status = int(status.split(" ")[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    async def _piece(self) -> bytes | None:
        if self._over:
            return None
        if self.headers.get("transfer-encoding") != "chunked":
            self._over = True
            return await self._take(self._reader.readexactly(int(self.headers.get("content-length", "0"))))
        size = int(await self._take(self._reader.readuntil(b"\r\n")), 16)
        data = await self._take(self._reader.readexactly(size + 2))
        self._over = size == 0
        return None if self._over else data[:-2]

    @staticmethod
    async def _take(reading: Any) -> bytes:
        try:
            taken: bytes = await reading
        except (OSError, asyncio.IncompleteReadError) as error:
            raise BrokenConnectionError(str(error)) from None
        return taken


def _event_of(lines: list[bytes]) -> Sse | None:
    event, empty = Sse(), True
    for line in lines:
        name, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode()
        if name == b"id":
            event.id, empty = text, False
        elif name == b"data":
            event.message, empty = json.loads(text) if text else None, False
    return None if empty else event
