"""The page `logstore/docs/commands.md`: `python -m logstore.cli.reference > logstore/docs/commands.md` writes it."""

from __future__ import annotations

import click

from logstore.cli import main

_WIDTH = 100
_HELP = main.context_settings["help_option_names"]


def reference() -> str:
    """Return the help of the command and of every subcommand as Markdown."""
    with click.Context(main, info_name="logstore", terminal_width=_WIDTH, help_option_names=_HELP) as root:
        sections = [("logstore", main.get_help(root))]
        for name in main.list_commands(root):
            command = main.get_command(root, name)
            assert command is not None
            with click.Context(command, root, name, terminal_width=_WIDTH) as own:
                sections.append((f"logstore {name}", command.get_help(own)))
    intro = "# Commands\n\nWhat `logstore -h` and `logstore COMMAND -h` print.\n"
    return "\n".join([intro, *(f"## {title}\n\n```\n{text}\n```\n" for title, text in sections)])


if __name__ == "__main__":
    click.echo(reference(), nl=False)
