"""The lines of the SDK and of FastMCP that `logstore.mcp.sdk` stands on."""

from __future__ import annotations

import inspect

from fastmcp.server.session_scoped_event_store import SessionScopedEventStore
from mcp.server import streamable_http
from mcp.server.streamable_http import EventCallback, EventMessage, EventStore, StreamableHTTPServerTransport
from mcp_types import JSONRPCMessage

from logstore.mcp import InMemoryEventStore
from logstore.mcp.sdk import TRANSPORT_MODULE, called_by_transport, is_transport_callback, split_transport_prefix


def test_the_transport_defines_the_callback_that_it_replays_to() -> None:
    source = inspect.getsource(StreamableHTTPServerTransport)
    assert "async def send_event(event_message: EventMessage) -> None:" in source
    assert "await event_store.replay_events_after(last_event_id, send_event)" in source
    assert streamable_http.__name__ == TRANSPORT_MODULE == StreamableHTTPServerTransport.__module__


def test_the_transport_stores_what_it_sends_by_awaiting_the_store() -> None:
    source = inspect.getsource(StreamableHTTPServerTransport)
    assert "await self._event_store.store_event(request_stream_id, message)" in source
    assert "await self._event_store.store_event(stream_id, None)" in source


class Recorder(EventStore):
    """Notes what it was asked for, and by whom."""

    def __init__(self) -> None:
        self.stream_id = ""
        self.called_by_transport = False
        self.callback: EventCallback | None = None

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        self.stream_id = stream_id
        self.called_by_transport = called_by_transport()
        return "1"

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        self.callback = send_callback
        return None


async def ignore(event: EventMessage) -> None:
    pass


async def test_fastmcp_s_adapter_puts_a_prefix_that_can_be_split_off() -> None:
    recorder = Recorder()
    adapter = SessionScopedEventStore(recorder, "0123456789abcdef" * 2)
    await adapter.store_event("a:1:b", None)
    assert split_transport_prefix(recorder.stream_id) == ("32:" + "0123456789abcdef" * 2 + ":", "a:1:b")


async def test_fastmcp_s_adapter_replays_to_a_function_of_its_own() -> None:
    recorder = Recorder()
    await SessionScopedEventStore(recorder, "x").replay_events_after("1", ignore)
    assert not is_transport_callback(recorder.callback)


async def test_a_direct_call_is_not_the_transport_s() -> None:
    recorder = Recorder()
    await recorder.store_event("s", None)
    assert not recorder.called_by_transport
    assert not is_transport_callback(ignore)
    assert not is_transport_callback(object())


def test_what_only_looks_like_a_prefix_stays() -> None:
    for stream_id in ("1", "_GET_stream", "", ":", "3:ab:1", "3:abcd:1", "\u0663:abc:1", "9999:abc:1", "-1::1"):
        assert split_transport_prefix(stream_id) == ("", stream_id)


def test_a_store_is_never_false() -> None:
    # The SDK tests `if self._event_store:` before it stores anything.
    assert not hasattr(InMemoryEventStore, "__len__")
    assert not hasattr(InMemoryEventStore, "__bool__")
