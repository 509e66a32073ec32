"""The event store that `resumable_http_app` hands to the SDK: each session sees its own streams only."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Final

from mcp.server.streamable_http import EventStore
from mcp_types import JSONRPCMessage

from logstore.errors import DamageError, GapError
from logstore.mcp.base import (
    EventCallback,
    EventLog,
    LogEventStore,
    refuse,
    replay,
    send_event,
    store_for_transport,
)
from logstore.mcp.scope import SessionScope, current_session
from logstore.mcp.sdk import is_transport_callback, split_transport_prefix
from logstore.storage import FLAG_FINAL, FLAG_PRIMING

logger = logging.getLogger("logstore.mcp")

_UNKNOWN_EVENT: Final = "this session has no event with that id; call again"
_EVENTS_GONE: Final = "events after that one are gone, so the stream cannot be resumed without a hole; call again"


class ScopedEventStore(EventStore):
    """A store's view for the SDK, in which the session of the running request is part of every stream's name.

    Args:
        store: Where events are kept.
        adapted: Whether FastMCP's adapter stands before this store, with a prefix of its own for each transport.
    """

    def __init__(self, store: LogEventStore, *, adapted: bool) -> None:
        self._store = store
        self._adapted = adapted
        # For calls outside any request of the app: stored, and seen by nobody.
        self._nobody = SessionScope()

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        """Store an event of the running session; never raises, see `logstore.mcp.sdk.called_by_transport`.

        Returns:
            The event id; an empty string, which the SDK sends as no id, when the store is closed or broken.
        """
        session = current_session.get() or self._nobody
        if self._adapted:
            # Without it the standalone stream would have another name in each transport of a session.
            session.transport_prefix, stream_id = split_transport_prefix(stream_id)
        try:
            log = await self._store.log()
            return await store_for_transport(log, session.name_of(stream_id), stream_id, message)
        except Exception:
            logger.exception("an event of stream %r was sent without being stored", stream_id[:80])
            return ""

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        """Replay a stream of the running session.

        To the SDK's transport the stream is also followed, until the response that ends it: an event that is stored
        after a replay, and before the SDK has registered the resumed stream, would never be sent, and the call hang.
        FastMCP's adapter sends nothing before the replay is over, so there the SDK goes on with the stream.

        Returns:
            For FastMCP's adapter the stream id, under the prefix of its transport. None when the event is not of this
            session, and when the stream was followed to its end.
        """
        session = current_session.get() or self._nobody
        follow = is_transport_callback(send_callback)
        try:
            log = await self._store.log()
            name = await log.stream_of(last_event_id)
            stream_id = None if name is None else session.stream_id_of(name)
            if name is None or stream_id is None:
                await _refuse(follow, send_callback, _UNKNOWN_EVENT)
            elif follow:
                await _follow(log, session, name, last_event_id, send_callback)
            else:
                await replay(log, name, last_event_id, send_callback)
                return session.transport_prefix + stream_id
        except (GapError, DamageError) as problem:
            logger.warning("a resume after event %s was refused: %s", last_event_id, problem)
            await _refuse(follow, send_callback, _EVENTS_GONE)
        return None


async def _follow(log: EventLog, session: SessionScope, name: str, after: str, send_callback: EventCallback) -> None:
    reader = session.add_reader()
    events = log.follow(name, after)
    try:
        with reader:
            async for event in events:
                if not event.flags & FLAG_PRIMING:
                    await send_event(event, send_callback)
                if event.flags & FLAG_FINAL:
                    return
    finally:
        session.remove_reader(reader)
        if isinstance(events, AsyncGenerator):
            # Left to the collector it would go on listening for a while.
            await events.aclose()


async def _refuse(transport: bool, send_callback: EventCallback, reason: str) -> None:
    """Say why a resume is refused, where it reaches the client: on an empty replay it would ask again for ever."""
    if transport:
        await refuse(send_callback, reason)
