"""The event store over the face of a log: what the stores in memory and on disk share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

from mcp.server.streamable_http import EventMessage, EventStore
from mcp_types import INVALID_REQUEST, ErrorData, JSONRPCError

from logstore.errors import InvalidMessageError, InvalidStreamError, StoreClosedError
from logstore.mcp.messages import Message, decode, encode, encode_substitute
from logstore.mcp.outbox import Storing
from logstore.mcp.scope import name_in_log
from logstore.mcp.sdk import STANDALONE_STREAM, called_by_transport, is_transport_callback, split_transport_prefix
from logstore.mcp.sessions import MemorySessions, SessionKeeper
from logstore.storage import (
    FLAG_FINAL,
    FLAG_PRIMING,
    FLAG_REQUEST,
    Event,
    Health,
    StreamSummary,
)

logger = logging.getLogger("logstore.mcp")

EventCallback = Callable[[EventMessage], Awaitable[None]]

_UNSCOPED: Final = (
    "this server hands its event store to all sessions as it is, so a resume could show the events of another "
    "session; serve it with logstore.mcp.resumable_http_app"
)


class EventLog(Storing, Protocol):
    """What a store asks of the log behind it; `logstore.storage.Log` tells more."""

    async def append(self, stream: str, payload: bytes, flags: int = 0) -> str:
        """Append one event and return its id."""
        ...

    def add(
        self, stream: str, payload: bytes, flags: int = 0, *, wait: bool = True
    ) -> tuple[int, asyncio.Future[None] | None] | None:
        """Take an event; return its id and what to await. None when `append` is to be used."""
        ...

    async def append_many(self, items: Sequence[tuple[str, bytes, int]]) -> list[str]:
        """Append events in one commit; all or none."""
        ...

    async def stream_of(self, event_id: str) -> str | None:
        """Return the stream of an event; None when the id is unknown or none of ours."""
        ...

    async def read(self, stream: str, after: str | None = None, limit: int = 1000) -> list[Event]:
        """Return events of a stream in order; none when nothing is after."""
        ...

    async def resume(self, after: str) -> tuple[str, AsyncGenerator[list[Event], None]] | None:
        """Return the stream of an event and pages of what comes after it; None when the id is unknown or not ours."""
        ...

    def follow(self, stream: str, after: str | None = None) -> AsyncIterator[Event]:
        """Yield events of a stream in order, and go on with those to come, until the log is closed."""
        ...

    async def unanswered(self, prefix: str) -> list[str]:
        """Return the streams of requests that have no answer, whose names begin with a prefix."""
        ...

    def stream_summaries(self) -> list[StreamSummary]:
        """Return one summary a stream."""
        ...

    def health(self) -> Health:
        """Return whether the log is well, and why not."""
        ...

    async def close(self) -> None:
        """Let go of everything; a second call does nothing."""
        ...


class LogEventStore(EventStore):
    """An event store for the SDK, over a log.

    Opened at first use, or with `async with`. Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._log: EventLog | None = None
        self._opening = asyncio.Lock()
        self._closed = False
        self._told_unscoped = False
        self._sessions = MemorySessions()

    @property
    def raises_on_write_failure(self) -> bool:
        """Whether `store_event` raises when the disk fails."""
        return False

    @property
    def opened(self) -> EventLog | None:
        """The log, None before its first use and once the store was closed."""
        return None if self._closed else self._log

    @abstractmethod
    async def _open(self) -> EventLog:
        """Make and open the log; called again when it failed."""

    async def log(self) -> EventLog:
        """Return the log, opened at first use.

        Raises:
            StoreClosedError: The store was closed.
        """
        if self._log is None or self._closed:
            async with self._opening:
                if self._closed:
                    raise StoreClosedError("the store is closed")
                if self._log is None:
                    self._log = await self._open()
        return self._log

    async def close(self) -> None:
        """Close the store; what was acknowledged is kept as its durability says. A second call does nothing."""
        async with self._opening:
            self._closed = True
            if self._log is not None:
                await self._log.close()

    async def __aenter__(self) -> Self:
        """Open the store."""
        await self.log()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        await self.close()

    async def store_event(self, stream_id: str, message: Message | None) -> str:
        """Store a message and return its id; durable on return as the store's durability says.

        Args:
            stream_id: 1 to 512 bytes of printing characters.
            message: A JSON-RPC model of the SDK, a plain dict, or None for a priming event, which is never replayed.

        Raises:
            InvalidStreamError: The stream id cannot be stored.
            InvalidMessageError: The message is not JSON, with the path of what is not.
            StoreClosedError: The store was closed.
            WriteFailedError: The disk refused, and the store was told to raise then.
        """
        log = self._log or await self.log()
        try:
            _check_is_text(stream_id)
            payload, flags = encode(stream_id, message)
            added = log.add(stream_id, payload, flags)
            if added is None:
                return await log.append(stream_id, payload, flags)
        except (InvalidMessageError, InvalidStreamError):
            if not called_by_transport():
                raise
            # An exception would end the transport's router, and every later call of the session would hang.
            return await log.append(name_in_log("", stream_id), *encode_for_transport(stream_id, message))
        event_id, stored = added
        if stored is not None:
            await stored
        return str(event_id)

    async def store_events(self, events: Sequence[tuple[str, Message | None]]) -> list[str]:
        """Store messages in one commit, all or none, and return their ids in the order given.

        Raises:
            InvalidStreamError: A stream id cannot be stored; nothing was.
            InvalidMessageError: A message is not JSON; nothing was stored.
            StoreClosedError: The store was closed.
            WriteFailedError: The disk refused, and the store was told to raise then.
        """
        log = self._log or await self.log()
        items: list[tuple[str, bytes, int]] = []
        for stream_id, message in events:
            _check_is_text(stream_id)
            items.append((stream_id, *encode(stream_id, message)))
        return await log.append_many(items)

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        """Send what was stored in the stream of an event after it, in order, up to the response that ends it.

        Returns:
            The stream id; None when the event id is unknown.

        Raises:
            GapError: Events after that one are gone.
            DamageError: Events after that one cannot be read.
            StoreClosedError: The store was closed.
        """
        if is_transport_callback(send_callback):
            await self._refuse_unscoped(send_callback)
            return None
        log = await self.log()
        found = await log.resume(str(last_event_id))
        if found is None:
            return None
        stream, pages = found
        async with contextlib.aclosing(pages):
            async for events in pages:
                for event in events:
                    if not event.flags & FLAG_PRIMING:
                        message: Any = decode(event)
                        # A plain dict comes back to the direct caller that stored one; the SDK stores only models.
                        await send_callback(EventMessage(message, str(event.id)))
                    if event.flags & FLAG_FINAL:
                        return stream
        return stream

    async def _refuse_unscoped(self, send_callback: EventCallback) -> None:
        """End a resume through the SDK's transport that no session scope protects, the same for every id.

        The SDK names streams by request id in every session. An exception, or an empty replay, would make the client
        ask again for ever; an error without an id ends its call.
        """
        if not self._told_unscoped:
            self._told_unscoped = True
            logger.error("a resume was refused: %s", _UNSCOPED)
        await refuse(send_callback, _UNSCOPED)

    def get_stream_stats(self) -> dict[str, dict[str, Any]]:
        """Return figures of every stream: events, bytes, first and last event id and time."""
        return {} if self._log is None else {s.stream: _figures_of(s) for s in self._log.stream_summaries()}

    def health(self) -> Health:
        """Return whether the store keeps its promises, why not, and since when; `closed` before its first use too."""
        return Health("closed", None, None, 0) if self._log is None else self._log.health()

    async def sessions(self) -> SessionKeeper:
        """Return where sessions are kept."""
        return self._sessions

    async def shared_folder(self) -> Path | None:
        """Return a folder that all processes share which have this store open; None when it is in memory."""
        return None


