"""Servers that some peers need, each started for one store, in its folder, and ended with it."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from bench.machine import find_program

MOST_CONNECTIONS: Final = 2_000
"""For Redis clients, which take one for each command under way and have 100 by default."""

_START_S: Final = 10.0
_LOOK_S: Final = 0.02


@contextmanager
def redis_server(folder: Path, appendfsync: Literal["always", "everysec"]) -> Generator[int]:
    """Run Redis with an append-only file in a folder; yield its port.

    Args:
        folder: Where it writes.
        appendfsync: When it syncs: before it answers, or every second.
    """
    port = free_port()
    options = {
        "port": str(port),
        "bind": "127.0.0.1",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": appendfsync,
        "save": "",
        # Nobody else is to write while it is measured.
        "auto-aof-rewrite-percentage": "0",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    with _running("redis-server", arguments, port, folder):
        yield port


@contextmanager
def nats_server(folder: Path) -> Generator[int]:
    """Run NATS with JetStream in a folder; yield its port."""
    port = free_port()
    arguments = ["--addr", "127.0.0.1", "--port", str(port), "--jetstream", "--store_dir", str(folder)]
    with _running("nats-server", arguments, port, folder):
        yield port


def free_port() -> int:
    """Return a port of this machine that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def _running(program: str, arguments: Sequence[str], port: int, folder: Path) -> Generator[None]:
    """Run a program for the block, from when it accepts connections on.

    Raises:
        RuntimeError: It does not come to that.
    """
    path = find_program(program)
    assert path is not None
    log = folder / f"{program}.log"
    with log.open("wb") as said:
        process = subprocess.Popen([path, *arguments], stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + _START_S
        while not _accepts(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{program} does not serve: {log.read_text()}")
            time.sleep(_LOOK_S)
        yield
    finally:
        process.terminate()
        process.wait()


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
