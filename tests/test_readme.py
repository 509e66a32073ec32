"""The code and commands of the README and of the runbook do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_README = (_ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", _README, re.MULTILINE | re.DOTALL)


def _run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A folder in which the README's stand-alone program has run."""
    (program,) = (block for block in _blocks("python") if "asyncio.run" in block)
    assert "'progress': 1" in _run([sys.executable, "-c", program], tmp_path)
    return tmp_path


@pytest.mark.promise("documented-commands")
@pytest.mark.parametrize("package", ["MCPServer", "FastMCP"])
def test_the_server_examples_make_an_app(package: str, tmp_path: Path) -> None:
    (program,) = (block for block in _blocks("python") if f"{package}(" in block)
    assert "Starlette" in _run([sys.executable, "-c", f"{program}\nprint(type(app).__mro__)"], tmp_path)


@pytest.mark.promise("documented-commands")
def test_the_commands_to_look_inside_work(filled: Path) -> None:
    (commands,) = (block for block in _blocks("sh") if "sqlite-utils" in block)
    for command in commands.splitlines():
        assert command.startswith("sqlite-utils ")
        arguments = command.removeprefix("sqlite-utils ")
        tool = f"{sys.executable} -m sqlite_utils {arguments}"
        assert "stream" in _run(["sh", "-c", tool], filled)


def _logstore(command: str, folder: Path) -> str:
    assert command.startswith("logstore ")
    return _run(["sh", "-c", f"{sys.executable} -m {command}"], folder)


@pytest.mark.promise("documented-commands")
def test_the_commands_to_operate_a_store_work(filled: Path) -> None:
    (commands,) = (block for block in _blocks("sh") if "logstore stats" in block)
    for command in commands.splitlines():
        assert _logstore(command, filled)
    (program,) = (block for block in _blocks("python") if "EventStoreManager(" in block)
    assert _run([sys.executable, "-c", program], filled).splitlines()[1:] == ["True", "2"]


@pytest.mark.promise("documented-commands")
def test_the_commands_of_the_runbook_work(filled: Path) -> None:
    page = (_ROOT / "logstore" / "docs" / "operations.md").read_text()
    commands = [line for block in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S) for line in block.splitlines()]
    assert len(commands) > 8
    for line in commands:
        command = line.replace("STREAM", "stream_1").replace("/mnt/backups/events", "elsewhere")
        # These two wait for more, and need another machine.
        if "follow" not in command and "ssh" not in command:
            _logstore(command, filled)


def test_the_variables_of_the_table_are_read() -> None:
    source = (_ROOT / "logstore" / "config.py").read_text()
    for variable in re.findall(r"^\| `(EVENT_STORE_\w+)`", _README, re.MULTILINE):
        assert f'"{variable}"' in source


def test_the_tools_that_the_readme_names_exist() -> None:
    for tool in re.findall(r"python3 (tools/\w+\.py)", _README):
        assert (_ROOT / tool).is_file()


def test_the_pages_that_the_readme_links_to_exist() -> None:
    for page in re.findall(r"\]\((logstore/docs/[^)]+)\)", _README):
        assert (_ROOT / page).is_file()
