"""`logstore export`: the events of a store as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any

import click

from logstore.cli.output import ProgressLine, StorePath, json_option, shown

_GAPS_SHOWN = 20


@click.command(
    "export",
    epilog="\b\nExamples:\n"
    "  logstore export InternalStorage/events.db events.json\n"
    "  logstore export InternalStorage/events.db - --ndjson --from 2026-01-01 --to 2026-01-31 | gzip > january.gz",
)
@click.argument("db", type=StorePath)
@click.argument("file", type=click.Path(allow_dash=True))
@click.option("--stream", metavar="NAME", help="Only this stream.")
@click.option("--session", metavar="ID", help="Only this session: its id, or its session_hash in the catalogue.")
@click.option("--from", "start", metavar="TIME", help="Only events recorded from then on, such as 2026-01-31T12:00:00.")
@click.option("--to", "end", metavar="TIME", help="Only events recorded up to then; a day or second means all of it.")
@click.option("--ndjson", is_flag=True, help="One JSON object a line.")
@json_option
def command(
    db: Path,
    file: str,
    stream: str | None,
    session: str | None,
    start: str | None,
    end: str | None,
    ndjson: bool,
    as_json: bool,
) -> None:
    """Write the events of the store DB to FILE as JSON; `-` is stdout.

    Nothing of the store is changed, and it may be in use. Times are UTC unless they name a zone. Exits with 1 when
    events are missing: damaged, or lost earlier; the others are written.
    """
    from logstore.errors import ConfigurationError
    from logstore.ops.transfer.export import ExportResult, export_store
    from logstore.ops.transfer.selection import Selection

    selection = Selection(stream, session, start, end)
    try:
        selection.times_us()
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    target: Path | IO[bytes] = sys.stdout.buffer if file == "-" else Path(file)
    with ProgressLine() as progress:
        result: ExportResult = export_store(
            db, target, selection, form="ndjson" if ndjson else "json", progress=progress
        )
    if as_json:
        # Where the events themselves go to stdout, what is said of them does not.
        click.echo(_json(file, result), err=file == "-")
    else:
        _say(file, result)
    if result.gap_count:
        raise click.exceptions.Exit(1)


def _json(file: str, result: Any) -> bytes:
    import msgspec

    figures = {
        "file": file,
        "events": result.events,
        "missing": result.missing,
        "gap_count": result.gap_count,
        "gaps": msgspec.to_builtins(result.gaps),
    }
    return json.dumps(figures, ensure_ascii=False).encode(errors="backslashreplace")


def _say(file: str, result: Any) -> None:
    to_stderr = file == "-"
    click.echo(f"{result.events:,} events written to {'stdout' if to_stderr else shown(file)}", err=to_stderr)
    for gap in result.gaps[:_GAPS_SHOWN]:
        missing = "events are" if gap.missing is None else f"{gap.missing:,} events are"
        place = "at its beginning" if gap.after is None else f"after event {gap.after}"
        click.echo(f"stream {shown(gap.stream_id)}: {missing} missing {place}: {shown(gap.reason)}", err=to_stderr)
    if result.gap_count > _GAPS_SHOWN:
        click.echo(f"… {result.gap_count:,} places in all; --json lists more", err=to_stderr)
