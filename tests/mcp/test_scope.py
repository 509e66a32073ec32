"""Names of streams in the log: valid whatever a client calls its request, and never of another session."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logstore.mcp.memory import MemoryLog
from logstore.mcp.scope import SessionScope, name_in_log

anything = st.text(st.characters(exclude_categories=[]))


@given(anything)
async def test_any_stream_id_has_a_name_that_the_log_takes_and_gives_back(stream_id: str) -> None:
    session = SessionScope()
    name = session.name_of(stream_id)
    await MemoryLog(1, 1, 1).append(name, b"")
    if "/#" not in name:
        assert session.stream_id_of(name) == stream_id


@given(st.lists(anything, unique=True))
def test_two_stream_ids_never_share_a_name(stream_ids: list[str]) -> None:
    session = SessionScope()
    assert len({session.name_of(stream_id) for stream_id in stream_ids}) == len(stream_ids)


@pytest.mark.parametrize("stream_id", ["1", "_GET_stream", "a/b c", "32:0123:1"])
def test_a_common_stream_id_stays_readable(stream_id: str) -> None:
    session = SessionScope()
    assert session.name_of(stream_id) == f"{session.token}/{stream_id}"


@pytest.mark.parametrize("stream_id", ["x" * 4_000_000, "\x00" * 200, "\u20ac" * 100])
async def test_an_endless_stream_id_is_hashed(stream_id: str) -> None:
    session = SessionScope()
    name = session.name_of(stream_id)
    await MemoryLog(1, 1, 1).append(name, b"")
    assert name != session.name_of(stream_id + "x")


def test_a_stream_id_cannot_pretend_to_be_hashed() -> None:
    session = SessionScope()
    hashed = session.name_of("x" * 1000).removeprefix(f"{session.token}/")
    assert session.name_of(hashed) != session.name_of("x" * 1000)


def test_another_session_s_stream_is_not_recognised() -> None:
    mine, other = SessionScope(), SessionScope()
    assert mine.stream_id_of(other.name_of("1")) is None
    assert mine.stream_id_of("1") is None
    assert mine.stream_id_of(mine.token) is None


def test_without_a_session_an_empty_id_has_a_name_too() -> None:
    assert name_in_log("", "").startswith("#")
