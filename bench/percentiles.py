"""Percentiles of how long things took."""

from __future__ import annotations

from collections.abc import Sequence

from bench.turns import Figures


def percentiles(times_s: Sequence[float]) -> Figures:
    """Return the 50th and the 99th percentile in microseconds."""
    ranked = sorted(times_s)
    return {f"p{share}_us": ranked[len(ranked) * share // 100] * 1e6 for share in (50, 99)}
