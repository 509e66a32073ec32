"""What this package knows of the SDK and of FastMCP beyond their public names.

Each function names the line it stands on; `tests/mcp/test_sdk.py` fails when a release changes it.
"""

from __future__ import annotations

import inspect
from typing import Final

TRANSPORT_MODULE: Final = "mcp.server.streamable_http"
"""The module of the transport that stores events and asks for replays."""

STANDALONE_STREAM: Final = "_GET_stream"
"""The stream that belongs to no request, and never ends. Source: `GET_STREAM_KEY` in the transport's module."""


def is_transport_callback(callback: object) -> bool:
    """Whether the SDK's transport itself asks for this replay, so that what is sent goes to a client.

    Source: `StreamableHTTPServerTransport._replay_events` defines `send_event` in place and passes it to
    `event_store.replay_events_after(last_event_id, send_event)`. FastMCP's adapter passes a function of its own.
    """
    return getattr(callback, "__module__", None) == TRANSPORT_MODULE


def called_by_transport() -> bool:
    """Whether the SDK's transport is waiting for the caller, directly or through FastMCP's adapter.

    It must not get an exception then: its `message_router` ends at the first one, and every later call of that session
    hangs. Looks at the stack, so it is for error paths only.

    Source: `message_router` and `_mint_priming_event` await `self._event_store.store_event(…)`.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == TRANSPORT_MODULE:
            return True
        frame = frame.f_back
    return False


def split_transport_prefix(stream_id: str) -> tuple[str, str]:
    """Split the prefix off that FastMCP puts before the stream ids of one transport.

    Returns:
        The prefix, such as `32:0123…:`, empty when there is none; and the rest.

    Source: `fastmcp.server.session_scoped_event_store.SessionScopedEventStore.__init__` makes it as
    `f"{len(session_id)}:{session_id}:"`, and drops a replay whose stream id does not begin with it.
    """
    digits, colon, rest = stream_id.partition(":")
    if not colon or len(digits) > 3 or not (digits.isascii() and digits.isdigit()):
        return "", stream_id
    length = int(digits)
    if rest[length : length + 1] != ":":
        return "", stream_id
    end = len(digits) + 1 + length + 1
    return stream_id[:end], stream_id[end:]
