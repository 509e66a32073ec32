"""Percentiles from buckets: near enough, for all durations."""

from __future__ import annotations

import random

import pytest

from logstore.storage.latency import Latencies, Latency


def test_nothing_recorded_is_nothing() -> None:
    assert Latencies().summary() == Latency(0, 0, 0, 0)


@pytest.mark.parametrize("scale_us", [1, 10, 300, 20_000, 3_000_000, 10**9])
def test_percentiles_are_off_by_an_eighth_at_most(scale_us: int) -> None:
    rng = random.Random(scale_us)
    durations = sorted(int(rng.lognormvariate(0, 1) * scale_us) for _ in range(5_000))
    latencies = Latencies()
    for duration in durations:
        latencies.record((duration + 0.5) / 1_000_000)
    found = latencies.summary()
    assert found.count == 5_000
    assert found.max_us == pytest.approx(durations[-1], abs=1)
    for percentile, exact in ((found.p50_us, durations[2_499]), (found.p99_us, durations[4_949])):
        assert abs(percentile - exact) <= exact / 8 + 1


def test_a_percentile_never_exceeds_what_was_longest() -> None:
    latencies = Latencies()
    latencies.record(0.001_025, times=100)
    assert latencies.summary() == Latency(100, 1025, 1025, 1025)


def test_what_no_clock_should_give_is_counted_all_the_same() -> None:
    latencies = Latencies()
    latencies.record(-1.0)
    latencies.record(1e9)
    found = latencies.summary()
    assert (found.count, found.p50_us) == (2, 0)
