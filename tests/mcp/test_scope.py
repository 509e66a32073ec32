"""Names of streams in the log: valid whatever a client calls its request, and never of another session."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logstore.mcp.memory import MemoryLog
from logstore.mcp.scope import SessionScope, name_in_log, request_id_of

anything = st.text(st.characters(exclude_categories=[]))


@pytest.mark.promise("any-request-id")
@given(anything)
async def test_any_stream_id_has_a_name_that_the_log_takes_and_gives_back(stream_id: str) -> None:
    session = SessionScope()
    name = session.name_of(stream_id)
    await MemoryLog(1, 1, 1).append(name, b"")
    if "/#" not in name and stream_id != "_GET_stream":
        assert str(request_id_of(name)) == stream_id


@pytest.mark.promise("sessions-apart")
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


@pytest.mark.promise("sessions-apart")
def test_another_session_s_stream_is_not_recognised() -> None:
    mine, other = SessionScope(), SessionScope()
    assert mine.owns(mine.name_of("1"))
    assert not mine.owns(other.name_of("1"))
    assert not mine.owns("1")
    assert not mine.owns(mine.token)


@pytest.mark.promise("any-request-id")
@pytest.mark.parametrize("request_id", [0, 1, -5, "1", "0", "-5", "007", "a", "", "%", "#", "%-1", "1.0", "\u0663"])
def test_an_answer_finds_the_request_s_id_as_its_client_wrote_it(request_id: int | str) -> None:
    found = request_id_of(SessionScope().begin(request_id))
    assert found == request_id
    assert type(found) is type(request_id)


def test_a_request_id_is_told_from_the_same_one_as_text_also_when_it_is_used_again() -> None:
    session = SessionScope()
    assert [request_id_of(session.begin(each)) for each in (1, "1", 1)] == [1, "1", 1]


def test_nobody_waits_for_an_answer_on_the_standalone_stream() -> None:
    assert request_id_of(SessionScope().name_of("_GET_stream")) is None


def test_without_a_session_an_empty_id_has_a_name_too() -> None:
    assert name_in_log("", "").startswith("#")


def test_a_name_that_no_session_made_is_of_no_request() -> None:
    # An import may bring any name that can be stored.
    assert request_id_of("token/%FF") is None
    assert request_id_of("token/%ED%A0%80x") == "\ud800x"
