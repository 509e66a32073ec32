"""Where a store lies: its files, and the `sqlite-utils` commands that look inside."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from logstore.cli.demo import page

_PURPOSES: Final[Mapping[str, str]] = {
    ".db": "index (SQLite)",
    ".db-shm": "SQLite's own",
    ".db-wal": "SQLite's own",
    ".journal": "events as they came",
    ".json": "published figures",
    ".log": "sessions",
    ".segment": "events by stream",
    "marks": "how far to read",
    "state": "ids given out",
}
"""What a file is for, by the end of its name."""


def show_files(catalogue: Path) -> None:
    """Print a table of the files of a store that are not empty."""
    folder = catalogue.parent
    log = catalogue.with_name(f"{catalogue.stem}-log")
    sizes = {path: path.stat().st_size for path in sorted([*folder.glob(f"{catalogue.name}*"), *log.rglob("*")])}
    page.table(
        [
            (str(path.relative_to(folder)), f"{size:,}", _PURPOSES[path.suffix or path.name])
            for path, size in sizes.items()
            if size and path.is_file()
        ],
        ("file", "bytes", ""),
        right=1,
    )


def show_index(catalogue: Path, event_id: str) -> None:
    """Print `sqlite-utils` commands that look at a store and at one of its events, and what they say."""
    _run("rows", str(catalogue), "stream_summary", *("-c", "name", "-c", "events", "-c", "bytes"), "-t")
    page.line()
    _run("rows", str(catalogue), "events", "--where", f"event_id = {event_id}", "-t")


def _run(*arguments: str) -> None:
    page.command([_sqlite_utils(), *arguments])
    done = subprocess.run(
        [sys.executable, "-m", "sqlite_utils", *arguments], capture_output=True, text=True, check=False
    )
    page.block(done.stdout or done.stderr)


def _sqlite_utils() -> str:
    """Return what to type for it: its name, or its path when that is not on the search path."""
    beside = Path(sys.executable).with_name("sqlite-utils")
    if shutil.which("sqlite-utils") or not beside.exists():
        return "sqlite-utils"
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
