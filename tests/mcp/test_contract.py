"""What holds for every store: in memory, and on disk in each durability mode."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from mcp.server.streamable_http import EventMessage, EventStore
from mcp_types import ErrorData, JSONRPCError, JSONRPCMessage, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse

from logstore.errors import InvalidMessageError, InvalidStreamError, StoreClosedError
from logstore.mcp.base import LogEventStore
from logstore.mcp.messages import Message


async def replayed(store: LogEventStore, after: str) -> tuple[str | None, list[EventMessage]]:
    events: list[EventMessage] = []

    async def keep(event: EventMessage) -> None:
        events.append(event)

    return await store.replay_events_after(after, keep), events


async def messages_after(store: LogEventStore, after: str) -> list[object]:
    return [event.message for event in (await replayed(store, after))[1]]


def note(number: int) -> dict[str, Any]:
    return {"method": "note", "params": {"number": number}}


MODELS: list[JSONRPCMessage] = [
    JSONRPCRequest(
        jsonrpc="2.0", id="r", method="sampling/createMessage", params={"a": [1, None, True, 0.5, "\u00e4"]}
    ),
    JSONRPCNotification(jsonrpc="2.0", method="notifications/progress", params={"progress": 1}),
    JSONRPCNotification(jsonrpc="2.0", method="notifications/initialized"),
    JSONRPCError(jsonrpc="2.0", id=None, error=ErrorData(code=-32700, message="parse", data={"at": 1})),
    JSONRPCResponse(jsonrpc="2.0", id=9, result={"content": []}),
]


async def test_it_is_the_sdk_s_event_store(store: LogEventStore) -> None:
    assert isinstance(store, EventStore)
    assert store


async def test_a_replay_gives_what_came_after_in_order_with_ids(store: LogEventStore) -> None:
    ids = [await store.store_event("s", note(number)) for number in range(5)]
    stream, events = await replayed(store, ids[1])
    assert stream == "s"
    assert events == [EventMessage(cast("JSONRPCMessage", note(number)), ids[number]) for number in (2, 3, 4)]


async def test_ids_are_distinct_decimal_numbers_that_ascend(store: LogEventStore) -> None:
    ids = [await store.store_event(f"s{number % 3}", None) for number in range(50)]
    assert all(event_id.isdigit() for event_id in ids)
    assert sorted(set(ids), key=int) == ids


async def test_streams_are_kept_apart(store: LogEventStore) -> None:
    first = await store.store_event("a", note(0))
    await store.store_event("b", note(1))
    await store.store_event("a", note(2))
    assert (await replayed(store, first))[0] == "a"
    assert await messages_after(store, first) == [note(2)]


@pytest.mark.promise("message-comes-back")
async def test_models_come_back_equal_and_dicts_as_dicts(store: LogEventStore) -> None:
    start = await store.store_event("s", None)
    messages: list[Message] = [*MODELS, {"plain": True}]
    for message in messages:
        await store.store_event("s", message)
    back = await messages_after(store, start)
    assert back == messages
    assert [type(message) for message in back] == [type(message) for message in messages]


@pytest.mark.promise("priming-not-replayed")
async def test_a_priming_event_is_resumed_from_and_never_replayed(store: LogEventStore) -> None:
    first = await store.store_event("s", None)
    await store.store_event("s", note(1))
    second = await store.store_event("s", None)
    await store.store_event("s", note(2))
    assert await messages_after(store, first) == [note(1), note(2)]
    assert await messages_after(store, second) == [note(2)]


async def test_after_the_newest_event_there_is_nothing(store: LogEventStore) -> None:
    last = await store.store_event("s", note(1))
    assert await replayed(store, last) == ("s", [])


@pytest.mark.promise("unknown-id-is-none")
@pytest.mark.parametrize(
    "event_id", ["1", "0", "", "nonsense", "-1", "1.0", " 1", "\u0663", str(2**62), str(2**64), "9" * 5000]
)
async def test_an_unknown_event_id_replays_nothing(store: LogEventStore, event_id: str) -> None:
    await store.store_event("s", note(1))
    assert await replayed(store, event_id) == (None, [])


@pytest.mark.promise("replay-ends-at-response")
async def test_a_replay_of_a_request_s_stream_ends_at_its_response(store: LogEventStore) -> None:
    first = await store.store_event("1", None)
    progress = MODELS[1]
    answer = JSONRPCResponse(jsonrpc="2.0", id=1, result={"first": True})
    again = JSONRPCResponse(jsonrpc="2.0", id=1, result={"second": True})
    await store.store_event("1", progress)
    await store.store_event("1", answer)
    second = await store.store_event("1", None)
    await store.store_event("1", again)
    assert await messages_after(store, first) == [progress, answer]
    assert await messages_after(store, second) == [again]


async def test_responses_in_a_stream_of_another_name_do_not_end_it(store: LogEventStore) -> None:
    start = await store.store_event("all", None)
    answers = [JSONRPCResponse(jsonrpc="2.0", id=number, result={}) for number in range(3)]
    for answer in answers:
        await store.store_event("all", answer)
    assert await messages_after(store, start) == answers


async def test_a_replay_longer_than_a_page_is_whole(store: LogEventStore) -> None:
    start = await store.store_event("s", None)
    for _ in range(3):
        await store.store_events([("s", note(number)) for number in range(300)])
    assert await messages_after(store, start) == [note(number) for number in range(300)] * 3


async def test_a_batch_is_stored_in_its_order(store: LogEventStore) -> None:
    assert await store.store_events([]) == []
    ids = await store.store_events([("a", None), ("b", None), ("a", note(1)), ("b", note(2)), ("a", note(3))])
    assert ids == sorted(ids, key=int)
    assert await messages_after(store, ids[0]) == [note(1), note(3)]
    assert await messages_after(store, ids[1]) == [note(2)]


@pytest.mark.promise("all-or-none")
async def test_of_a_batch_with_one_bad_message_nothing_is_stored(store: LogEventStore) -> None:
    start = await store.store_event("a", None)
    with pytest.raises(InvalidMessageError, match=r"\$\.x\[1\]"):
        await store.store_events([("a", note(1)), ("a", {"x": [1, object()]})])
    with pytest.raises(InvalidStreamError):
        await store.store_events([("a", note(1)), ("", note(2))])
    assert await messages_after(store, start) == []


@pytest.mark.promise("bad-names-refused")
@pytest.mark.parametrize(
    "stream_id", ["", "x" * 513, "\u20ac" * 171, "a\x00b", "a\nb", "\x7f", "\x85", "\udc80", 1, None, b"s", ["s"]]
)
async def test_a_stream_id_that_cannot_be_stored_is_refused(store: LogEventStore, stream_id: Any) -> None:
    with pytest.raises(InvalidStreamError):
        await store.store_event(stream_id, note(1))
    assert store.get_stream_stats() == {}


@pytest.mark.promise("names-are-no-paths")
@pytest.mark.parametrize(
    "stream_id", ["s", "x" * 512, "\u20ac" * 170, "a/b", "../../etc/passwd", "%00", "'; DROP TABLE"]
)
async def test_any_other_stream_id_is_a_name_like_any_other(store: LogEventStore, stream_id: str) -> None:
    first = await store.store_event(stream_id, None)
    await store.store_event(stream_id, note(1))
    assert (await replayed(store, first))[0] == stream_id
    assert await messages_after(store, first) == [note(1)]


@pytest.mark.promise("not-json-refused")
async def test_a_message_that_is_not_json_is_refused_and_nothing_is_written(store: LogEventStore) -> None:
    for bad in ({"a": float("nan")}, {"a": b"x"}, {1: 2}, {"a": (1,)}, "text", 7, {"a": "\udc80"}):
        with pytest.raises(InvalidMessageError):
            await store.store_event("s", bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidMessageError):
        await store.store_event("s", JSONRPCNotification(jsonrpc="2.0", method="m", params={"a": "\udc80"}))
    assert store.get_stream_stats() == {}


@pytest.mark.promise("message-comes-back")
async def test_what_was_stored_does_not_change_with_the_message(store: LogEventStore) -> None:
    start = await store.store_event("s", None)
    message = note(1)
    await store.store_event("s", message)
    message["params"]["number"] = 2
    (back,) = await messages_after(store, start)
    assert back == note(1)
    assert isinstance(back, dict)
    back["params"]["number"] = 3
    assert await messages_after(store, start) == [note(1)]


async def test_an_error_in_the_callback_is_the_caller_s(store: LogEventStore) -> None:
    start = await store.store_event("s", None)
    await store.store_event("s", note(1))

    async def fail(event: EventMessage) -> None:
        raise RuntimeError("gone away")

    with pytest.raises(RuntimeError, match="gone away"):
        await store.replay_events_after(start, fail)
    assert await messages_after(store, start) == [note(1)]


@pytest.mark.promise("order")
async def test_many_writers_at_once_each_keep_their_order(store: LogEventStore) -> None:
    async def write(writer: int) -> list[str]:
        return [await store.store_event(f"s{writer}", note(number)) for number in range(20)]

    written = await asyncio.gather(*(write(writer) for writer in range(32)))
    assert len({event_id for ids in written for event_id in ids}) == 32 * 20
    for writer, ids in enumerate(written):
        stream, events = await replayed(store, ids[0])
        assert stream == f"s{writer}"
        assert [event.event_id for event in events] == ids[1:]


async def test_statistics_tell_of_every_stream(store: LogEventStore) -> None:
    assert store.get_stream_stats() == {}
    ids = [await store.store_event("s", note(number)) for number in range(3)]
    await store.store_event("t", None)
    stats = store.get_stream_stats()
    assert set(stats) == {"s", "t"}
    assert stats["s"]["events"] == 3
    assert (stats["s"]["first_event_id"], stats["s"]["last_event_id"]) == (ids[0], ids[-1])
    assert stats["s"]["first_time"] <= stats["s"]["last_time"]
    assert stats["s"]["bytes"] > 0


async def test_a_healthy_store_says_so(store: LogEventStore) -> None:
    health = store.health()
    assert (health.status, health.reason, health.since_us, health.volatile_events) == ("ok", None, None, 0)


async def test_it_opens_at_first_use_and_closes_more_than_once(make_store: Callable[[], LogEventStore]) -> None:
    store = make_store()
    assert store.get_stream_stats() == {}
    ids = await asyncio.gather(*(store.store_event("s", note(number)) for number in range(10)))
    assert len(set(ids)) == 10
    await store.close()
    await store.close()
    for use in (store.store_event("s", None), store.store_events([("s", None)]), replayed(store, ids[0])):
        with pytest.raises(StoreClosedError):
            await use
    assert store.health().status == "closed"


async def test_a_store_closed_before_its_first_use_stays_closed(make_store: Callable[[], LogEventStore]) -> None:
    store = make_store()
    await store.close()
    with pytest.raises(StoreClosedError):
        await store.store_event("s", None)
    with pytest.raises(StoreClosedError):
        await store.__aenter__()
