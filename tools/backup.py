#!/usr/bin/env python3
"""Back up a store while it is in use: `python tools/backup.py DB --to DIR`."""

import sys

try:
    from logstore.cli import main
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}. Run  python3 tools/check.py --fast  once, then this with .venv/bin/python") from None

if __name__ == "__main__":
    main(["backup", *sys.argv[1:]], prog_name="logstore")
