"""What a response has to say of events that are not stored yet: it leaves once they are.

The SDK waits for an event to be stored, and for a part of a response to be sent, before it does anything else for the
session; so the events of a call would be committed one by one. It need not wait for either: what holds is that nothing
leaves before it is stored. Events that come in a row are committed together then, and sent together.
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


class Storing(Protocol):
    """What tells of events that were added without waiting; a log does."""

    def is_stored(self, event_id: int) -> bool:
        """Whether an event is as durable as it is going to be."""
        ...

    async def until_stored(self, event_id: int) -> None:
        """Return when it is."""
        ...


class _Part(NamedTuple):
    """A part of the body, the event that it waits for, and whether others follow."""

    body: bytes
    event_id: int
    more: bool


class Outbox:
    """Stands between who writes the body of one response and the server.

    Args:
        send: Sends a message of the response.
    """

    __slots__ = ("_bytes", "_complete", "_is_sending", "_parts", "_send", "_sender", "_session", "_storing")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._session: SessionScope | None = None
        self._storing: Storing | None = None
        self._parts: deque[_Part] = deque()
        self._bytes = 0
        self._complete = False
        self._sender: asyncio.Task[None] | None = None
        self._is_sending = False

    def wait_for(self, session: SessionScope, storing: Storing) -> None:
        """Let each part wait for the event that is the session's newest when the part comes."""
        self._session = session
        self._storing = storing

    async def send(self, message: Message) -> None:
        """Send a part of the body behind those before it, as soon as it may leave.

        Returns before that, unless it is the last part, or much waits, or one could not be sent: then when everything
        has been sent.

        Raises:
            Exception: What the server's `send` raised for this part or an earlier one.
        """
        if self._complete:
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        self._complete = not more
        # What is empty shows nothing, as the answer to a notification: the SDK handles that only when it was sent.
        event_id = self._session.newest if self._session is not None and body else 0
        if self._sender is None:
            if self._is_stored(event_id):
                await self._send(message)
                return
            self._sender = asyncio.create_task(self._send_parts())
        self._parts.append(_Part(body, event_id, more))
        self._bytes += len(body)
        if not more or self._bytes > _MOST_BYTES or self._sender.done():
            # Who is cancelled here does not take along what others have put.
            await asyncio.shield(self._sender)

    def _is_stored(self, event_id: int) -> bool:
        return self._storing is None or self._storing.is_stored(event_id)

    async def _send_parts(self) -> None:
        while self._parts:
            if self._storing is not None:
                await self._storing.until_stored(self._parts[0].event_id)
            ready = list(takewhile(lambda part: self._is_stored(part.event_id), self._parts))
            if not ready:
                continue
            for _ in ready:
                self._parts.popleft()
            body = b"".join([part.body for part in ready])
            self._is_sending = True
            await self._send({"type": "http.response.body", "body": body, "more_body": ready[-1].more})
            self._is_sending = False
            self._bytes -= len(body)
        self._sender = None

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
        """
        self._parts = deque(takewhile(lambda part: self._is_stored(part.event_id), self._parts))
        if self._sender is not None and (self._parts or self._is_sending):
            await asyncio.shield(self._sender)
        self.close()

    def may_show(self) -> bool:
        """Whether the session's newest event is stored."""
        return self._session is None or self._is_stored(self._session.newest)

    def close(self) -> None:
        """Send nothing more; the response is over."""
        self.drop()
        self._complete = True
        if self._sender is not None and not self._sender.cancel() and not self._sender.cancelled():
            # Looked at, so that asyncio does not report it: there is nobody to be told any more.
            self._sender.exception()
