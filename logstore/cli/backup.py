"""`logstore backup`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from logstore.cli.output import Days, ProgressLine, StorePath, json_option, say_figures, say_json, say_table, size

if TYPE_CHECKING:
    from logstore.ops.backup.pool import FolderTarget


@click.command(
    "backup",
    epilog="\b\nExamples:\n  logstore backup InternalStorage/events.db\n"
    "  logstore backup InternalStorage/events.db --to /mnt/backups --delete-older-than 30\n"
    "  logstore backup InternalStorage/events.db --list",
)
@click.argument("db", type=StorePath)
@click.option(
    "--to",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for the backups of this store (default: events-backups beside events.db).",
)
@click.option(
    "--delete-older-than",
    "delete_days",
    type=Days,
    metavar="DAYS",
    help="Then remove backups that are older; the newest whole one stays.",
)
@click.option("--list", "only_list", is_flag=True, help="List the backups that there are, and make none.")
@json_option
@click.pass_context
def command(
    ctx: click.Context, db: Path, folder: Path | None, delete_days: float | None, *, only_list: bool, as_json: bool
) -> None:
    """Back up a store while it is in use.

    Each backup is complete in itself, and only what the folder lacks is copied: the second one costs almost nothing.
    Restore with `logstore restore`.

    Exits with 1 when files of the store were damaged: they are copied as they are.
    """
    from logstore.ops.backup.pool import FolderTarget, default_backups

    target = FolderTarget(folder or default_backups(db))
    if only_list:
        if delete_days is not None:
            raise click.UsageError("--list changes nothing: leave out --delete-older-than")
        ctx.exit(_say_list(target, as_json=as_json))
    from logstore.ops.access import open_existing
    from logstore.ops.backup.create import create_backup
    from logstore.ops.backup.rotation import delete_old

    store = open_existing(db)
    try:
        with ProgressLine() as progress:
            done = create_backup(store, target, progress=progress)
    finally:
        store.close(empty=True)
    deleted = delete_old(target, delete_days) if delete_days is not None else 0
    if as_json:
        say_json({**done._asdict(), "deleted": deleted})
    else:
        figures = [
            ("backup", done.path),
            ("copied", size(done.bytes_copied)),
            ("had already", size(done.bytes_reused)),
            ("files", done.files),
            ("events", done.events),
        ]
        say_figures(figures + ([("old ones removed", deleted)] if delete_days is not None else []))
    for line in done.damaged:
        click.echo(f"damaged in the store: {line}; run `logstore verify {db}`", err=True)
    ctx.exit(1 if done.damaged else 0)


def _say_list(target: FolderTarget, *, as_json: bool) -> int:
    from logstore.ops.backup.rotation import list_backups

    backups = list_backups(target)
    if as_json:
        say_json([backup._asdict() for backup in backups])
    else:
        rows = [
            (backup.path, backup.begun, backup.events, size(backup.bytes), backup.problem or "whole")
            for backup in backups
        ]
        say_table(rows, ("backup", "begun", "events", "size", "state"))
    return 1 if any(backup.problem for backup in backups) else 0
