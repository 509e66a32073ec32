"""The set-up that `tools/check.py` and `tools/demo.py` do by themselves."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import _bootstrap

TOOLS = Path(_bootstrap.__file__).parent
PYPROJECT = b"[project]\n"

# What Python 3.5 cannot read, or reads and cannot evaluate.
NEW_SYNTAX = (ast.JoinedStr, ast.NamedExpr, ast.AnnAssign, ast.Match, ast.AsyncFunctionDef)


@pytest.mark.parametrize("name", ["_bootstrap.py", "check.py", "demo.py"])
def test_any_python_3_can_read_the_scripts(name: str) -> None:
    tree = ast.parse((TOOLS / name).read_text(), feature_version=(3, 7))
    for node in ast.walk(tree):
        assert not isinstance(node, NEW_SYNTAX), f"{name}:{node.lineno} is too new"
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            annotations = [node.returns, *(argument.annotation for argument in arguments)]
            assert not node.args.posonlyargs, f"{name}:{node.lineno} is too new"
            assert all(annotation is None or is_old(annotation) for annotation in annotations), (
                f"{name}:{node.lineno}: quote the annotation, an old Python evaluates it"
            )


def is_old(annotation: ast.expr) -> bool:
    return isinstance(annotation, ast.Name | ast.Attribute | ast.Constant)


def test_an_old_python_is_told_how_to_get_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    problem = _bootstrap.unfit_python((3, 9), "tools/check.py")
    assert problem is not None
    assert "3.11 or newer; this is 3.9" in problem
    assert "apt install python3" in problem
    assert "python3.11 tools/check.py" in problem


def test_an_old_python_is_told_which_newer_one_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_python(tmp_path / "python3.12", "exit 0")
    fake_python(tmp_path / "python3.13", "exit 127")
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = _bootstrap.unfit_python((3, 9), "tools/check.py")
    assert problem is not None
    assert problem.endswith(f"Run:  {tmp_path}/python3.12 tools/check.py")


@pytest.mark.parametrize("version", [(3, 11), (3, 14), (4, 0)])
def test_a_newer_python_is_taken(version: tuple[int, int]) -> None:
    assert _bootstrap.unfit_python(version, "tools/check.py") is None


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    problem = _bootstrap.missing_modules("tools/check.py")
    assert problem is not None
    assert f"lacks {module}," in problem
    assert f"apt install python3.{sys.version_info.minor}-venv" in problem


def test_a_complete_python_lacks_nothing() -> None:
    assert _bootstrap.missing_modules("tools/check.py") is None


def test_the_first_run_makes_the_venv(tmp_path: Path) -> None:
    assert plan(tmp_path / "venv", extra="dev") == ("make", ["dev"])


def test_the_second_run_does_nothing(tmp_path: Path) -> None:
    venv = finished_venv(tmp_path, ["dev"])
    assert plan(venv, extra="dev") == ("ready", ["dev"])


def test_another_pyproject_is_installed_again_and_once(tmp_path: Path) -> None:
    venv = finished_venv(tmp_path, ["dev"])
    assert plan(venv, extra="dev", pyproject=b"[project]\n# changed\n") == ("install", ["dev"])
    _bootstrap.begin(venv)
    _bootstrap.finish(venv, b"[project]\n# changed\n", ["dev"])
    assert plan(venv, extra="dev", pyproject=b"[project]\n# changed\n") == ("ready", ["dev"])


def test_the_checks_after_the_demo_install_the_rest(tmp_path: Path) -> None:
    venv = finished_venv(tmp_path, [])
    assert plan(venv, extra="dev") == ("install", ["dev"])


def test_the_demo_after_the_checks_installs_nothing_and_takes_nothing_away(tmp_path: Path) -> None:
    venv = finished_venv(tmp_path, ["dev"])
    assert plan(venv, extra=None) == ("ready", ["dev"])
    assert plan(venv, extra=None, pyproject=b"changed") == ("install", ["dev"])


def test_a_half_made_venv_is_made_anew(tmp_path: Path) -> None:
    venv = finished_venv(tmp_path, ["dev"])
    _bootstrap.begin(venv)
    assert plan(venv, extra="dev") == ("make", ["dev"])


@pytest.mark.parametrize("script", ["exit 1", "echo 3.9"])
def test_a_venv_whose_python_is_broken_or_another_is_made_anew(tmp_path: Path, script: str) -> None:
    venv = finished_venv(tmp_path, ["dev"])
    fake_python(venv / "bin" / "python", script)
    assert plan(venv, extra="dev") == ("make", ["dev"])


def test_a_venv_that_somebody_else_made_is_installed_into(tmp_path: Path) -> None:
    venv = finished_venv(tmp_path, [])
    (venv / "logstore-setup.json").unlink()
    assert plan(venv, extra="dev") == ("install", ["dev"])


@pytest.mark.parametrize("script", ["check.py", "demo.py"])
def test_a_failed_set_up_leaves_no_traceback(tmp_path: Path, script: str) -> None:
    """The scripts run in a checkout of their own, whose package index does not exist."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("_bootstrap.py", script):
        (tools / name).write_bytes((TOOLS / name).read_bytes())
    (tmp_path / "pyproject.toml").write_bytes(PYPROJECT)
    venv = finished_venv(tmp_path, [])
    fake_python(venv / "bin" / "python", f"[ $2 = pip ] && exit 1; echo 3.{sys.version_info.minor}")
    (tmp_path / "pyproject.toml").write_bytes(b"[project]\n# changed\n")
    result = subprocess.run([sys.executable, str(tools / script)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pyproject.toml changed: installing" in result.stdout
    assert "pip failed" in result.stderr
    assert "Traceback" not in result.stderr
    assert plan(venv, extra=None) == ("ready", []), "a set-up that failed takes away what was there before"


def plan(venv: Path, *, extra: str | None, pyproject: bytes = PYPROJECT) -> tuple[str, list[str]]:
    step, _, extras = _bootstrap.plan(venv, pyproject, f"3.{sys.version_info.minor}", extra)
    return step, extras


def finished_venv(tmp_path: Path, extras: list[str]) -> Path:
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    fake_python(venv / "bin" / "python", f"echo 3.{sys.version_info.minor}")
    _bootstrap.begin(venv)
    _bootstrap.finish(venv, PYPROJECT, extras)
    return venv


def fake_python(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
