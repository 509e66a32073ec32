"""What stands between client and server, and can cut."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import time
from collections.abc import AsyncGenerator, Callable
from typing import Final, NamedTuple

from logstore.cli.demo.growing import Growing

_LAST_EVENT_ID: Final = re.compile(rb"^last-event-id: *([^\r\n]*)", re.IGNORECASE | re.MULTILINE)


class Resume(NamedTuple):
    """A request that asks for the rest of a stream.

    Attributes:
        last_event_id: The last event that the client holds.
        at: When it was passed on, seconds of `time.monotonic`.
    """

    last_event_id: str
    at: float


class Relay:
    """Passes bytes between a client and a server on this machine, as a balancer does, until it is told to cut.

    Attributes:
        port: Where the client connects to.
        cuts: Connections that were cut.
        resumes: Requests with a `Last-Event-ID` that were passed on.
    """

    def __init__(self, server_port: int) -> None:
        self.port = 0
        self.cuts = 0
        self.resumes: Growing[Resume] = Growing("requests with a Last-Event-ID")
        self._server_port = server_port
        self._connections: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._passing = asyncio.Event()
        self._passing.set()

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, server_port: int) -> AsyncGenerator[Relay, None]:
        """Open a relay on a free port of this machine."""
        relay = cls(server_port)
        server = await asyncio.start_server(relay._accept, "127.0.0.1", 0)
        relay.port = server.sockets[0].getsockname()[1]
        try:
            yield relay
        finally:
            server.close()
            relay.cut()
            relay.let_through()
            await server.wait_closed()

    def cut(self) -> None:
        """Break every connection with a TCP reset, both sides; who connects from here on waits."""
        self._passing.clear()
        self.cuts += len(self._connections)
        for connection in self._connections:
            for side in connection:
                _reset(side)

    def redirect(self, server_port: int) -> None:
        """Pass who connects from here on to another server."""
        self._server_port = server_port

    def let_through(self) -> None:
        """Pass on again, beginning with who waits."""
        self._passing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._passing.wait()
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            return
        connection = (writer, server_writer)
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(_pass_on(reader, server_writer, self._note_resume))
                directions.create_task(_pass_on(server_reader, writer))
        except* OSError:
            # One side is gone, so the other one goes too.
            pass
        finally:
            self._connections.discard(connection)
            for side in connection:
                side.transport.abort()

    def _note_resume(self, data: bytes) -> None:
        # A client sends the head of a request in one piece; this looks on, and changes nothing.
        for found in _LAST_EVENT_ID.finditer(data):
            self.resumes.add(Resume(found[1].decode("latin-1"), time.monotonic()))


def _reset(writer: asyncio.StreamWriter) -> None:
    # Without lingering, closing a socket sends a reset; with it, the polite end of a connection.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, look: Callable[[bytes], None] = lambda _: None
) -> None:
    while data := await reader.read(65536):
        look(data)
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
