"""`logstore follow`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import click

from logstore.cli.output import StorePath, event_id, json_option


@click.command(
    "follow",
    epilog="\b\nExamples:\n  logstore follow InternalStorage/events.db\n"
    "  logstore follow InternalStorage/events.db my-stream --after 0 --json",
)
@click.argument("db", type=StorePath)
@click.argument("stream", required=False)
@click.option(
    "--after",
    callback=event_id,
    metavar="ID",
    help="Begin after this event, 0 for the oldest there is; without it, with those that come from now on.",
)
@json_option
def command(db: Path, stream: str | None, after: int | None, *, as_json: bool) -> None:
    """Print events as they are stored, of one stream or of all, until Ctrl-C.

    Changes nothing; other processes may write, restart and compact the store meanwhile. Where events are gone it says
    so on stderr and goes on. A restore has to wait until it ends.
    """
    from logstore.cli.event_lines import EventLines
    from logstore.errors import GapError
    from logstore.ops.following import FollowedStore, follow

    def say_gap(gap: GapError) -> None:
        click.echo(str(gap), err=True)

    with contextlib.suppress(KeyboardInterrupt), FollowedStore(db) as view:
        lines = EventLines(as_json=as_json, with_stream=stream is None)
        for event in follow(view, stream, after, on_gap=say_gap, wait=time.sleep):
            lines.say(event)
