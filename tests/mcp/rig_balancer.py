"""A plain TCP balancer in front of workers: round-robin, without stickiness, and it breaks connections as told.

It knows just enough of HTTP to tell whether an SSE id had passed when it cut, and where a response may end cleanly.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

How = Literal["reset", "clean", "half"]
"""How a connection ends.

reset: both sides are reset. clean: the response ends as if the server had ended it, where it is in chunks. half: the
client is gone, and the server's side stays open and unread, as behind a cable that was pulled.
"""

TAG_HEADER: Final = "x-rig"
"""What a client calls its request, so that a connection can be told from others."""
_TAG: Final = re.compile(rb"\r\nx-rig: *([^\r\n]*)\r\n", re.IGNORECASE)
_ID: Final = re.compile(rb"(?:^|\n)id: ")
_ID_BYTES: Final = 5


class Framing:
    """Where a chunked response stands: an incremental look at the bytes of HTTP/1.1 responses.

    Attributes:
        chunked: Whether the response under way is in chunks.
    """

    def __init__(self) -> None:
        self.chunked = False
        self._buffer = b""
        self._left = 0
        self._inside = False

    @property
    def between_chunks(self) -> bool:
        """Whether the response may end here."""
        return self._inside and self.chunked and not self._buffer and not self._left

    def feed(self, data: bytes) -> None:
        """Take in what came."""
        self._buffer += data
        while self._advance():
            pass

    def _advance(self) -> bool:
        if self._left:
            taken = min(self._left, len(self._buffer))
            self._buffer, self._left = self._buffer[taken:], self._left - taken
            return bool(taken)
        end = b"\r\n" if self._inside and self.chunked else b"\r\n\r\n"
        line, found, rest = self._buffer.partition(end)
        if not found:
            return False
        self._buffer = rest
        if self._inside:
            size = int(line or b"0", 16)
            # With the line end after it; the last chunk has none in it.
            self._left, self._inside = size + 2, size > 0
        else:
            headers = line.lower()
            self.chunked = b"transfer-encoding: chunked" in headers
            length = re.search(rb"content-length: *(\d+)", headers)
            self._left = int(length[1]) if length and not self.chunked else 0
            self._inside = self.chunked
        return True


@dataclass(eq=False)
class Connection:
    """One connection of a client.

    Attributes:
        tag: What its client called its first request.
        verb: HTTP method of that one.
        backend: Port that it went to, 0 for none.
        client: Port that it came from.
        began: When, on the clock of the event loop.
        ended: When; 0 while it is open.
        id_passed: Whether the beginning of an SSE id was sent on to the client.
        cut: How the balancer ended it; "" when it did not, "refused" when no backend took it.
        to_client: Bytes that were sent on to the client.
    """

    began: float
    tag: str = ""
    verb: str = ""
    backend: int = 0
    client: int = 0
    ended: float = 0.0
    id_passed: bool = False
    cut: Literal["", "refused", "reset", "clean", "half"] = ""
    to_client: int = 0
    _tail: bytes = b""
    framing: Framing = field(default_factory=Framing)

    def passed(self, data: bytes) -> None:
        """Note what is sent on to the client."""
        self.to_client += len(data)
        self.framing.feed(data)
        if not self.id_passed:
            self.id_passed = _ID.search(self._tail + data) is not None
            self._tail = (self._tail + data)[-_ID_BYTES:]


class Balancer:
    """Passes connections on to backends in turn.

    Attributes:
        port: Where clients connect to.
        open: Connections that have not ended.
        log: All connections, in the order in which they came.
        delay_s: How long each piece of data is kept before it is passed on.
    """

    def __init__(self, backends: Sequence[int]) -> None:
        self.port = 0
        self.open: dict[Connection, asyncio.Task[None]] = {}
        self.log: list[Connection] = []
        self.delay_s = 0.0
        self._backends = list(backends)
        self._only: list[int] = []
        self._turn = 0
        self._passing = asyncio.Event()
        self._passing.set()
        self._asked: dict[Connection, How] = {}
        self._kept: list[asyncio.StreamWriter] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def over(cls, backends: Sequence[int]) -> AsyncGenerator[Balancer]:
        """Open a balancer over some ports of this machine."""
        balancer = cls(backends)
        server = await asyncio.start_server(balancer._accept, "127.0.0.1", 0)
        balancer.port = server.sockets[0].getsockname()[1]
        try:
            yield balancer
        finally:
            server.close()
            balancer.release()
            await balancer.cut()
            for writer in balancer._kept:
                writer.transport.abort()
            await server.wait_closed()

    def towards(self, *ports: int) -> None:
        """Send connections from here on to these backends only; without any, to all in turn again."""
        self._only = list(ports)

    def hold(self) -> None:
        """Let nobody through who connects from here on."""
        self._passing.clear()

    def release(self) -> None:
        """Let those through who waited."""
        self._passing.set()

    async def cut(self, how: How = "reset", where: Callable[[Connection], bool] = lambda _: True) -> list[Connection]:
        """End connections; return those that were ended.

        One that cannot end cleanly now, since its response is not in chunks or in the middle of one, is left.
        """
        chosen = {
            connection: task
            for connection, task in self.open.items()
            if where(connection) and (how != "clean" or connection.framing.between_chunks)
        }
        for connection, task in chosen.items():
            self._asked[connection] = how
            task.cancel()
        if chosen:
            await asyncio.wait(chosen.values())
        return list(chosen)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(began=_now(), client=writer.get_extra_info("peername")[1])
        task = asyncio.current_task()
        assert task is not None
        self.log.append(connection)
        self.open[connection] = task
        back: asyncio.StreamWriter | None = None
        try:
            await self._passing.wait()
            found = await self._connect(connection)
            if found is None:
                connection.cut = "refused"
                _reset(writer)
                return
            back_reader, back = found
            await self._pass(connection, (reader, writer), (back_reader, back))
        except asyncio.CancelledError:
            how = self._asked.pop(connection, "reset")
            connection.cut = how
            self._end(how, writer, back)
        except OSError:
            # One side was reset: so is the other.
            _reset(writer)
            if back is not None:
                _reset(back)
        finally:
            connection.ended = _now()
            del self.open[connection]

    async def _connect(self, connection: Connection) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        backends = self._only or self._backends
        for _ in backends:
            self._turn += 1
            connection.backend = backends[self._turn % len(backends)]
            with contextlib.suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", connection.backend)
        connection.backend = 0
        return None

    async def _pass(
        self,
        connection: Connection,
        front: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        back: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        def look_at_request(data: bytes) -> None:
            if not connection.verb:
                connection.verb = data.partition(b" ")[0].decode("latin-1")
                tag = _TAG.search(data)
                connection.tag = tag[1].decode("latin-1") if tag else ""

        async with asyncio.TaskGroup() as tasks:
            upwards = tasks.create_task(self._pump(front[0], back[1], look_at_request))
            await self._pump(back[0], front[1], connection.passed)
            # The server has said all: what the client still says, nobody hears.
            upwards.cancel()
        for writer in (front[1], back[1]):
            writer.close()
            await writer.wait_closed()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, look: Callable[[bytes], None]
    ) -> None:
        try:
            while data := await reader.read(65536):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                look(data)
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        except OSError:
            # Not an error of the group: what the other direction still has is passed on.
            _reset(writer)

    def _end(self, how: How, writer: asyncio.StreamWriter, back: asyncio.StreamWriter | None) -> None:
        if how == "clean":
            writer.write(b"0\r\n\r\n")
            writer.close()
        else:
            _reset(writer)
        if back is None:
            return
        if how == "half":
            back.transport.pause_reading()  # type: ignore[attr-defined]
            self._kept.append(back)
        else:
            _reset(back)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection so that the other end gets a reset: no goodbye, and what was not read yet is lost."""
    if writer.transport.is_closing():
        return
    raw: socket.socket = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _now() -> float:
    return asyncio.get_running_loop().time()
