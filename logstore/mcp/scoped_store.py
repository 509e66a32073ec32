"""The event store that `resumable_http_app` hands to the SDK: each session sees its own streams only."""

from __future__ import annotations

import logging
from typing import Final

from mcp.server.streamable_http import EventStore
from mcp_types import JSONRPCMessage, JSONRPCNotification, JSONRPCRequest

from logstore.mcp.base import EventCallback, LogEventStore, encode_for_transport
from logstore.mcp.scope import SessionScope, current_session
from logstore.mcp.sdk import split_transport_prefix

logger = logging.getLogger("logstore.mcp")

_NO_ANSWERS: Final = (JSONRPCNotification, JSONRPCRequest)


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

        On return it may not be on disk yet: nothing that shows it leaves before, see `Outbox`.

        Returns:
            The event id; an empty string, which the SDK sends as no id, when the store is closed or broken, and when
            nothing of this is to be stored.
        """
        session = current_session.get() or self._nobody
        if self._adapted:
            # Without it the standalone stream would have another name in each transport of a session.
            stream_id = split_transport_prefix(stream_id)[1]
        if session.closed or stream_id == session.unrecorded:
            return ""
        name = session.name_of(stream_id)
        try:
            log = self._store.opened or await self._store.log()
            payload, flags = encode_for_transport(stream_id, message)
            # The response waits for what it shows, see `Outbox`. Nobody's has none.
            added = log.add(name, payload, flags, wait=session is self._nobody)
            if added is None:
                event_id = await log.append(name, payload, flags)
            else:
                session.newest, stored = added
                event_id = str(session.newest)
                if stored is not None:
                    await stored
        except Exception:
            logger.exception("an event of stream %r was sent without being stored", stream_id[:80])
            event_id = ""
        if message is None:
            if session is not self._nobody:
                session.primed[name] = event_id
        elif not isinstance(message, _NO_ANSWERS):
            session.answered(stream_id, name)
        return event_id

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        """Replay nothing: the resume layer answers every resume before the SDK sees it."""
        return None
