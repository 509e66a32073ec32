"""The command line as a whole: help, version, wrong usage, and what it does not load."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import logstore
from logstore.cli import _Commands, main
from logstore.errors import NotAStoreError

COMMANDS = main.list_commands(click.Context(main))


def test_help_lists_every_command_and_an_example() -> None:
    result = CliRunner().invoke(main, ["-h"])
    assert result.exit_code == 0
    assert "demo" in COMMANDS
    for command in COMMANDS:
        assert f"\n  {command} " in result.output
    assert "Example:\n    logstore demo" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(command: str) -> None:
    result = CliRunner().invoke(main, [command, "-h"])
    assert result.exit_code == 0
    assert f"  logstore {command}" in result.output.partition("Example")[2]


@pytest.mark.promise("mcp-loaded-lazily")
@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_loads_nothing_that_takes_long(arguments: list[str]) -> None:
    code = f"""
import json, sys
from logstore.cli import _Commands, main
try:
    main({arguments!r})
finally:
    print(json.dumps(list(sys.modules)))
"""
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    loaded = set(json.loads(output.splitlines()[-1]))
    assert not loaded & {"mcp", "mcp_types", "pydantic", "starlette", "uvicorn", "sqlite_utils", "sqlite3"}


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.output) == (0, f"logstore {logstore.__version__}\n")


@pytest.mark.parametrize(
    "arguments", [["nothing-of-ours"], ["--nothing-of-ours"], ["demo", "--events", "2"], ["demo", "--events", "many"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.output


@pytest.mark.promise("errors-are-one-line")
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NotAStoreError("events.db is a folder"), "Error: events.db is a folder\n"),
        (PermissionError(13, "Permission denied", "events.db"), "Error: [Errno 13] Permission denied: 'events.db'\n"),
    ],
)
def test_an_expected_failure_is_one_line_and_exits_with_1(error: Exception, text: str) -> None:
    @click.command()
    def failing() -> None:
        raise error

    class OneCommand(_Commands):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            return failing

    result = CliRunner().invoke(OneCommand("logstore"), ["failing"])
    assert (result.exit_code, result.output) == (1, text)
