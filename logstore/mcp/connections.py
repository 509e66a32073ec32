"""The open responses of this process, by session: each can be ended from outside, as if its client had gone.

The SDK gets `receive` and `send` of a `Connection` in the place of the server's. When the connection is ended the SDK
hears that the client is gone; what it began to send is then finished here, so that the client sees a clean end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio
import msgspec
from pydantic_core import from_json
from starlette.responses import Response
from starlette.types import Message, Receive, Send

from logstore.mcp.outbox import Outbox, Storing
from logstore.mcp.scope import RequestId, SessionScope

logger = logging.getLogger("logstore.mcp")

_DISCONNECT: Final[Message] = {"type": "http.disconnect"}
_END: Final[Message] = {"type": "http.response.body", "body": b"", "more_body": False}
_EMPTY_STREAM: Final[Message] = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache, no-transform")],
}
_ID: Final = b"id: "
_FINISH_S: Final = 1.0
"""What a client that does not read may hold up the end of its response."""
_STORE_S: Final = 10.0
"""What the disk may hold it up."""


class _Envelope(msgspec.Struct):
    """What is read of a message."""

    id: RequestId | None = None
    method: str | None = None


_decode_envelope = msgspec.json.Decoder(_Envelope).decode


def _tolerantly(body: bytes) -> _Envelope:
    """Read a message that is none for us as the SDK does, to which NaN is JSON; what is wrong with it, the SDK says."""
    try:
        return msgspec.convert(from_json(body), _Envelope)
    except (ValueError, msgspec.MsgspecError):
        return _Envelope()


class Connection:
    """One request and its response.

    Args:
        receive: The server's.
        send: The server's.

    Attributes:
        stream: Name in the log of the stream that the response carries, empty while it is none.
        began_ns: Orders the connections of one machine.
        body: Of the request, empty until `received` is set.
        received: Whether the request was received whole.
        ended: Whether somebody has ended it.
        status: Of the response, 0 before it has begun.
        resumable: Whether an event id went out, so that the client can come back.
        finished: Whether the response was sent to its end.
        on_received: Called once with the connection when the request was received whole.
        on_start: Awaited with the first message of the response before it is sent; may change it.
    """

    __slots__ = (
        "_again",
        "_ending",
        "_interrupted",
        "_outbox",
        "_pieces",
        "_receive",
        "_receiving",
        "_send",
        "_starting",
        "began_ns",
        "body",
        "ended",
        "finished",
        "on_received",
        "on_start",
        "received",
        "resumable",
        "status",
        "stream",
    )

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._receiving: asyncio.Task[Any] | None = None
        self._again = False
        self._ending = False
        self._interrupted = False
        self._starting: asyncio.Event | None = None
        self._outbox = Outbox(self._pass_on)
        self.stream = ""
        self.began_ns = time.time_ns()
        # A client may send a byte at a time: put together once, not anew with each.
        self._pieces = bytearray()
        self.body = b""
        self.received = False
        self.status = 0
        self.resumable = False
        self.finished = False
        self.ended = False
        self.on_received: Callable[[Connection], None] | None = None
        self.on_start: Callable[[Message], Awaitable[None]] | None = None

    @property
    def request_id(self) -> RequestId | None:
        """The id of the JSON-RPC request that was received, None for anything else."""
        try:
            envelope = _decode_envelope(self.body)
        except (ValueError, RecursionError, msgspec.MsgspecError):
            # Text that is no UTF-8, nesting without end, no JSON.
            envelope = _tolerantly(self.body)
        return envelope.id if envelope.method is not None else None

    @property
    def waits(self) -> bool:
        """Whether the response has not begun, and somebody waits for it."""
        return not (self.status or self.ended)

    async def read(self, limit: int) -> bool:
        """Receive the request whole, if it is within a limit of bytes; return whether it is."""
        while not self.received:
            if (await self.receive())["type"] == "http.disconnect":
                return False
            if max(len(self._pieces), len(self.body)) > limit:
                return False
        return True

    def rewind(self) -> None:
        """Let the next `receive` give the whole request again."""
        self._again = self.received

    async def receive(self) -> Message:
        """Return what comes from the client, or that it is gone once the connection was ended."""
        if self._again:
            self._again = False
            return {"type": "http.request", "body": self.body, "more_body": False}
        if not self.received:
            message = await self._receive()
            self._take(message)
            return message
        if self.ended:
            return _DISCONNECT
        # Only that the client is gone can come now. A cancel scope would cost each request a fifth of the layer's time.
        task = self._receiving = asyncio.current_task()
        assert task is not None
        try:
            return await self._receive()
        except asyncio.CancelledError:
            if not self._interrupted or task.uncancel():
                # Somebody else wants it cancelled, too.
                raise
            return _DISCONNECT
        finally:
            self._receiving = None

    def _take(self, message: Message) -> None:
        if message["type"] != "http.request":
            return
        chunk, more = message.get("body", b""), message.get("more_body", False)
        if more or self._pieces:
            self._pieces += chunk
        if not more:
            self.body = bytes(self._pieces) if self._pieces else chunk
            self._pieces.clear()
            self.received = True
            if self.on_received is not None:
                self.on_received(self)

    def hold_back(self, session: SessionScope, storing: Storing) -> None:
        """Let no part of the body go out before the events of a session are stored that it may show."""
        self._outbox.wait_for(session, storing)

    async def send(self, message: Message) -> None:
        """Send a part of the response; nothing goes out once the connection was ended."""
        if self.ended or self.finished:
            return
        if message["type"] == "http.response.start":
            await self._start(message)
            return
        if self._starting is not None:
            # A ping, which another task sends, must not overtake the beginning.
            await self._starting.wait()
        await self._outbox.send(message)

    async def _pass_on(self, message: Message) -> None:
        """Give a part of the response to the server."""
        if message["type"] == "http.response.start":
            await self._send(message)
            return
        if not message.get("more_body", False):
            self.finished = True
        await self._send(message)
        if not self.resumable and _ID in message.get("body", b""):
            self.resumable = True
            if self._ending:
                self.end()

    async def answer(self, response: Response) -> None:
        """Send a whole response."""
        await response({"type": "http", "method": "POST"}, self.receive, self.send)

    async def _start(self, message: Message) -> None:
        self.status = message["status"]
        if self.on_start is None:
            await self._outbox.begin(message)
            return
        self._starting = asyncio.Event()
        try:
            await self.on_start(message)
            await self._outbox.begin(message)
        finally:
            self._starting.set()
            self._starting = None

    def end(self) -> None:
        """End the response soon and cleanly, wherever it is.

        The response to a request not before an id went out on it: its client could not come back for the rest.
        """
        self._ending = True
        if not self.ended and (self.resumable or not (self.body or self._pieces)):
            self.ended = True
            self._outbox.drop()
            if self._receiving is not None:
                self._interrupted = True
                self._receiving.cancel()

    async def finish(self, last: bytes = b"") -> None:
        """See to it that a response has an end that was begun, or ended before it began; it is over then.

        Args:
            last: What to send before the end, if no event id went out.
        """
        try:
            if not self.finished and (self.status or self.ended):
                if not self.ended:
                    with anyio.move_on_after(_STORE_S, shield=True):
                        await self._outbox.stored()
                with anyio.move_on_after(_FINISH_S, shield=True):
                    await self._finish(last)
        except Exception as error:
            # The server's own way to say that the client is gone.
            logger.debug("a response could not be finished: %s", error)
        finally:
            self.finished = self.finished or bool(self.status)
            self._outbox.close()

    async def _finish(self, last: bytes) -> None:
        if not self.status:
            await self._send(_EMPTY_STREAM)
        await self._outbox.settle()
        if not self.finished:
            body = last if self._outbox.may_show() and not self.resumable else b""
            await self._pass_on({**_END, "body": body})


class Connections:
    """The open responses that carry streams of sessions."""

    def __init__(self) -> None:
        self._by_token: dict[str, set[Connection]] = {}

    def add(self, name: str, connection: Connection) -> None:
        """Note which stream a connection carries."""
        connection.stream = name
        self._by_token.setdefault(_token_of(name), set()).add(connection)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is done."""
        token = _token_of(connection.stream)
        found = self._by_token.get(token)
        if found is not None:
            found.discard(connection)
            if not found:
                del self._by_token[token]

    def is_open(self, token: str) -> bool:
        """Whether a session has connections."""
        return token in self._by_token

    def end(self, name: str, older_than_ns: int) -> None:
        """End the connections of a stream, or of all streams of a session, that began before a time.

        Args:
            name: Of the stream; the session's token and a slash for all.
            older_than_ns: Nanoseconds since 1970.
        """
        whole = name.endswith("/") and name.count("/") == 1
        for connection in list(self._by_token.get(_token_of(name), ())):
            if connection.began_ns < older_than_ns and (whole or connection.stream == name):
                connection.end()

    def end_all(self) -> None:
        """End everything."""
        for connection in [connection for found in self._by_token.values() for connection in found]:
            connection.end()


def _token_of(name: str) -> str:
    return name.partition("/")[0]
