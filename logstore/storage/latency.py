"""How long operations take, counted in buckets: p50 and p99 for the price of an addition.

A bucket is an eighth of a power of two microseconds wide (one microsecond below 16), so a percentile is off by at most
an eighth. Counts only grow: nothing is allocated, and nothing is lost however long the store is open.
"""

from __future__ import annotations

from typing import Final

import msgspec

_EXACT_BITS: Final = 4
"""Below 2 to this many microseconds each has a bucket of its own; above, half as many buckets a power of two."""
_HALF: Final = 1 << (_EXACT_BITS - 1)
_MOST_BITS: Final = 40
"""Twelve days; what takes longer counts as that."""
_BUCKETS: Final = (_MOST_BITS - _EXACT_BITS + 2) * _HALF


class Latency(msgspec.Struct, frozen=True):
    """What one kind of operation took since the store was opened.

    Attributes:
        count: How many there were.
        p50_us: Half of them took no longer, in microseconds; 0 when there were none.
        p99_us: 99 of 100 took no longer.
        max_us: The longest.
    """

    count: int = 0
    p50_us: int = 0
    p99_us: int = 0
    max_us: int = 0


class Latencies:
    """Durations of one kind of operation. One thread records; any may ask, and sees perhaps one less."""

    __slots__ = ("_counts", "_max_us")

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self._max_us = 0

    def record(self, took_s: float, times: int = 1) -> None:
        """Count operations.

        Args:
            took_s: What each took, in seconds.
            times: How many took that.
        """
        took_us = min(max(int(took_s * 1_000_000), 0), (1 << _MOST_BITS) - 1)
        self._counts[_bucket(took_us)] += times
        self._max_us = max(self._max_us, took_us)

    def summary(self) -> Latency:
        """Return percentiles over everything that was recorded."""
        counts = self._counts.copy()
        total = sum(counts)
        if not total:
            return Latency()
        p50_us, p99_us = (min(_percentile(counts, total * share), self._max_us) for share in (0.50, 0.99))
        return Latency(total, p50_us, p99_us, self._max_us)


def _bucket(took_us: int) -> int:
    shift = max(0, took_us.bit_length() - _EXACT_BITS)
    return shift * _HALF + (took_us >> shift)


def _bounds(bucket: int) -> tuple[int, int]:
    """Return the shortest duration of a bucket, and the shortest of the next."""
    shift = max(0, bucket // _HALF - 1)
    least = bucket - shift * _HALF
    return least << shift, (least + 1) << shift


def _percentile(counts: list[int], wanted: float) -> int:
    """Return the duration that so many operations do not exceed, as if those of a bucket were spread evenly in it."""
    seen = 0
    for bucket, count in enumerate(counts):
        if count and seen + count >= wanted:
            low, high = _bounds(bucket)
            return round(low + (high - 1 - low) * (wanted - seen) / count)
        seen += count
    raise AssertionError("more is wanted than was counted")
