"""Event ids: 63-bit integers that order.

| bits | field |
| --- | --- |
| 42 | milliseconds since 1970 |
| 10 | lane |
| 11 | counter |

The text form is the plain decimal, the same number that the catalogue holds. An id only orders: what time an event has
stands in its record, since ids run ahead of the clock after a burst, a crash, or a step back of the clock.
"""

from __future__ import annotations

from typing import Final

_LANE_BITS: Final = 10
_COUNTER_BITS: Final = 11
_MILLISECOND_SHIFT: Final = _LANE_BITS + _COUNTER_BITS
_COUNTER_MASK: Final = (1 << _COUNTER_BITS) - 1

LANE_COUNT: Final = 1 << _LANE_BITS
MAX_ID: Final = (1 << 63) - 1


class IdGenerator:
    """Draws ascending ids for one lane; used by one thread at a time.

    Args:
        lane: Number of the lane, 0 to `LANE_COUNT` - 1.
        floor: An id below everything that may be given out.
    """

    def __init__(self, lane: int, floor: int = 0) -> None:
        self._lane = lane << _COUNTER_BITS
        self._last = 0
        self.advance(floor)

    @property
    def last(self) -> int:
        """The newest id that was given out, or what stands in for it after `advance`."""
        return self._last

    def next(self, now_us: int) -> int:
        """Return an id above every earlier one and, unless the clock stepped back, at the clock."""
        candidate = now_us // 1000 << _MILLISECOND_SHIFT | self._lane
        if candidate <= self._last:
            candidate = self._last + 1
            if candidate & _COUNTER_MASK == 0:
                # The counter is full: a carry would run into another lane's ids.
                candidate = ((self._last >> _MILLISECOND_SHIFT) + 1) << _MILLISECOND_SHIFT | self._lane
        self._last = candidate
        return candidate

    def advance(self, floor: int) -> None:
        """Give out only ids above `floor` from now on; `floor` may be of any lane."""
        if floor >= self._last:
            self._last = ((floor >> _MILLISECOND_SHIFT) + 1) << _MILLISECOND_SHIFT | self._lane


def lane_of(event_id: int) -> int:
    """Return the number of the lane that drew an id."""
    return event_id >> _COUNTER_BITS & (LANE_COUNT - 1)


def time_ms_of(event_id: int) -> int:
    """Return when an id was drawn, milliseconds since 1970; later than the clock said after a burst or a step back."""
    return event_id >> _MILLISECOND_SHIFT


def later(event_id: int, milliseconds: int) -> int:
    """Return the smallest id `milliseconds` after the given one."""
    return ((event_id >> _MILLISECOND_SHIFT) + milliseconds) << _MILLISECOND_SHIFT


def parse_event_id(text: str) -> int | None:
    """Return the id that a client quotes, or None for anything that this store never wrote."""
    if not 1 <= len(text) <= 19 or not text.isascii() or not text.isdigit() or text[0] == "0":
        return None
    value = int(text)
    return value if value <= MAX_ID else None
