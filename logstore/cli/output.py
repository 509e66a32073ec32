"""How commands speak: tables for people, JSON for programs, progress on stderr.

The JSON is a stable contract: one object a command (one a line where a command lists things without end), event ids as
text, times in ISO 8601 with their zone, sizes in bytes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click

_FIRST_WORD_S: Final = 1.0
_BETWEEN_S: Final = 0.5

StorePath: Final = click.Path(dir_okay=True, path_type=Path)
"""The type of a `DB` argument: the catalogue of a store."""


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json`, given to the command as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def say_json(figures: Any) -> None:
    """Print one JSON value on one line."""
    click.echo(json.dumps(figures, ensure_ascii=False))


def say_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> None:
    """Print a table; numbers go to the right, with their thousands apart."""
    from tabulate import tabulate

    shown = [[f"{cell:,}" if type(cell) is int else cell for cell in row] for row in rows]
    numeric = [bool(rows) and all(type(row[place]) in (int, float) for row in rows) for place in range(len(headers))]
    align = ["right" if right else "left" for right in numeric]
    click.echo(
        tabulate(shown, headers=headers, tablefmt="simple", colalign=align if rows else None, disable_numparse=True)
    )


def say_figures(figures: Sequence[tuple[str, Any]]) -> None:
    """Print names and values below each other."""
    width = max((len(name) for name, _ in figures), default=0)
    for name, value in figures:
        click.echo(f"{name:<{width}}  {f'{value:,}' if type(value) is int else value}")


def iso_time(time_us: int) -> str:
    """Return a time, given in microseconds since 1970, as text."""
    return datetime.fromtimestamp(time_us / 1_000_000, UTC).isoformat(timespec="microseconds")


def size(bytes_: int) -> str:
    """Return a size for people."""
    amount = float(bytes_)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{bytes_} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


class ProgressLine:
    """Tells on stderr how far a long operation is, once it has taken a second; see `logstore.ops.progress`."""

    def __init__(self) -> None:
        self._next_s = time.monotonic() + _FIRST_WORD_S
        self._on_a_line = False

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Say something, unless that was just done."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + _BETWEEN_S
        of = f"{done:,} of {total:,}" if total is not None else f"{done:,}"
        if sys.stderr.isatty():
            # Over what was said before.
            click.echo(f"\r{what}: {of}\033[K", err=True, nl=False)
            self._on_a_line = True
        else:
            click.echo(f"{what}: {of}", err=True)

    def __enter__(self) -> ProgressLine:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the line to what comes next."""
        if self._on_a_line:
            click.echo("\r\033[K", err=True, nl=False)
