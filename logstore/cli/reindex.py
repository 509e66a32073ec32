"""`logstore reindex`."""

from __future__ import annotations

from pathlib import Path

import click

from logstore.cli.output import ProgressLine, StorePath, json_option, say_figures, say_json


@click.command("reindex", epilog="\b\nExample:\n  logstore reindex InternalStorage/events.db")
@click.argument("db", type=StorePath)
@json_option
def command(db: Path, *, as_json: bool) -> None:
    """Make the catalogue again from the segments, also while the store is in use.

    For a catalogue that is missing, damaged, or an old copy. It is made beside its place and put there when it is
    whole; what retention dropped stays dropped when the catalogue that is there can be read.
    """
    from logstore.ops.reindex import reindex_at

    with ProgressLine() as progress:
        done = reindex_at(db, progress)
    if as_json:
        say_json({**done._asdict(), "events_s": done.events_s})
        return
    say_figures(
        [
            ("events", done.events),
            ("streams", done.streams),
            ("segments", done.segments),
            ("seconds", f"{done.seconds:.1f}"),
            ("events a second", done.events_s),
        ]
    )
