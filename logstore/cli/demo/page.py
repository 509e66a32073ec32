"""Headings, lines and tables, for a terminal of 80 columns or more."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Final

import click
from tabulate import tabulate

_INDENT: Final = "   "
_LABEL_WIDTH: Final = 9
_COMMAND_WIDTH: Final = 75


def heading(text: str) -> None:
    """Begin a scene."""
    click.echo()
    click.secho(text, bold=True)


def line(text: str = "") -> None:
    """Print a line of a scene."""
    click.echo(f"{_INDENT}{text}".rstrip())


def fact(label: str, *lines: str) -> None:
    """Print lines with a label before the first one."""
    for each in lines:
        line(f"{label:<{_LABEL_WIDTH}}{each}")
        label = ""


def table(rows: Sequence[Sequence[str]], headers: Sequence[str], *, right: int | None = None) -> None:
    """Print rows in columns, all to the left but for one that may be to the right."""
    align = ["right" if column == right else "left" for column in range(len(headers))]
    block(tabulate(rows, headers=headers, disable_numparse=True, colalign=align if rows else None))


def block(text: str) -> None:
    """Print lines as they are."""
    for each in text.splitlines():
        line(each)


def command(words: Sequence[str]) -> None:
    """Print a command to copy, in several lines where it is long."""
    text = "$"
    for word in map(shlex.quote, words):
        if len(text) + 1 + len(word) > _COMMAND_WIDTH and text != "$":
            line(f"{text} \\")
            text = "     "
        text += f" {word}"
    line(text)


def verdict(text: str, *, good: bool) -> None:
    """Print what it all comes to."""
    click.echo()
    click.secho(text, fg="green" if good else "red", bold=True)


def span(first: int, last: int) -> str:
    """Return `steps 3 to 7`, or `step 3`."""
    return f"step {first}" if first == last else f"steps {first} to {last}"
