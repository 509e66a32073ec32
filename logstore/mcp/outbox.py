"""What a response has to say leaves once the events are stored that it shows, and together with what comes at once.

The SDK waits for an event to be stored, and for a part of a response to be sent, before it does anything else for the
session; so the events of a call would be committed one by one, and sent in as many packets. It need not wait for
either: what holds is that nothing leaves before it is stored. And what is to be sent waits some milliseconds for what
follows, except a request and the end of a response: a call that is answered at once is one commit, and one piece.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import takewhile
from typing import Final, NamedTuple, Protocol

from starlette.types import Message, Send

from logstore.mcp.scope import SessionScope

_MOST_BYTES: Final = 64 << 10
"""So much of one response may wait to be sent before the SDK waits, too."""
_LINGER_S: Final = 0.005
_MOST_LINGER_S: Final = 0.1
_LINGER_TURNS: Final = 20
"""A part waits for those behind it as long as so many turns of the loop take, within these bounds: a packet costs a
server more than anything that this layer does. The way of an event through the SDK is some turns, and the busier the
loop is, the longer they are."""


class Storing(Protocol):
    """What tells of events that were added without waiting; a log does."""

    def is_stored(self, event_id: int) -> bool:
        """Whether an event is as durable as it is going to be."""
        ...

    async def until_stored(self, event_id: int) -> None:
        """Return when it is."""
        ...


def _with_length(head: Message, length: int) -> Message:
    """Return what begins a response with the length of its body: the server need not frame it, and write an end."""
    headers = list(head.get("headers", ()))
    if not length or b"content-length" in [name.lower() for name, _ in headers]:
        return head
    return {**head, "headers": [*headers, (b"content-length", b"%d" % length)]}


class _Part(NamedTuple):
    """A part of the body, the event that it waits for, and whether others follow."""

    body: bytes
    event_id: int
    more: bool


class Outbox:
    """Stands between who writes one response and the server.

    Args:
        send: Sends a message of the response.
    """

    __slots__ = (
        "_bytes",
        "_complete",
        "_head",
        "_is_sending",
        "_lingering",
        "_parts",
        "_send",
        "_sender",
        "_session",
        "_storing",
    )

    def __init__(self, send: Send) -> None:
        self._send = send
        self._session: SessionScope | None = None
        self._storing: Storing | None = None
        self._head: Message | None = None
        self._parts: deque[_Part] = deque()
        self._bytes = 0
        self._complete = False
        self._lingering: asyncio.Handle | None = None
        self._sender: asyncio.Task[None] | None = None
        self._is_sending = False

    def wait_for(self, session: SessionScope, storing: Storing) -> None:
        """Let each part wait for the event that is the session's newest when the part comes."""
        self._session = session
        self._storing = storing

    async def begin(self, head: Message) -> None:
        """Send what begins the response, soon; nothing waits for the disk to send that."""
        if self._session is None:
            await self._send(head)
            return
        self._head = head
        self._let_linger()

    async def send(self, message: Message) -> None:
        """Send a part of the body behind those before it, once it may leave.

        Returns before that, unless it is the last part, or much waits, or one could not be sent: then when everything
        has been sent.

        Raises:
            Exception: What the server's `send` raised for this part or an earlier one.
        """
        if self._complete:
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        self._complete = not more
        if self._session is None:
            await self._send(message)
            return
        # What is empty shows nothing, as the answer to a notification; nothing leaves before what is before it.
        event_id = max(self._session.newest if body else 0, self._parts[-1].event_id if self._parts else 0)
        self._parts.append(_Part(body, event_id, more))
        self._bytes += len(body)
        if not more and self._sender is None:
            # Without a task, a hundredth of a call. What has not been begun when this is cancelled, `settle` sends.
            self._stop_lingering()
            await self._send_parts()
        elif not more or self._bytes > _MOST_BYTES or (self._sender is not None and self._sender.done()):
            # Who is cancelled here does not take along what others have put.
            await asyncio.shield(self._go())
        elif b'"id":' in body and b'"method":' in body:
            # A request: the server waits for what the client answers to it.
            self._go()
        else:
            self._let_linger()

    def _let_linger(self) -> None:
        """Let what there is to be sent wait for what may be behind it."""
        if self._lingering is None and self._sender is None:
            loop = asyncio.get_running_loop()
            self._lingering = loop.call_soon(self._linger, loop, loop.time())

    def _linger(self, loop: asyncio.AbstractEventLoop, began_s: float) -> None:
        """Wait for some turns of the loop: the one that has passed since tells how long they take."""
        turns_s = _LINGER_TURNS * (loop.time() - began_s)
        self._lingering = loop.call_later(min(max(_LINGER_S, turns_s), _MOST_LINGER_S), self._go)

    def _stop_lingering(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None

    def _go(self) -> asyncio.Task[None]:
        """Have everything sent as soon as it may leave."""
        self._stop_lingering()
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_parts())
        return self._sender

    def _is_stored(self, event_id: int) -> bool:
        return self._storing is None or self._storing.is_stored(event_id)

    async def _send_parts(self) -> None:
        while self._parts or self._head is not None:
            is_whole = bool(self._parts) and not self._parts[-1].more
            if self._storing is not None and (is_whole or self._head is None):
                # What begins a response waits for nothing, unless all of it can leave together.
                await self._storing.until_stored(self._parts[-1 if is_whole else 0].event_id)
            # Taken first: nobody may drop a body whose length was told.
            messages = self._take()
            self._is_sending = bool(messages)
            for message in messages:
                await self._send(message)
            self._is_sending = False
        self._sender = None

    def _take(self) -> list[Message]:
        """Take what may leave, as messages for the server."""
        ready = self._ready()
        for _ in ready:
            self._parts.popleft()
        body, more = b"".join([part.body for part in ready]), not ready or ready[-1].more
        self._bytes -= len(body)
        messages: list[Message] = []
        if self._head is not None:
            messages.append(self._head if more else _with_length(self._head, len(body)))
            self._head = None
        if ready:
            messages.append({"type": "http.response.body", "body": body, "more_body": more})
        return messages

    def _ready(self) -> list[_Part]:
        """Return the parts that may leave."""
        if self._parts and self._is_stored(self._parts[-1].event_id):
            # Events are stored in the order of their ids.
            return list(self._parts)
        return list(takewhile(lambda part: self._is_stored(part.event_id), self._parts))

    def drop(self) -> None:
        """Drop what has not been sent."""
        self._parts.clear()

    async def stored(self) -> None:
        """Return when the session's newest event is stored."""
        if self._session is not None and self._storing is not None:
            await self._storing.until_stored(self._session.newest)

    async def settle(self) -> None:
        """Return when what may leave has been sent; the rest is dropped.

        Raises:
            Exception: What the server's `send` raised.
            ConnectionError: Who sent was cancelled in the middle of it. What the server got is not known.
        """
        if self._is_sending and self._sender is None:
            raise ConnectionError("the response was cut off while it was being sent")
        if self._sender is not None and not self._is_sending:
            # It waits for the disk.
            self._sender.cancel()
            self._sender = None
        self._parts = deque(self._ready())
        await asyncio.shield(self._go())
        self.close()

    def may_show(self) -> bool:
        """Whether the session's newest event is stored."""
        return self._session is None or self._is_stored(self._session.newest)

    def close(self) -> None:
        """Send nothing more; the response is over."""
        self.drop()
        self._stop_lingering()
        self._complete = True
        if self._sender is not None and not self._sender.cancel() and not self._sender.cancelled():
            # Looked at, so that asyncio does not report it: there is nobody to be told any more.
            self._sender.exception()
