"""Ids ascend, stay in their lane, and are read back from text only in the form that they are written in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logstore.storage.ids import LANE_COUNT, MAX_ID, IdGenerator, lane_of, later, parse_event_id

NOW_US = 1_790_000_000_000_000
COUNTERS = 1 << 11

lanes = st.integers(0, LANE_COUNT - 1)
# Up to the year 2100: past 2109 an id would need more than 63 bits.
clocks = st.integers(0, 4_100_000_000_000_000)


@pytest.mark.promise("ids-never-twice")
@given(lanes, st.lists(clocks, min_size=2, max_size=50))
def test_ids_ascend_however_the_clock_steps(lane: int, times: list[int]) -> None:
    generator = IdGenerator(lane)
    ids = [generator.next(now) for now in times]
    assert ids == sorted(set(ids))
    assert all(lane_of(each) == lane for each in ids)
    assert generator.last == ids[-1]


@given(lanes, lanes, clocks, st.lists(clocks, min_size=1, max_size=20))
def test_ids_are_above_a_floor_of_any_lane(lane: int, other: int, floor_us: int, times: list[int]) -> None:
    floor = IdGenerator(other).next(floor_us)
    generator = IdGenerator(lane)
    generator.next(times[0])
    generator.advance(floor)
    ids = [generator.next(now) for now in times]
    assert min(ids) > floor
    assert all(lane_of(each) == lane for each in ids)


@given(lanes, clocks)
def test_a_floor_below_what_was_given_out_changes_nothing(lane: int, now_us: int) -> None:
    generator = IdGenerator(lane)
    newest = generator.next(now_us)
    generator.advance(newest - 1)
    assert generator.next(now_us) == newest + 1


def test_an_id_holds_the_milliseconds_of_the_clock() -> None:
    generator = IdGenerator(5)
    assert generator.next(NOW_US) >> 21 == NOW_US // 1000
    assert generator.next(NOW_US + 7_000) >> 21 == NOW_US // 1000 + 7


@pytest.mark.parametrize("lane", [0, 1, LANE_COUNT - 1])
def test_a_full_counter_goes_on_in_the_next_millisecond_and_never_in_another_lane(lane: int) -> None:
    generator = IdGenerator(lane)
    ids = [generator.next(NOW_US) for _ in range(3 * COUNTERS)]
    assert ids == sorted(set(ids))
    assert {lane_of(each) for each in ids} == {lane}
    assert ids[COUNTERS] >> 21 == NOW_US // 1000 + 1


@pytest.mark.promise("ids-never-twice")
def test_lanes_never_draw_the_same_id() -> None:
    drawn = [IdGenerator(lane).next(NOW_US) for lane in range(LANE_COUNT)]
    assert len(set(drawn)) == LANE_COUNT


@given(lanes, clocks, st.integers(0, 10_000))
def test_later_is_the_smallest_id_of_its_millisecond(lane: int, now_us: int, milliseconds: int) -> None:
    bound = later(IdGenerator(lane).next(now_us), milliseconds)
    assert bound >> 21 == (bound - 1 >> 21) + 1
    assert lane_of(bound) == 0


@given(st.integers(1, MAX_ID))
def test_an_id_is_read_back_from_its_text(event_id: int) -> None:
    assert parse_event_id(str(event_id)) == event_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "01",
        "-1",
        "+1",
        " 1",
        "1 ",
        "1\n",
        "1_000",
        "1.0",
        "1e3",
        "0x10",
        "٣",
        "²",
        "１",
        "abc",
        "1\0",
        str(MAX_ID + 1),
        "9" * 19,
        "9" * 20,
        "9" * 5_000,
        "9f1c2d3e-0000-4000-8000-000000000000",
    ],
)
def test_text_that_was_never_written_for_an_id_is_refused(text: str) -> None:
    assert parse_event_id(text) is None


@given(st.text(max_size=25))
def test_what_is_read_as_an_id_is_written_the_same(text: str) -> None:
    event_id = parse_event_id(text)
    assert event_id is None or (str(event_id) == text and 0 < event_id <= MAX_ID)
