"""The answer to a GET with `Last-Event-ID`, from the log: what was missed, then what comes, up to the response.

It needs no SDK session, so any worker gives it, also while another one runs the call, or none does.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Final

from sse_starlette import EventSourceResponse

from logstore.errors import DamageError, GapError, InvalidMessageError
from logstore.mcp import answers
from logstore.mcp.base import EventLog
from logstore.mcp.connections import Connection
from logstore.mcp.messages import on_one_line
from logstore.mcp.scope import SessionScope, is_standalone
from logstore.storage import FIRST_PAGE_EVENTS, FLAG_FINAL, FLAG_MODEL, FLAG_PRIMING, Event
from logstore.storage.record import FLAG_IMPORTED

logger = logging.getLogger("logstore.mcp")

_NOWHERE: Final = "1"
"""An event id that is as old as the hills."""
_LINE_ENDS: Final = (b"\n", b"\r")


class Resumption:
    """A stream of a session from one event on.

    Attributes:
        stream: Its name in the log.
    """

    def __init__(self, log: EventLog, stream: str, last_event_id: str, first: Sequence[Event]) -> None:
        self.stream = stream
        self._log = log
        self._after = last_event_id
        self._first = first

    @classmethod
    async def begin(cls, log: EventLog, session: SessionScope, last_event_id: str) -> Resumption | None:
        """Return the stream of an event, if it is one of the session's and can go on from there.

        Of the standalone stream with a hole there is nobody to tell about it, so that is none either.
        """
        stream: str | None
        try:
            stream = await log.stream_of(last_event_id)
        except GapError:
            # It is gone, and with it whose it was.
            stream = None
        if stream is None:
            return None
        if not session.owns(stream):
            # Found in memory, perhaps; one that is nowhere had to wait for the thread that reads.
            await log.stream_of(_NOWHERE)
            return None
        try:
            return cls(log, stream, last_event_id, await _first_page(log, stream, last_event_id))
        except (GapError, DamageError) as problem:
            logger.warning("a resume after event %s finds a gap: %s", last_event_id, problem)
            return None if is_standalone(stream) else _Broken(log, stream, last_event_id, ())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events as they go over the wire, each once and in order, and end behind the response."""
        try:
            for event in self._first:
                # The one that the client has comes first, when the log still has it.
                if event.event_id != self._after and (sent := self._sent(event)):
                    yield sent
                if event.flags & FLAG_FINAL:
                    return
            after = self._first[-1].event_id if self._first else self._after
            followed = self._log.follow(self.stream, after)
            try:
                async for event in followed:
                    if sent := self._sent(event):
                        yield sent
                    if event.flags & FLAG_FINAL:
                        return
            finally:
                await _close(followed)
        except (GapError, DamageError, InvalidMessageError) as problem:
            logger.warning("a resumed stream has a gap: %s", problem)
            if not is_standalone(self.stream):
                yield answers.gap(self.stream)

    def _sent(self, event: Event) -> bytes:
        """Return an event as it goes over the wire, empty for one that is not sent.

        Raises:
            InvalidMessageError: It holds no message, and was to be sent to somebody who waits for an answer.
        """
        if event.flags & FLAG_PRIMING:
            return b""
        try:
            return _as_sse(event)
        except InvalidMessageError as problem:
            if not is_standalone(self.stream):
                raise
            # Ended here, its client would come back and end here again.
            logger.error("an event of a session is left out: %s", problem)
            return b""

    async def answer(self, connection: Connection, session_id: str, retry_ms: int | None) -> None:
        """Send the response."""
        headers = {
            "Cache-Control": "no-cache, no-transform",
            "Connection": "keep-alive",
            "Content-Type": "text/event-stream",
            "mcp-session-id": session_id,
        }
        response = EventSourceResponse(_with_retry(self.events(), retry_ms), headers=headers)
        await response({"type": "http", "method": "GET"}, connection.receive, connection.send)


class _Broken(Resumption):
    """A request's stream that has a hole right where it is to go on."""

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the error that ends it."""
        yield answers.gap(self.stream)


async def _first_page(log: EventLog, stream: str, last_event_id: str) -> list[Event]:
    """Return the event that the client has, which may be the last, and those behind it.

    Raises:
        GapError: Events after it are gone.
    """
    before = str(int(last_event_id) - 1)
    try:
        found = await log.read(stream, before, FIRST_PAGE_EVENTS)
        if found and found[0].event_id == last_event_id:
            return found
    except GapError:
        # It is gone itself; that matters to nobody.
        pass
    return await log.read(stream, last_event_id, FIRST_PAGE_EVENTS)


async def _with_retry(events: AsyncGenerator[bytes, None], retry_ms: int | None) -> AsyncGenerator[bytes, None]:
    """Tell the client with the first event how long to wait before it comes again."""
    retry = b"" if retry_ms is None else b"retry: %d\r\n" % retry_ms
    try:
        async for event in events:
            yield retry + event
            retry = b""
    finally:
        await events.aclose()


def _as_sse(event: Event) -> bytes:
    """Return an event as it goes over the wire.

    Raises:
        InvalidMessageError: It holds no message: not every event was stored by the SDK.
    """
    payload = event.payload
    # What was not stored by the SDK may be laid out in lines, which would end the field.
    if event.flags & (FLAG_MODEL | FLAG_IMPORTED) != FLAG_MODEL or any(end in payload for end in _LINE_ENDS):
        payload = on_one_line(event)
    return answers.as_sse(payload, event.id)


async def _close(events: AsyncIterator[Event]) -> None:
    if isinstance(events, AsyncGenerator):
        # Left to the collector it would go on listening for a while.
        await events.aclose()
