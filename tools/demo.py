#!/usr/bin/env python3
"""Run the demonstration in a fresh checkout: `python3 tools/demo.py`, arguments as for `logstore demo`."""

import os
import sys

import _bootstrap


def main() -> None:
    """Set up what is missing, then become `logstore demo`."""
    _bootstrap.prepare()
    python = str(_bootstrap.PYTHON)
    os.execv(python, [python, "-m", "logstore", "demo"] + sys.argv[1:])


if __name__ == "__main__":
    main()
