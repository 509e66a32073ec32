"""The demonstration from start to end: where its files go, and what it comes to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from logstore.cli.demo import page
from logstore.cli.demo.growing import StandstillError
from logstore.cli.demo.story import Plan, tell
from logstore.errors import LogstoreError

logger = logging.getLogger("logstore.demo")


def run(steps: int, folder: Path | None, *, keep: bool) -> int:
    """Show it; return 0, or 1 when an event was lost, doubled or out of order, or nothing came any more.

    Args:
        steps: Progress reports of the tool, 3 or more.
        folder: Where the store goes, None for a temporary folder.
        keep: Whether a temporary folder stays; it also does when something went wrong.
    """
    started = time.monotonic()
    temporary = folder is None and not keep
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="logstore-demo-"))
    remove = temporary
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _logging_to(folder / "client.log"):
            problems = _tell(Plan(folder, steps))
        if problems:
            page.verdict("\n".join(problems), good=False)
            page.line(f"To look into it: {folder}, with server.log and client.log.")
            remove = False
            return 1
        took_s = time.monotonic() - started
        page.verdict(
            f"{steps} progress reports and a result were stored, received and read back,\n"
            f"each once, in order, under the same id: nothing lost, nothing doubled. ({took_s:.1f} s)",
            good=True,
        )
        if temporary:
            page.line("The store was in a temporary folder, which is gone now; --keep keeps it.")
        return 0
    finally:
        if remove:
            shutil.rmtree(folder, ignore_errors=True)


def _tell(plan: Plan) -> list[str]:
    problems: list[str] = []
    try:
        problems = asyncio.run(tell(plan))
    # A group, since what happens while the SDK's client is open leaves it in one.
    except* Exception as group:
        logger.error("the demonstration failed", exc_info=group)
        problems = [
            str(error) if isinstance(error, StandstillError | LogstoreError) else f"{type(error).__name__}: {error}"
            for error in _leaves(group)
        ]
    return problems


def _leaves(group: BaseExceptionGroup[Exception]) -> list[Exception]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


@contextlib.contextmanager
def _logging_to(path: Path) -> Generator[None]:
    """Send what the libraries log to a file; without it, warnings would appear in the middle of the story."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()
