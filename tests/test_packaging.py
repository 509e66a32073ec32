"""What is in the repository, in the package, and behind `import logstore`."""

import importlib.metadata
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import logstore

ROOT = Path(__file__).parent.parent
TOP = {"README.md", "bench", "logstore", "pyproject.toml", "tests", "tools"}
PUBLIC = {"EventStoreConfig", "InMemoryEventStore", "PersistentEventStore", "create_event_store", "get_config"}


def test_nothing_else_stands_at_the_top_of_the_repository() -> None:
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    entries = {Path(file).parts[0] for file in files if file}
    assert {entry for entry in entries if not entry.startswith(".")} == TOP


@pytest.mark.promise("mcp-loaded-lazily")
@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("logstore", {"mcp", "mcp_types", "pydantic", "starlette", "sqlite_utils"}),
        ("logstore.storage", {"mcp", "mcp_types", "pydantic", "starlette", "sqlite_utils.cli"}),
        ("logstore.cli", {"mcp", "mcp_types", "pydantic", "starlette", "sqlite_utils.cli"}),
    ],
)
def test_an_import_loads_only_what_it_needs(module: str, heavy: set[str]) -> None:
    code = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    loaded = set(json.loads(subprocess.check_output([sys.executable, "-c", code])))
    assert not loaded & heavy


def test_every_public_name_can_be_imported() -> None:
    assert set(logstore.__all__) >= PUBLIC
    for name in logstore.__all__:
        assert getattr(logstore, name) is not None
        assert name in dir(logstore)


def test_an_unknown_name_is_an_attribute_error() -> None:
    name = "nothing_of_ours"
    with pytest.raises(AttributeError, match=name):
        getattr(logstore, name)


@pytest.mark.parametrize("name", ["logstore", "mcp-logstore"])
def test_the_command_is_installed(name: str) -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    assert callable(command.load())


def test_the_module_runs_as_a_command() -> None:
    help_text = subprocess.check_output([sys.executable, "-m", "logstore", "--help"], text=True)
    assert "demo" in help_text


def test_the_wheel_holds_types_and_documentation(tmp_path: Path) -> None:
    subprocess.check_call([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT)
    (wheel,) = tmp_path.glob("mcp_logstore-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    pages = {f"logstore/docs/{page.name}" for page in (ROOT / "logstore" / "docs").glob("*.md")}
    assert pages
    assert names >= {"logstore/py.typed", "logstore/__init__.py", *pages}
    assert {Path(name).parts[0] for name in names if ".dist-info/" not in name} == {"logstore"}
