"""`logstore demo`: a real server and a real client, a broken connection and the resume, a killed server and its store.

| file | holds |
| --- | --- |
| `run.py` | the demonstration from start to end |
| `story.py` | its scenes |
| `server.py` | the server, in a process of its own; `process.py` is the demonstration's hold on it |
| `relay.py` | what stands between client and server, and can cut |
| `caller.py` | the client |
| `account.py` | whether anything was lost, doubled or out of order |
| `growing.py` | lists of what arrived, to wait for |
| `look.py` | the store's files, and what `sqlite-utils` says of them |
| `page.py` | headings, lines and tables |
"""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    "demo",
    epilog="\b\nExamples:\n  logstore demo\n  logstore demo --events 1000 --dir ./demo-store",
)
@click.option(
    "--events",
    type=click.IntRange(3, 100_000),
    metavar="N",
    default=20,
    show_default=True,
    help="Progress notifications that the tool sends, 3 or more.",
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the store in this folder, made if there is none.",
)
@click.option("--keep", is_flag=True, help="Keep the store; without --dir, in a temporary folder.")
@click.pass_context
def command(ctx: click.Context, events: int, folder: Path | None, keep: bool) -> None:
    """Show a broken connection that resumes.

    Starts an MCP server and a client on this machine, cuts their connection in the middle of a tool call, lets the
    client resume, kills the server with SIGKILL, and reads from disk what it stored.

    Exits with 1 when an event was lost, doubled or out of order.
    """
    click.echo("A real MCP server, a real client, a broken connection.")
    from logstore.cli.demo.run import run

    ctx.exit(run(events, folder, keep=keep))
