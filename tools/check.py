#!/usr/bin/env python3
"""Run every check and test in a fresh checkout: `python3 tools/check.py`, or with `--fast` while working."""

import argparse
import os
import subprocess
import sys
import time

import _bootstrap

FAST = [
    ("format", ["ruff", "format", "--check", "."]),
    ("lint", ["ruff", "check", "."]),
    ("types (mypy)", ["mypy"]),
    ("fast tests", ["pytest", "-m", "not slow"]),
]
ALL = [
    ("format", ["ruff", "format", "--check", "."]),
    ("lint", ["ruff", "check", "."]),
    ("types (mypy)", ["mypy"]),
    ("types (pyright)", ["pyright", "--pythonpath", str(_bootstrap.PYTHON)]),
    ("layers", ["lint-imports", "--no-logo"]),
    ("tests", ["pytest"]),
]


def main() -> int:
    """Run the steps, to the last one even when one fails; return 1 when one failed."""
    parser = argparse.ArgumentParser(description="Run every check and test, as CI does.")
    parser.add_argument("--fast", action="store_true", help="only format, lint, mypy and the tests not marked slow")
    steps = FAST if parser.parse_args().fast else ALL
    _bootstrap.prepare("dev")
    # pyright would ask the network whether there is a newer pyright.
    environment = dict(os.environ, PYRIGHT_PYTHON_IGNORE_WARNINGS="1")
    results = []
    for name, command in steps:
        _say("\n==> {}: {}".format(name, " ".join(command)))
        started = time.time()
        status = subprocess.call(
            [str(_bootstrap.PYTHON.parent / command[0])] + command[1:], cwd=str(_bootstrap.ROOT), env=environment
        )
        results.append((name, time.time() - started, status == 0))
    _say("")
    for name, seconds, passed in results:
        _say("{:16}{:>7.1f} s  {}".format(name, seconds, "ok" if passed else "FAILED"))
    return 0 if all(passed for _, _, passed in results) else 1


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
