#!/usr/bin/env python3
"""Drop old events of a store and give their space back: `python tools/compact.py DB --retention-days 7`."""

import sys

try:
    from logstore.cli import main
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}. Run  python3 tools/check.py --fast  once, then this with .venv/bin/python") from None

if __name__ == "__main__":
    main(["compact", *sys.argv[1:]], prog_name="logstore")
