"""`logstore streams`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from logstore.cli.output import Count, StorePath, ago, json_option, say_json, say_table, short_time, shown

if TYPE_CHECKING:
    from logstore.ops.statistics_index import StreamFigures

_NAME_WIDTH: Final = 100
_ORDERS: Final[dict[str, Callable[[StreamFigures], Any]]] = {
    "newest": lambda stream: -int(stream.last_event_id),
    "name": lambda stream: stream.stream,
    "events": lambda stream: -stream.events,
    "bytes": lambda stream: -stream.bytes,
}


@click.command(
    "streams",
    epilog="\b\nExamples:\n  logstore streams InternalStorage/events.db --sort bytes --limit 10\n"
    "  logstore streams InternalStorage/events.db --like GET_stream --json",
)
@click.argument("db", type=StorePath)
@click.option("--like", metavar="TEXT", default="", help="Only streams whose name holds this text.")
@click.option(
    "--sort",
    type=click.Choice(list(_ORDERS)),
    default="newest",
    show_default=True,
    help="The stream with the newest event first, or with the most events or bytes, or by name.",
)
@click.option("--limit", type=Count, metavar="N", help="Most streams to print.")
@json_option
def command(db: Path, like: str, sort: str, limit: int | None, *, as_json: bool) -> None:
    """List the streams of a store, with how much each holds.

    Changes nothing, also while other processes write the store.
    """
    from msgspec import to_builtins

    from logstore.ops.access import StoreView
    from logstore.ops.statistics_index import stream_figures

    with StoreView(db) as view:
        found = [stream for stream in stream_figures(view) if like in stream.stream]
    found.sort(key=_ORDERS[sort])
    streams = found[:limit]
    if as_json:
        say_json({"streams": to_builtins(streams)})
        return
    say_table(
        [
            (
                stream.events,
                stream.bytes,
                short_time(stream.first_time),
                short_time(stream.last_time),
                ago(stream.last_time),
                stream.last_event_id,
                shown(stream.stream, _NAME_WIDTH),
            )
            for stream in streams
        ],
        ("events", "bytes", "first (UTC)", "last (UTC)", "", "last event", "stream"),
    )
    if len(streams) < len(found):
        click.echo(f"{len(found) - len(streams):,} more streams", err=True)
