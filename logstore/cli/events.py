"""`logstore events`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import click

from logstore.cli.output import Count, StorePath, event_id, json_option


@click.command(
    "events",
    epilog="\b\nExamples:\n  logstore events InternalStorage/events.db my-stream --limit 20\n"
    "  logstore events InternalStorage/events.db my-stream --json | jq .message",
)
@click.argument("db", type=StorePath)
@click.argument("stream")
@click.option(
    "--after", callback=event_id, metavar="ID", default="0", help="Begin after this event, not with the oldest."
)
@click.option("--limit", type=Count, metavar="N", help="Most events to print.")
@json_option
def command(db: Path, stream: str, after: int, limit: int | None, *, as_json: bool) -> None:
    """Print the events of a stream, oldest first.

    A message is shortened to the line; --json has all of it, one object a line. `logstore streams` lists the streams.
    Changes nothing, also while other processes write the store.
    """
    from logstore.cli.event_lines import EventLines
    from logstore.ops.access import StoreView

    with StoreView(db) as view:
        lines = EventLines(as_json=as_json, with_stream=False)
        nothing = True
        for event in islice(view.events(stream, after), limit):
            nothing = False
            lines.say(event)
        if nothing and not view.read(stream, 0, 1):
            raise click.ClickException(f"{db} has no events of a stream {stream!r}: `logstore streams {db}` lists them")
