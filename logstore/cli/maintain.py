"""`logstore maintain`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from logstore.cli.output import StorePath, json_option, say_json, say_table, size


@click.command("maintain", epilog="\b\nExample:\n  logstore maintain InternalStorage/events.db")
@click.argument("db", type=StorePath)
@json_option
@click.pass_context
def command(ctx: click.Context, db: Path, *, as_json: bool) -> None:
    """Do everything that a store needs, now: retention, compaction, a backup when one is due, rotation, validation.

    A running server does the same by itself. Settings come from the `EVENT_STORE_…` variables. Exits with 1 when a
    task failed or the validation found something.
    """
    import asyncio

    from logstore.config import get_config
    from logstore.ops.maintenance import run_maintenance_tasks

    results = asyncio.run(run_maintenance_tasks(db, get_config("from_env").__dict__))
    if as_json:
        say_json(results)
    else:
        say_table([(task, _in_words(task, result)) for task, result in results.items()], ("task", "result"))
        for error in results["validation"]["errors"]:
            click.echo(error)
    failed = any("error" in result for result in results.values()) or not results["validation"]["valid"]
    ctx.exit(1 if failed else 0)


def _in_words(task: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"failed: {result['error']}"
    if "skipped" in result:
        return f"not now: {result['skipped']}"
    return _WORDS[task](result)


def _retention(result: dict[str, Any]) -> str:
    dropped = sum(each["events"] for each in result["dropped"])
    done = [(dropped, "events dropped"), (result["moved_events"], "events moved")]
    done.append((result["removed_segments"], "segments removed"))
    return ", ".join(f"{count:,} {what}" for count, what in done if count) or "nothing to do"


def _validation(result: dict[str, Any]) -> str:
    read = f"{result['events']:,} events and {size(result['bytes'])} read"
    return f"all is well, {read}" if result["valid"] else f"{len(result['errors']):,} findings, {read}"


_WORDS: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "retention": _retention,
    "backup": lambda result: str(result["path"]),
    "rotation": lambda result: f"{result['deleted']:,} backups removed",
    "validation": _validation,
}
