"""NATS JetStream: one acknowledged message an event, in a file that the server syncs when it likes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mcp.server.streamable_http import EventCallback, EventId, EventMessage, EventStore, StreamId
from mcp_types import JSONRPCMessage, jsonrpc_message_adapter

from bench.peers.servers import nats_server

if TYPE_CHECKING:
    from nats.js import JetStreamContext

_STREAM: Final = "events"


class JetStreamStore(EventStore):
    """A subject for each stream; an event id is the message's sequence number."""

    def __init__(self, context: JetStreamContext) -> None:
        self._context = context

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        """Publish one message, and wait until the server has it."""
        data = b"" if message is None else message.model_dump_json(by_alias=True, exclude_unset=True).encode()
        acknowledgement = await self._context.publish(f"{_STREAM}.{stream_id}", data)
        return str(acknowledgement.seq)

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        """Send the messages of a subject after one, through a consumer that begins there."""
        from nats.js.api import ConsumerConfig, DeliverPolicy

        after = int(last_event_id)
        subject = (await self._context.get_msg(_STREAM, after)).subject
        assert subject is not None
        last = (await self._context.get_last_msg(_STREAM, subject)).seq
        config = ConsumerConfig(deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=after + 1)
        found = await self._context.subscribe(subject, ordered_consumer=True, config=config)
        while last is not None and after < last:
            message = await found.next_msg()
            after = message.metadata.sequence.stream
            if message.data:
                await send_callback(EventMessage(jsonrpc_message_adapter.validate_json(message.data), str(after)))
        await found.unsubscribe()
        return subject.removeprefix(f"{_STREAM}.")


@asynccontextmanager
async def jetstream(folder: Path) -> AsyncGenerator[EventStore]:
    """Open one over a server of its own."""
    import nats

    with nats_server(folder) as port:
        client = await nats.connect(f"nats://127.0.0.1:{port}")
        context = client.jetstream()
        await context.add_stream(name=_STREAM, subjects=[f"{_STREAM}.*"])
        yield JetStreamStore(context)
        await client.close()
