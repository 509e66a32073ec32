"""`logstore compact`."""

from __future__ import annotations

from pathlib import Path

import click

from logstore.cli.output import (
    Count,
    Days,
    ProgressLine,
    StorePath,
    json_option,
    say_figures,
    say_json,
    say_table,
    size,
)


@click.command(
    "compact",
    epilog="\b\nExamples:\n  logstore compact InternalStorage/events.db --retention-days 7 --dry-run\n"
    "  logstore compact InternalStorage/events.db --max-events 1000 --max-bytes 10000000000",
)
@click.argument("db", type=StorePath)
@click.option("--retention-days", type=Days, metavar="N", help="Drop events that are older.")
@click.option("--max-events", type=Count, metavar="N", help="Events of a stream to keep.")
@click.option("--max-bytes", type=Count, metavar="N", help="Bytes of segments to keep.")
@click.option("--dry-run", is_flag=True, help="Only say what would be dropped.")
@json_option
def command(
    db: Path,
    retention_days: float | None,
    max_events: int | None,
    max_bytes: int | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Drop old events and give their space back, while the store is in use.

    Without an option it drops only what belongs to ended sessions. By --max-events and --max-bytes go neither events
    of the last ten minutes nor requests that wait for their answer.
    """
    from logstore.ops.compaction.compact import compact_at
    from logstore.storage.options import Retention

    age_s = None if retention_days is None else retention_days * 86_400
    retention = Retention(max_age_s=age_s, max_events=max_events, max_bytes=max_bytes)
    with ProgressLine() as progress:
        done = compact_at(db, retention, dry_run=dry_run, progress=progress)
    dropped = [each._asdict() for each in done.dropped]
    if as_json:
        say_json({**done._asdict(), "dropped": dropped, "dry_run": dry_run})
        return
    if dropped:
        click.echo("would be dropped:" if dry_run else "dropped:")
        say_table([tuple(each) for each in done.dropped], ("by", "events", "bytes", "streams"))
    else:
        click.echo("nothing to drop")
    if not dry_run:
        say_figures(
            [
                ("segments removed", f"{done.removed_segments:,} ({size(done.removed_bytes)})"),
                ("segments written", f"{done.new_segments:,} ({done.moved_events:,} events moved)"),
                ("seconds", f"{done.seconds:.1f}"),
            ]
        )
    if done.waiting_segments:
        click.echo(f"{done.waiting_segments:,} segments go when the backup under way is done")
    for number in done.damaged_segments:
        click.echo(f"segments/{number}.segment is damaged and stays: run `logstore verify {db}`", err=True)
