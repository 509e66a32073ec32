"""Makes `.venv` in the checkout, with the package installed in it, for the scripts beside this file.

Any Python 3 must be able to read this file and those scripts, or an old one would answer with a syntax error instead of
saying what it lacks. So: no f-strings, no annotated variables, no types that only a newer Python can evaluate.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
OLDEST_PYTHON = (3, 11)

# Stands in the venv from before it is touched until it is whole again; a run that was killed leaves it there.
_UNFINISHED = "logstore-setup-unfinished"
# Says what the venv was last installed from.
_STAMP = "logstore-setup.json"


def prepare(extra: "str | None" = None) -> None:
    """See to it that `PYTHON` is there and has logstore and its dependencies.

    Args:
        extra: Name of an extra in `pyproject.toml` to install besides, None for the package alone.

    Raises:
        SystemExit: This Python cannot do it, or the installation failed; the message says what to do.
    """
    script = sys.argv[0]
    problem = unfit_python(sys.version_info[:2], script) or missing_modules(script)
    if problem:
        raise SystemExit(problem)
    import fcntl

    with Path(__file__).open() as lock:
        # Without the lock, a second run would take the first one's half-made venv for a dead one's.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another run that is setting up")
            fcntl.flock(lock, fcntl.LOCK_EX)
        _set_up(extra)


def unfit_python(version: "tuple[int, ...]", script: str) -> "str | None":
    """Return what to do about a Python that cannot run logstore, or None when it can."""
    if os.name != "posix":
        return "logstore runs on Linux and macOS."
    if version >= OLDEST_PYTHON:
        return None
    problem = "logstore needs Python {}.{} or newer; this is {}.{}, {}.".format(
        *OLDEST_PYTHON + version + (sys.executable,)
    )
    newer = _newer_python_on_path()
    if newer:
        return "{}\nThere is a newer one here. Run:  {} {}".format(problem, newer, script)
    return "\n".join(
        [
            problem,
            "Install one:",
            "  Debian 12, Ubuntu 24.04 or later:  sudo apt install python3 python3-venv",
            "  Fedora:                            sudo dnf install python3.11",
            "  macOS:                             brew install python@3.11",
            "  elsewhere:                         https://www.python.org/downloads/",
            "Then run this again with it:  python3.11 {}".format(script),
        ]
    )


def missing_modules(script: str) -> "str | None":
    """Return what to do when Python came without the modules that make a venv, or None when they are there."""
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return "\n".join(
        [
            "This Python lacks {}, which some systems package separately. Install it:".format(" and ".join(missing)),
            "  Debian, Ubuntu:  sudo apt install python{}.{}-venv".format(*sys.version_info[:2]),
            "  elsewhere:       a complete Python, for example from https://www.python.org/downloads/",
            "Then run this again:  {} {}".format(sys.executable, script),
        ]
    )


def plan(venv: Path, pyproject: bytes, version: str, extra: "str | None") -> "tuple[str, str, list[str]]":
    """Decide what is to be done about a venv; changes nothing.

    Args:
        venv: Its folder, which need not exist.
        pyproject: The content of `pyproject.toml`.
        version: The Python version that it must have, such as "3.11".
        extra: The extra that is asked for, if any.

    Returns:
        `("ready" | "install" | "make", why, extras)`; the extras are those to install, earlier ones included.
    """
    wanted = [extra] if extra else []
    broken = _why_unusable(venv, version)
    if broken:
        return "make", broken, wanted
    stamp = _read_stamp(venv)
    if stamp is None:
        return "install", ".venv was not installed by this script", wanted
    digest, installed = stamp
    extras = sorted(set(installed).union(wanted))
    if digest != _digest(pyproject):
        return "install", "pyproject.toml changed", extras
    if extras != installed:
        return "install", "[{}] is not installed yet".format(extra), extras
    return "ready", "", extras


def begin(venv: Path) -> None:
    """Record in a venv that it is being worked on, so that it is made anew if that never ends."""
    (venv / _UNFINISHED).touch()


def finish(venv: Path, pyproject: bytes, extras: "list[str]") -> None:
    """Record in a venv that it is whole, and what it was installed from."""
    stamp = {"pyproject": _digest(pyproject), "extras": sorted(extras)}
    (venv / _STAMP).write_text(json.dumps(stamp))
    (venv / _UNFINISHED).unlink()


def _set_up(extra: "str | None") -> None:
    pyproject = (ROOT / "pyproject.toml").read_bytes()
    version = "{}.{}".format(*sys.version_info[:2])
    step, why, extras = plan(VENV, pyproject, version, extra)
    if step == "ready":
        return
    if step == "make":
        _say("{}: making .venv with Python {}".format(why, version))
        _make_venv()
    else:
        _say("{}: installing".format(why))
        begin(VENV)
    try:
        _install(extras)
    except subprocess.CalledProcessError as error:
        if step == "install":
            # pip finds and builds all packages before it touches any, so what stood there before still stands.
            (VENV / _UNFINISHED).unlink()
        raise SystemExit(
            "[setup] pip failed, see above. To try by hand:  cd {} && {}".format(ROOT, " ".join(error.cmd))
        ) from None
    finish(VENV, pyproject, extras)


def _make_venv() -> None:
    import venv

    if VENV.exists():
        shutil.rmtree(str(VENV))
    VENV.mkdir()
    begin(VENV)
    venv.create(VENV, with_pip=True, symlinks=True)


def _install(extras: "list[str]") -> None:
    what = ".[{}]".format(",".join(extras)) if extras else "."
    _say("installing {} from the package index; this takes a minute or two the first time".format(what))
    started = time.time()
    subprocess.check_call(
        [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--editable", what],
        cwd=str(ROOT),
    )
    _say("installed in {:.0f} s".format(time.time() - started))


def _why_unusable(venv: Path, version: str) -> "str | None":
    """Return why a venv must be made (anew), or None when packages can be installed into it."""
    if not venv.exists():
        return "there is no .venv yet"
    if (venv / _UNFINISHED).exists():
        return "an earlier set-up did not finish"
    try:
        found = subprocess.check_output(
            [str(venv / "bin" / "python"), "-c", "import sys, pip; print('%d.%d' % sys.version_info[:2])"],
            stderr=subprocess.DEVNULL,
        )
    except (OSError, subprocess.CalledProcessError):
        return "the Python in .venv does not run or has no pip"
    if found.decode().strip() != version:
        return ".venv has Python {}".format(found.decode().strip())
    return None


def _read_stamp(venv: Path) -> "tuple[str, list[str]] | None":
    """Return the digest of the `pyproject.toml` and the extras that a venv was installed from."""
    try:
        stamp = json.loads((venv / _STAMP).read_text())
        return stamp["pyproject"], stamp["extras"]
    except (OSError, ValueError, KeyError):
        return None


def _digest(pyproject: bytes) -> str:
    return hashlib.sha256(pyproject).hexdigest()


def _newer_python_on_path() -> "str | None":
    for minor in range(19, OLDEST_PYTHON[1] - 1, -1):
        found = shutil.which("python3.{}".format(minor))
        # A version manager leaves commands on the path that only say that nothing is installed.
        if found and subprocess.call([found, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            return found
    return None


def _say(text: str) -> None:
    sys.stdout.write("[setup] " + text + "\n")
    sys.stdout.flush()
