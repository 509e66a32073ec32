"""`logstore repair`."""

from __future__ import annotations

from pathlib import Path

import click

from logstore.cli.output import ProgressLine, StorePath, json_option, say_json
from logstore.cli.verify import say_finding


@click.command("repair", epilog="\b\nExample:\n  logstore repair InternalStorage/events.db")
@click.argument("db", type=StorePath)
@click.option(
    "--backups",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="DIR",
    help="Folder of the backups, when it is not the default one beside DB.",
)
@json_option
@click.pass_context
def command(context: click.Context, db: Path, backups: Path | None, *, as_json: bool) -> None:
    """Mend what `logstore verify` finds, and say what is lost.

    Damaged bytes are only ever copied aside, to `damaged/` in the log folder. May run beside the processes that use
    the store. Exit status 1 when something is still wrong afterwards.
    """
    from logstore.ops.verify.repair import repair

    with ProgressLine() as progress:
        done = repair(db, backups=backups, progress=progress)
    if as_json:
        lost = [each.as_dict() for each in done.lost]
        say_json({"actions": done.actions, "lost": lost, "report": done.report.as_dict()})
    else:
        for action in done.actions:
            click.echo(action)
        if done.lost:
            click.echo("lost, and on record:")
        for finding in done.lost:
            say_finding(finding)
        for finding in done.report.findings:
            say_finding(finding)
        click.echo("all is well" if done.report.ok else "some findings are left; what to do:")
        for line in done.report.advice():
            click.echo(f"  {line}")
    if not done.report.ok:
        context.exit(1)
