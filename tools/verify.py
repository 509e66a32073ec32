#!/usr/bin/env python3
"""Read every byte of a store and check it: `python tools/verify.py DB`, arguments as for `logstore verify`."""

import sys

try:
    from logstore.cli import main
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}. Run  python3 tools/check.py --fast  once, then this with .venv/bin/python") from None

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]], prog_name="logstore")
