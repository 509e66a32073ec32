"""How much Python executes: a measure of work that a busy machine does not change."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

_CALL_STEPS: Final = 5
"""A call of a function that is written in C takes the time of some five instructions, and of its work."""


def steps_of(work: Callable[[], object]) -> int:
    """Return the steps that some work takes in this thread: bytecode instructions, and calls of C functions.

    Work that ends within the C functions is not seen; what is called, and how often, is.
    """
    steps = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        if event == "opcode":
            steps += 1
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return trace

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal steps
        if event == "c_call":
            steps += _CALL_STEPS

    tracing, profiling = sys.gettrace(), sys.getprofile()
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(profiling)
        sys.settrace(tracing)
    return steps
