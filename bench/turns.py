"""Contenders take turns, each in a process of its own, so that its memory and processor time are its own."""

from __future__ import annotations

import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

_T = TypeVar("_T")

_FROM_SERVER: Final = get_context("forkserver")
"""Processes are forked from one that has imported what takes a second, and has done nothing else."""
_FROM_SERVER.set_forkserver_preload(["bench.peers", "bench.serving", "bench.frozen"])

Figures = dict[str, float | list[float]]
"""What was measured at once, by name; the name ends with the unit. A list is a course over time."""
Rows = dict[str, Figures]
"""What one task gave: figures by what was asked for, such as the number of writers."""
Round = dict[str, Rows]
"""What all tasks gave in one round, by name of the task."""


@dataclass(frozen=True)
class Task:
    """What one contender does in its turn.

    Attributes:
        perform: A function of a module, called in a process of its own with a new folder and the arguments.
        arguments: What else it gets.
        peers: Names of the peers that it needs.
    """

    perform: Callable[..., Rows]
    arguments: tuple[Any, ...] = ()
    peers: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where in a round a figure stands."""

    task: str
    row: str
    figure: str

    def value(self, results: Round) -> float | None:
        """Return the figure, None when it was not measured in this round."""
        found = results.get(self.task, {}).get(self.row, {}).get(self.figure)
        return None if isinstance(found, list) else found


def typical(rounds: Sequence[Round], place: Place) -> float | None:
    """Return the median of a figure over the rounds in which it was measured; None when there is none."""
    values = [value for results in rounds if (value := place.value(results)) is not None]
    return statistics.median(values) if values else None


def _processes() -> ForkContext | ForkServerContext:
    # What runs in a process of its own already is forked from there: it would start another server.
    return _FROM_SERVER if parent_process() is None else get_context("fork")


def in_process(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function in a process of its own; inside another one before that has any threads."""
    with ProcessPoolExecutor(1, mp_context=_processes()) as process:
        return process.submit(function, *arguments).result()


@contextmanager
def beside(function: Callable[..., None], *arguments: Any) -> Generator[tuple[BaseProcess, Connection]]:
    """Run a function in a process of its own beside the block; inside another one before that has any threads.

    Args:
        function: Called with one end of a pipe, and the arguments.
        *arguments: What else it gets.

    Yields:
        The process, which is ended with the block, and the other end of the pipe.
    """
    processes = _processes()
    here, there = processes.Pipe()
    process = processes.Process(target=function, args=(there, *arguments))
    process.start()
    # Its end is the process's alone, so that what waits for a message is told when that dies.
    there.close()
    try:
        yield process, here
    finally:
        process.terminate()
        process.join()
        here.close()


def subfolder(folder: Path, name: object) -> Path:
    """Make a folder in a task's folder, and return its path."""
    own = folder / str(name)
    own.mkdir()
    return own


def take_turns(
    tasks: Mapping[str, Task], rounds: Mapping[str, int], folder: Path, title: str
) -> tuple[list[Round], dict[str, str]]:
    """Perform all tasks in turn, every other round backwards, so that a busy minute of the machine hits all of them.

    A task that fails has no further turn; of a run of half an hour, what the others gave must not be lost.

    Args:
        tasks: By name.
        rounds: How many turns each has.
        folder: Where they may write; nothing is left there.
        title: What is measured, for the progress on stderr.

    Returns:
        The rounds, and what each task that failed raised.
    """
    results: list[Round] = []
    failed: dict[str, str] = {}
    total = max(rounds.values(), default=0)
    for number in range(total):
        names = [name for name in tasks if number < rounds[name] and name not in failed]
        results.append({})
        for name in names if number % 2 == 0 else reversed(names):
            print(f"{title}: round {number + 1} of {total}: {name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix=".bench-", dir=folder) as own:
                try:
                    results[-1][name] = in_process(tasks[name].perform, Path(own).resolve(), *tasks[name].arguments)
                except Exception as error:
                    traceback.print_exc()
                    failed[name] = f"{type(error).__name__}: {error}"
    return results, failed
