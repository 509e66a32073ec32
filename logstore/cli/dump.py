"""`logstore dump`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from logstore.cli.output import iso_time, json_option, say_json

if TYPE_CHECKING:
    from logstore.ops.verify.dump import Record


@click.command(
    "dump",
    epilog="\b\nExamples:\n  logstore dump InternalStorage/events-log/lanes/0000/0000000001.journal\n"
    "  logstore dump InternalStorage/events-log/registry.log --json",
)
@click.argument("file", type=click.Path(dir_okay=False, exists=True, path_type=Path))
@json_option
@click.pass_context
def command(context: click.Context, file: Path, *, as_json: bool) -> None:
    """Show every record of a journal, a segment or a registry, whole or damaged.

    With --json one object a line. Exit status 1 when something in it is not whole; that may be a torn write at the end.
    """
    from logstore.ops.verify.dump import dump

    bad = 0
    if not as_json:
        click.echo(f"{'offset':>12}  {'size':>10}  {'':3}  {'what':7}  {'checksum':8}  {'id':>19}  stream or fields")
    for record in dump(file):
        bad += not record.ok
        if as_json:
            say_json(_fields(record))
        else:
            click.echo(_line(record))
    if bad:
        click.echo(f"{bad:,} places are not whole", err=True)
        context.exit(1)


def _fields(record: Record) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "what": record.what,
        "offset": record.offset,
        "size": record.size,
        "ok": record.ok,
        "checksum": _hex(record.checksum),
    }
    if record.event_id is not None:
        fields |= {"event_id": str(record.event_id), "prev": str(record.prev), "stream": record.stream}
        fields["flags"] = record.flags
    if record.time_us is not None:
        fields["time"] = iso_time(record.time_us)
    if record.detail:
        fields["detail"] = record.detail
    return fields


def _hex(checksum: int | None) -> str | None:
    return None if checksum is None else f"{checksum:08x}"


def _line(record: Record) -> str:
    said = record.detail
    if record.stream is not None:
        said = f"{record.stream}  flags {record.flags}, follows {record.prev}"
    return (
        f"{record.offset:>12}  {record.size:>10}  {'ok' if record.ok else 'BAD':3}  {record.what:7}  "
        f"{_hex(record.checksum) or '':8}  {record.event_id or '':>19}  {said}"
    )
