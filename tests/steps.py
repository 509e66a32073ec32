"""How much Python executes: a measure of work that a busy machine does not change."""

from __future__ import annotations

import asyncio
import selectors
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

_LOOP: Final = (str(Path(asyncio.__file__).parent), selectors.__file__)
"""How often an event loop turns depends on the time."""
_CALL_STEPS: Final = 5
"""A call of a function that is written in C takes the time of some five instructions, beside its work."""


class Steps:
    """What was counted.

    Attributes:
        taken: Bytecode instructions, and calls of C functions, which count as some instructions. What these do is not
            seen; what is called, and how often, is.
    """

    def __init__(self) -> None:
        self.taken = 0


@contextmanager
def counted() -> Generator[Steps]:
    """Count the steps that this thread takes in functions that are called in the block, but for asyncio's own.

    A function that is counted for the first time may be missed: CPython 3.12 and 3.13 prepare it then.
    """
    steps = Steps()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            steps.taken += 1
            return trace
        if frame.f_code.co_filename.startswith(_LOOP):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return trace

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and not frame.f_code.co_filename.startswith(_LOOP):
            steps.taken += _CALL_STEPS

    tracing, profiling = sys.gettrace(), sys.getprofile()
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        yield steps
    finally:
        sys.setprofile(profiling)
        sys.settrace(tracing)
