"""`logstore restore`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from logstore.cli.output import ProgressLine, StorePath, json_option, say_figures, say_json, size


def _moment(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(value) if value is not None else None
    except ValueError:
        raise click.BadParameter(f"{value!r} is no time in ISO 8601, such as 2026-11-23T12:00:00+01:00") from None


@click.command(
    "restore",
    epilog="\b\nExamples:\n  logstore restore InternalStorage/events-backups InternalStorage/events.db\n"
    "  logstore restore InternalStorage/events-backups/20261123T101530.123456Z.backup.json other/events.db\n"
    "  logstore restore /mnt/backups InternalStorage/events.db --until 2026-11-23T12:00:00Z",
)
@click.argument("backup", type=click.Path(path_type=Path))
@click.argument("db", type=StorePath)
@click.option(
    "--until",
    callback=_moment,
    metavar="TIME",
    help="Restore of each stream only what comes before its first event that is later; UTC when it has no zone.",
)
@json_option
@click.pass_context
def command(ctx: click.Context, backup: Path, db: Path, until: datetime | None, *, as_json: bool) -> None:
    """Make a store of a backup, in an empty place or in the place of a store that no process has open.

    BACKUP is a backup's .backup.json file, or a folder of backups, of which the newest is taken. Every byte is verified
    first: a damaged backup is refused, and the store that is there stays as it is.

    Exits with 1 when it refuses, or when files were damaged already when they were backed up.
    """
    from logstore.ops.backup.restore import restore

    with ProgressLine() as progress:
        done = restore(backup, db, until=until, progress=progress)
    if as_json:
        say_json(done._asdict())
    else:
        figures = [
            ("restored", done.path),
            ("from", done.backup),
            ("copied", f"{size(done.bytes)} in {done.files:,} files"),
            ("events", done.events),
        ]
        say_figures(figures + ([("left out as later", done.left_out)] if until else []))
    for line in done.damaged:
        click.echo(f"was damaged when it was backed up: {line}", err=True)
    ctx.exit(1 if done.damaged else 0)
