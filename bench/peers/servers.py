"""Servers that some peers need, each started for one store, in its folder, and ended with it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Literal

from bench.machine import find_program

MOST_CONNECTIONS: Final = 2_000
"""For Redis clients, which take one for each command under way and have 100 by default."""

_START_S: Final = 10.0
_LOOK_S: Final = 0.02


@asynccontextmanager
async def redis_server(folder: Path, appendfsync: Literal["always", "everysec"]) -> AsyncGenerator[int]:
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
    async with _running("redis-server", arguments, port, folder):
        yield port


@asynccontextmanager
async def nats_server(folder: Path) -> AsyncGenerator[int]:
    """Run NATS with JetStream in a folder; yield its port."""
    port = free_port()
    arguments = ["--addr", "127.0.0.1", "--port", str(port), "--jetstream", "--store_dir", str(folder)]
    async with _running("nats-server", arguments, port, folder):
        yield port


def free_port() -> int:
    """Return a port of this machine that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@asynccontextmanager
async def _running(program: str, arguments: Sequence[str], port: int, folder: Path) -> AsyncGenerator[None]:
    path = find_program(program)
    assert path is not None
    log = folder / f"{program}.log"
    with log.open("wb") as said:
        process = subprocess.Popen([path, *arguments], stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        try:
            async with asyncio.timeout(_START_S):
                while process.poll() is None and not await _accepts(port):
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            sys.stderr.write(log.read_text())
            raise
        if process.poll() is not None:
            raise RuntimeError(f"{program} ended with {process.returncode}: {log.read_text()}")
        yield
    finally:
        process.terminate()
        process.wait()


async def _accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True
