"""The demonstration's hold on its server process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import aiofiles
import msgspec

from logstore.cli.demo.account import Entry
from logstore.cli.demo.growing import Growing, StandstillError
from logstore.cli.demo.server import Ready, Refused, Stored

_LOG_LINES: Final = 5


class ServerProcess:
    """A running server; none is left when the context that started it ends.

    Attributes:
        port: Where it listens.
        stored: The events of the call that it has on disk.
    """

    def __init__(self, process: Process, port: int) -> None:
        self.port = port
        self.stored: Growing[Entry] = Growing("events were stored by the server")
        self._process = process
        self._ready: Growing[Ready | Refused] = Growing("words from the server")

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls, catalogue: Path, log: Path) -> AsyncGenerator[ServerProcess, None]:
        """Start a server and wait until it serves.

        Raises:
            StandstillError: It cannot start; the message holds why.
        """
        # The server gets a socket that listens already: no port to guess, and nobody can come too early.
        with socket.create_server(("127.0.0.1", 0)) as listener, log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "logstore.cli.demo.server", str(catalogue), str(listener.fileno())),
                stdin=PIPE,
                stdout=PIPE,
                stderr=stderr,
                pass_fds=[listener.fileno()],
                # Ctrl-C reaches the demonstration alone, which ends this one.
                process_group=0,
            )
            server = cls(process, listener.getsockname()[1])
        listening = asyncio.create_task(server._listen())
        try:
            await server._until_ready(log)
            yield server
        finally:
            await server.kill()
            await listening

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def allow(self, steps: int) -> None:
        """Let the tool take so many more steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % steps)
        await self._process.stdin.drain()

    async def kill(self) -> None:
        """End it with SIGKILL: no handler runs, nothing is flushed, no file is closed by the program."""
        if self._process.returncode is None:
            # It may have ended by itself, and nobody have noticed yet.
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        decoder = msgspec.json.Decoder(Ready | Refused | Stored)
        async for line in self._process.stdout:
            told = decoder.decode(line)
            if isinstance(told, Stored):
                self.stored.add(Entry(told.event_id, told.text))
            else:
                self._ready.add(told)
        for growing in (self._ready, self.stored):
            growing.end("the server ended")

    async def _until_ready(self, log: Path) -> None:
        try:
            await self._ready.reaches(1)
        except StandstillError as problem:
            async with aiofiles.open(log, errors="replace") as file:
                last = [line async for line in file][-_LOG_LINES:]
            raise StandstillError(f"{problem}; the end of {log}:\n{''.join(last)}") from None
        first = self._ready.items[0]
        if isinstance(first, Refused):
            raise StandstillError(first.reason)
