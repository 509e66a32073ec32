"""How commands speak: tables for people, JSON for programs, progress on stderr.

The JSON is a stable contract: one object a command (one a line where a command lists things without end), event ids as
text, times in ISO 8601 with their zone, sizes in bytes.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click

_FIRST_WORD_S: Final = 1.0
_BETWEEN_S: Final = 0.5
_LINE_WITHOUT_TERMINAL: Final = 200

StorePath: Final = click.Path(dir_okay=True, path_type=Path)
"""The type of a `DB` argument: the catalogue of a store."""


Count: Final = click.IntRange(1, 10**15)
"""The type of an option that takes how many of something."""


class _Days(click.FloatRange):
    """Takes an age in days; what is no number at all is in no range, and out of none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        days = super().convert(value, param, ctx)
        if math.isnan(days):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return days


Days: Final = _Days(0, 36_500)
"""The type of an option that takes an age in days."""


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json`, given to the command as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def event_id(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Check the value of an option that takes an event id, 0 for none: its `callback`."""
    from logstore.storage.ids import parse_event_id

    if value is None or value == "0":
        return None if value is None else 0
    number = parse_event_id(value)
    if number is None:
        raise click.BadParameter(
            f"{value!r} is not an event id: those are whole numbers of up to 19 digits", ctx, param
        )
    return number


def accept_any_terminal() -> None:
    """Have characters that a terminal cannot show written as escapes, where Python would end with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say_json(figures: Any) -> None:
    """Print one JSON value on one line, in UTF-8 whatever the terminal speaks."""
    # What of a file name is no text becomes half a surrogate pair, which in JSON has an escape.
    click.echo(json.dumps(figures, ensure_ascii=False).encode(errors="backslashreplace"))


def say_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> None:
    """Print a table; numbers go to the right, with their thousands apart."""
    from tabulate import tabulate

    shown = [[f"{cell:,}" if type(cell) is int else cell for cell in row] for row in rows]
    numeric = [bool(rows) and all(type(row[place]) in (int, float) for row in rows) for place in range(len(headers))]
    align = ["right" if right else "left" for right in numeric]
    table = tabulate(shown, headers=headers, tablefmt="simple", colalign=align if rows else None, disable_numparse=True)
    click.echo("\n".join(line.rstrip() for line in table.splitlines()))


def say_figures(figures: Sequence[tuple[str, Any]]) -> None:
    """Print names and values below each other."""
    width = max((len(name) for name, _ in figures), default=0)
    for name, value in figures:
        click.echo(f"{name:<{width}}  {f'{value:,}' if type(value) is int else value}")


def iso_time(time_us: int) -> str:
    """Return a time, given in microseconds since 1970, as text."""
    return datetime.fromtimestamp(time_us / 1_000_000, UTC).isoformat(timespec="microseconds")


def short_time(iso: str, *, milliseconds: bool = False) -> str:
    """Return a time in ISO form, which is UTC, for people: to the second or millisecond and without its zone."""
    return iso[: 23 if milliseconds else 19].replace("T", " ")


def age(seconds: float) -> str:
    """Return a time span for people."""
    for unit_s, unit in ((86_400, "days"), (3_600, "hours"), (60, "min")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def ago(iso: str) -> str:
    """Return how long a time in ISO form is past, for people."""
    passed_s = (datetime.now(UTC) - datetime.fromisoformat(iso)).total_seconds()
    return f"{age(passed_s)} ago" if passed_s >= 0 else f"in {age(-passed_s)}"


def shown(text: str, width: int | None = None) -> str:
    """Return text that cannot disturb a terminal or its line: what does not print is escaped.

    Args:
        text: What to show.
        width: Most characters, None for all; what is cut off leaves an ellipsis.
    """
    if width is not None:
        cut = len(text) > width
        text = text[:width]
        shown_text = _printable(text)
        return f"{shown_text[: width - 1]}…" if cut or len(shown_text) > width else shown_text
    return _printable(text)


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def line_width() -> int:
    """Return how many characters a line may have: those of the terminal, if the output goes to one."""
    return shutil.get_terminal_size((_LINE_WITHOUT_TERMINAL, 0)).columns


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
