"""What a response has to say of events that are not stored yet: it leaves once they are.

The SDK waits for an event to be stored, and for a part of a response to be sent, before it does anything else for the
session; so the events of a call would be committed one by one. It need not wait for either: what holds is that nothing
leaves before it is stored. Events that come in a row are committed together then, and sent together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from starlette.types import Send

from logstore.mcp.scope import SessionScope

_MOST_BYTES: Final = 64 << 10
"""So much of one response may wait to be sent before the SDK waits, too."""

Stored = Callable[[int], asyncio.Future[None] | None]
"""Given an event's id, returns what is done when it is stored, None when it is."""


class Outbox:
    """Stands between the SDK and the body of one response.

    Args:
        send: Sends a message of the response.
        session: Whose events the response shows: a part leaves when the newest of its moment is stored.
        stored: Whether an event is.
    """

    __slots__ = ("_bytes", "_more", "_parts", "_send", "_sender", "_session", "_stored", "is_sending")

    def __init__(self, send: Send, session: SessionScope, stored: Stored) -> None:
        self._send = send
        self._session = session
        self._stored = stored
        # Each with the event that it waits for.
        self._parts: deque[tuple[bytes, int]] = deque()
        self._bytes = 0
        self._more = True
        self._sender: asyncio.Task[None] | None = None
        self.is_sending = False

    def is_clear(self) -> bool:
        """Whether what is to be sent next may leave at once."""
        return self._sender is None and self._stored(self._session.newest) is None

    async def put(self, body: bytes, *, more: bool) -> None:
        """Send a part of the body behind those before it, as soon as it may leave.

        Returns at once, unless it is the last part, or much waits: then when everything has been sent.

        Raises:
            Exception: What `send` raised for this part or an earlier one.
        """
        self._parts.append((body, self._session.newest))
        self._bytes += len(body)
        self._more = more
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_all())
        if not more or self._bytes > _MOST_BYTES or self._sender.done():
            await self.empty()

    async def empty(self) -> None:
        """Return when everything that was put has been sent.

        Raises:
            Exception: What `send` raised.
        """
        if self._sender is not None:
            # Who is cancelled here does not take along what others have put.
            await asyncio.shield(self._sender)

    async def _send_all(self) -> None:
        while self._parts:
            waiting = self._stored(self._parts[0][1])
            if waiting is not None:
                await waiting
            ready: list[bytes] = []
            while self._parts and self._stored(self._parts[0][1]) is None:
                ready.append(self._parts.popleft()[0])
            if ready:
                body = b"".join(ready)
                self.is_sending = True
                more = self._more or bool(self._parts)
                await self._send({"type": "http.response.body", "body": body, "more_body": more})
                self.is_sending = False
                self._bytes -= len(body)
        self._sender = None

    def clear(self) -> None:
        """Drop what has not been sent."""
        self._parts.clear()

    def close(self) -> None:
        """Send nothing more; the response is over."""
        self.clear()
        if self._sender is not None and not self._sender.cancel() and not self._sender.cancelled():
            # Looked at, so that asyncio does not report it: there is nobody to be told any more.
            self._sender.exception()
