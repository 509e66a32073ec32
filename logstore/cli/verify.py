"""`logstore verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from logstore.cli.output import ProgressLine, StorePath, json_option, say_json, size

if TYPE_CHECKING:
    from logstore.ops.verify.report import Finding


@click.command(
    "verify",
    epilog="\b\nExamples:\n  logstore verify InternalStorage/events.db\n"
    "  logstore verify InternalStorage/events.db --quick --json",
)
@click.argument("db", type=StorePath)
@click.option("--quick", is_flag=True, help="Look only at headers, lengths and counts, for start-up.")
@click.option(
    "--backups",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="DIR",
    help="Folder of the backups, when it is not the default one beside DB.",
)
@json_option
@click.pass_context
def command(context: click.Context, db: Path, backups: Path | None, *, quick: bool, as_json: bool) -> None:
    """Read every byte of a store and of its backups, and check them against each other.

    Changes nothing, and runs beside the processes that use the store. Exit status 1 when something is wrong; losses
    that are on record, since they were repaired, are listed and are no finding.
    """
    from logstore.ops.verify.store import verify

    with ProgressLine() as progress:
        report = verify(db, quick=quick, backups=backups, progress=progress)
    if as_json:
        say_json(report.as_dict())
    else:
        for finding in report.findings:
            say_finding(finding)
        if report.known:
            click.echo("on record as lost:")
        for finding in report.known:
            say_finding(finding)
        click.echo(f"read {report.files:,} files, {size(report.bytes)}, {report.events:,} events")
        click.echo("all is well" if report.ok else f"{len(report.findings):,} findings; what to do:")
        for line in report.advice():
            click.echo(f"  {line}")
    if not report.ok:
        context.exit(1)


def say_finding(finding: Finding) -> None:
    """Print one finding: a line, and one for the events that it concerns."""
    place = "" if finding.offset is None else f" at {finding.offset}"
    extent = "" if finding.length is None else f", {finding.length} bytes"
    click.echo(f"{finding.kind}: {finding.file}{place}{extent}: {finding.reason}")
    if finding.event_ids:
        first, last = finding.event_ids[0], finding.event_ids[-1]
        ids = f"{first}" if first == last else f"{first} to {last}"
        of = f" of {', '.join(map(repr, finding.streams[:3]))}" if finding.streams else ""
        more = ", and more streams" if len(finding.streams) > 3 else ""
        click.echo(f"    {finding.events:,} events: {ids}{of}{more}")