def encode_for_transport(stream_id: str, message: Message | None) -> tuple[bytes, int]:
    """Return the payload and flags of what the SDK's transport sends; where it cannot be stored, what takes its place.

    Args:
        stream_id: The SDK's id of the stream.
        message: What it sends.
    """
    try:
        payload, flags = encode(stream_id, message)
    except InvalidMessageError as problem:
        payload, flags = encode_substitute(message, problem)
    # Retention by size waits for the answer of a request; the standalone stream never gets one.
    if stream_id.endswith(STANDALONE_STREAM) and split_transport_prefix(stream_id)[1] == STANDALONE_STREAM:
        return payload, flags
    return payload, flags | FLAG_REQUEST


async def refuse(send_callback: EventCallback, reason: str) -> None:
    """End a resume through the SDK's transport with a reason.

    The client takes an error without an id, on a connection that resumes a request, as the answer to that request.
    """
    error = ErrorData(code=INVALID_REQUEST, message=reason)
    await send_callback(EventMessage(JSONRPCError(jsonrpc="2.0", id=None, error=error)))


def _check_is_text(stream_id: object) -> None:
    if not isinstance(stream_id, str):
        raise InvalidStreamError(f"a stream id is a str, not {type(stream_id).__name__}")


def _figures_of(summary: StreamSummary) -> dict[str, Any]:
    return {
        "events": summary.events,
        "bytes": summary.bytes,
        "first_event_id": summary.first_id,
        "last_event_id": summary.last_id,
        "first_time": _iso(summary.first_time_us),
        "last_time": _iso(summary.last_time_us),
    }


def _iso(time_us: int) -> str:
    return datetime.fromtimestamp(time_us / 1_000_000, UTC).isoformat()
