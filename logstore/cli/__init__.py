"""The `logstore` command.

Each subcommand is a module of this package that defines `command`, loaded when it is asked for. At its top it imports
nothing that takes long, so that help and usage errors come at once, and no command waits for what another one needs.
"""

from __future__ import annotations

import errno
from importlib import import_module
from keyword import iskeyword
from typing import Any, Final, cast

import click

from logstore.cli.output import accept_any_terminal
from logstore.errors import LogstoreError
from logstore.version import __version__

_COMMANDS: Final = (
    "demo",
    "stats",
    "streams",
    "events",
    "follow",
    "dump",
    "verify",
    "repair",
    "compact",
    "backup",
    "restore",
    "maintain",
    "reindex",
    "doc",
    "export",
    "import",
)


class _Commands(click.Group):
    """Loads subcommands at need, and turns expected failures into one line and exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        # No module can have the name of a keyword.
        module = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name
        return cast("click.Command", import_module(f"{__name__}.{module}").command)

    def invoke(self, ctx: click.Context) -> Any:
        accept_any_terminal()
        try:
            return super().invoke(ctx)
        except LogstoreError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                # Whoever read the output has seen enough; click ends quietly.
                raise
            raise click.ClickException(str(error)) from error


@click.group(
    "logstore",
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExample:\n  logstore demo     a broken connection resumes, before your eyes",
)
@click.version_option(__version__, prog_name="logstore", message="%(prog)s %(version)s")
def main() -> None:
    """Event store for resumable MCP streams.

    Exit status: 0 fine, 1 something was found or failed, 2 wrong usage.
    """
