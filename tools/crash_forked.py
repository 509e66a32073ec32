"""Processes of a campaign, forked from one that has neither threads nor a loop: a tenth of the cost of starting one."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from crash_kill import BrokenPromiseError

_POLL_S: Final = 0.005
_NICER: Final = 5
_WRITES_S: Final = 1.0
"""Longer than a process takes to write where it is."""
_WRONG: Final = re.compile(r"ERROR|CRITICAL|Traceback|exception was never retrieved")


class Forked:
    """A process that does one thing.

    Attributes:
        name: What it is called when something is wrong with it.
        pid: Its process id.
        status: How it ended, as `subprocess` says it; None while it runs.
    """

    def __init__(
        self, name: str, errors: Path, work: Callable[[], Counter[str] | None], close: Iterable[int] = ()
    ) -> None:
        """Fork.

        Args:
            name: What it is called.
            errors: Where its stderr goes.
            work: What it does, and what it counts; its status is 0 when that returns, 1 when it raises.
            close: Descriptors that are not for it.
        """
        self.name = name
        self.status: int | None = None
        self._errors = errors
        self.pid = os.fork()
        if self.pid == 0:
            _work(errors, work, close)

    def ended(self) -> bool:
        """Whether it has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(self, seconds: float) -> None:
        """Return once it has ended.

        Raises:
            BrokenPromiseError: It has not, after so long.
        """
        deadline = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > deadline:
                raise BrokenPromiseError(f"{self.name} is not done after {seconds:.0f} s:\n{self.where()}")
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """End it as a crash does."""
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)

    def said(self) -> str:
        """Return what it has said on stderr."""
        with contextlib.suppress(FileNotFoundError):
            return self._errors.read_text(errors="replace")
        return ""

    def where(self) -> str:
        """Return what it has said, and what all its threads do at this moment."""
        if not self.ended():
            os.kill(self.pid, signal.SIGCONT)
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(_WRITES_S)
        return self.said()

    def counted(self) -> Counter[str]:
        """Return what it has counted, once; nothing when it did not come to its end."""
        counts: Counter[str] = Counter()
        with contextlib.suppress(FileNotFoundError):
            counts.update(json.loads(_counts_path(self._errors).read_text()))
            _counts_path(self._errors).unlink()
        return counts

    def check(self, allowed: re.Pattern[str] | None = None) -> None:
        """Look how it ended, and forget what it said when nothing is wrong with that.

        Args:
            allowed: Lines that may look like errors.

        Raises:
            BrokenPromiseError: It ended by itself and not well, or said that something is wrong.
        """
        said = self.said()
        lines = [line for line in said.splitlines() if allowed is None or not allowed.search(line)]
        if self.status not in (0, -signal.SIGKILL) or any(map(_WRONG.search, lines)):
            raise BrokenPromiseError(f"{self.name} ended with {self.status}:\n{said}")
        self._errors.unlink(missing_ok=True)


def _counts_path(errors: Path) -> Path:
    return errors.with_suffix(".counts")


def _work(errors: Path, work: Callable[[], Counter[str] | None], close: Iterable[int]) -> None:
    """Do the work of a forked process, and end it without what its parent does in the end."""
    status = 1
    try:
        # Who kills must keep up with those that are killed.
        os.nice(_NICER)
        for descriptor in close:
            os.close(descriptor)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
        faulthandler.register(signal.SIGUSR1)
        logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING, force=True)
        if (counts := work()) is not None:
            _counts_path(errors).write_text(json.dumps(counts))
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)
