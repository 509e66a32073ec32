"""What figures were measured with."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sqlite3
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

_PACKAGES: Final = (
    "mcp-logstore",
    "mcp",
    "msgspec",
    "aiosqlite",
    "mcp-persist",
    "fastmcp",
    "py-key-value-aio",
    "redis",
    "nats-py",
)
_PROGRAMS: Final = ("redis-server", "nats-server")


def machine(folder: Path) -> dict[str, str | int | None]:
    """Return what a run in a folder is measured with: the machine, and versions."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _found(r"model name\s*: (.*)", Path("/proc/cpuinfo")) or platform.processor(),
        "processors": os.cpu_count(),
        "memory": _found(r"MemTotal:\s*(.*)", Path("/proc/meminfo")),
        "file_system": _file_system(folder),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{name: _version_of(name) for name in _PACKAGES},
        **{name: _version_of_program(name) for name in _PROGRAMS},
    }


def find_program(name: str) -> str | None:
    """Return the path of a program; Debian keeps servers where only root looks."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def _found(pattern: str, path: Path) -> str | None:
    if not path.exists():
        return None
    found = re.search(pattern, path.read_text())
    return found and found[1]


def _file_system(folder: Path) -> str | None:
    """Return the kind of the file system that a folder is on."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return None
    kinds = {fields[1]: fields[2] for fields in map(str.split, mounts.read_text().splitlines())}
    place = folder.resolve()
    return next((kinds[str(each)] for each in (place, *place.parents) if str(each) in kinds), None)


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _version_of_program(name: str) -> str | None:
    path = find_program(name)
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+\.\d+[.\d]*", said)
    return found and found[0]
