"""All benchmarks: `python -m bench`, a quick run of some minutes, or with `--full` what must hold."""

from __future__ import annotations

from typing import Final

from bench import (
    append,
    beside,
    opening,
    operating,
    payloads,
    reindex,
    replay,
    resume,
    server,
    streams,
    sustained,
    workers,
)
from bench.command import run

_MODULES: Final = (
    append,
    payloads,
    streams,
    sustained,
    replay,
    server,
    workers,
    beside,
    opening,
    reindex,
    operating,
    resume,
)
BENCHMARKS: Final = tuple(module.BENCHMARK for module in _MODULES)
"""In the order in which they run."""

if __name__ == "__main__":
    run(BENCHMARKS, "python -m bench")
