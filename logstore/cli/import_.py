"""`logstore import`: events from an export, or from another kind of store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, Any

import click

from logstore.cli.output import ProgressLine, StorePath, json_option, say_json, shown

_SHOWN = 20


@click.command(
    "import",
    epilog="\b\nExamples:\n"
    "  logstore import InternalStorage/events.db events.json\n"
    "  ssh old-host logstore export events.db - --ndjson | logstore import events.db -",
)
@click.argument("db", type=StorePath)
@click.argument("file", type=click.Path(allow_dash=True))
@json_option
def command(db: Path, file: str, as_json: bool) -> None:
    """Add the events in FILE to the store DB, which is made when there is none; `-` is stdin.

    FILE is what `logstore export` wrote, JSON or a SQLite database of the original event store, or a SQLite database
    of mcp-persist. Importing twice adds nothing twice, and after a failure importing again adds the rest. Exits with 1
    when something was left out.
    """
    from logstore.ops.transfer.importing import ImportResult, import_events

    source: Path | IO[bytes] = sys.stdin.buffer if file == "-" else Path(file)
    with ProgressLine() as progress:
        result: ImportResult = import_events(db, source, progress=progress)
    if as_json:
        say_json(_figures(result))
    else:
        _say(result)
    if not result.complete:
        raise click.exceptions.Exit(1)


def _figures(result: Any) -> dict[str, Any]:
    return {
        "added": result.added,
        "already_there": result.already_there,
        "dropped": result.dropped,
        "conflict_count": result.conflict_count,
        "conflicts": [each._asdict() for each in result.conflicts],
        "invalid_count": result.invalid_count,
        "invalid": [each._asdict() for each in result.invalid],
        "ended": result.ended,
    }


def _say(result: Any) -> None:
    click.echo(f"{result.added:,} events added, {result.already_there:,} were there already")
    if result.dropped:
        click.echo(f"{result.dropped:,} events stay away: retention has dropped them here")
    for count, what, listed in (
        (result.conflict_count, "events are in conflict with the store's, and were left out", result.conflicts),
        (result.invalid_count, "events cannot be stored, and were left out", result.invalid),
    ):
        if count:
            click.echo(f"{count:,} {what}:")
            for each in listed[:_SHOWN]:
                click.echo(f"  {each.place}: {shown(each.reason)}")
            if count > _SHOWN:
                click.echo("  … --json lists more")
    if result.ended is not None:
        click.echo(f"{shown(result.ended)}; what comes before that place was imported")
