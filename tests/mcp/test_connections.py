"""A connection that is ended looks to the SDK as if its client had gone, and nothing else is cut off with it."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from starlette.types import Message

from logstore.mcp.connections import Connection

DISCONNECT = {"type": "http.disconnect"}


async def never() -> Message:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


async def nowhere(message: Message) -> None:
    pass


def received(connection: Connection) -> Connection:
    """A connection whose request, of a GET, has come whole."""
    connection.received = True
    return connection


async def test_who_waits_for_the_client_hears_that_it_is_gone() -> None:
    connection = received(Connection(never, nowhere))
    waiting = asyncio.create_task(connection.receive())
    await asyncio.sleep(0)
    connection.end()
    assert await waiting == DISCONNECT
    assert waiting.cancelling() == 0
    assert await connection.receive() == DISCONNECT


async def test_who_waits_is_cancelled_by_others_as_ever() -> None:
    connection = received(Connection(never, nowhere))
    waiting = asyncio.create_task(connection.receive())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize("first", ["end", "cancel"])
async def test_a_cancellation_at_the_same_moment_is_not_lost(first: str) -> None:
    connection = received(Connection(never, nowhere))
    waiting = asyncio.create_task(connection.receive())
    await asyncio.sleep(0)
    for step in (connection.end, waiting.cancel) if first == "end" else (waiting.cancel, connection.end):
        step()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_cancel_scope_around_who_waits_works_when_the_connection_was_ended_in_it() -> None:
    connection = received(Connection(never, nowhere))
    heard: list[Message] = []
    with anyio.move_on_after(10) as scope:
        async with anyio.create_task_group() as tasks:

            async def listen() -> None:
                heard.append(await connection.receive())
                await asyncio.get_running_loop().create_future()

            tasks.start_soon(listen)
            await asyncio.sleep(0)
            connection.end()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            tasks.cancel_scope.cancel()
    assert heard == [DISCONNECT]
    assert not scope.cancelled_caught
