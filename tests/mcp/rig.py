"""Workers in processes of their own over one store, which a test starts, kills, stops, freezes and starts again.

A test allows every step that a tool takes, through `Conductor`, so nothing depends on how fast the machine is.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from tests.mcp.rig_orders import ORDERS_VARIABLE, Orders, Reap, ServerKind, bound_socket

DEADLINE_S: Final = 30.0
ROOT: Final = Path(__file__).resolve().parents[2]
_LOG_TAIL: Final = 3000


class RigError(Exception):
    """The rig itself failed: a worker did not start, or something that a test waits for did not come."""


class Conductor:
    """Paces the tools of all workers, and knows what they do and which processes live.

    Attributes:
        port: Where workers connect to.
        ready: Processes that have started and not ended.
        runs: Which process each call was started in, by label.
        reported: Last step that each call has reported, by label.
        finished: Calls that are about to return.
        closed: Calls that have closed their stream.
    """

    def __init__(self) -> None:
        self.port = 0
        self.ready: set[int] = set()
        self.runs: dict[str, int] = {}
        self.reported: dict[str, int] = {}
        self.finished: set[str] = set()
        self.closed: set[str] = set()
        self._allowed: dict[str, int] = {}
        self._links: set[asyncio.StreamWriter] = set()
        self._changed = asyncio.Condition()

    @classmethod
    @contextlib.asynccontextmanager
    async def listening(cls) -> AsyncGenerator[Conductor]:
        """Open a conductor."""
        conductor = cls()
        server = await asyncio.start_server(conductor._accept, "127.0.0.1", 0)
        conductor.port = server.sockets[0].getsockname()[1]
        try:
            yield conductor
        finally:
            server.close()
            for link in conductor._links:
                link.close()
            await server.wait_closed()

    def allow(self, label: str, steps: int) -> None:
        """Let a call take so many more steps; the one after its last lets it return."""
        self._allowed[label] = self._allowed.get(label, 0) + steps
        for link in self._links:
            link.write(json.dumps({label: self._allowed[label]}).encode() + b"\n")

    def allow_all(self, label: str) -> None:
        """Let a call go to its end."""
        self.allow(label, 1_000_000)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until something holds.

        Raises:
            RigError: It took too long.
        """
        try:
            async with asyncio.timeout(DEADLINE_S), self._changed:
                await self._changed.wait_for(lambda: bool(condition()))
        except TimeoutError:
            raise RigError(f"not within {DEADLINE_S} s: {what}") from None

    async def started(self, label: str) -> int:
        """Wait until a call was started; return the process that runs it."""
        await self.until(lambda: label in self.runs, f"the start of {label}")
        return self.runs[label]

    async def steps(self, label: str, count: int) -> None:
        """Wait until a call has reported so many steps."""
        await self.until(lambda: self.reported.get(label, 0) >= count, f"step {count} of {label}")

    async def done(self, label: str) -> None:
        """Wait until a call is about to return."""
        await self.until(lambda: label in self.finished, f"the end of {label}")

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.add(writer)
        writer.write(json.dumps(self._allowed).encode() + b"\n")
        pid = 0
        with contextlib.suppress(OSError):
            async for line in reader:
                told = json.loads(line)
                pid = told["pid"]
                async with self._changed:
                    self._learn(told)
                    self._changed.notify_all()
        self._links.discard(writer)
        async with self._changed:
            self.ready.discard(pid)
            self._changed.notify_all()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def _learn(self, told: dict[str, Any]) -> None:
        what = told["what"]
        if what == "ready":
            self.ready.add(told["pid"])
        elif what == "started":
            self.runs[told["label"]] = told["pid"]
        elif what == "reported":
            self.reported[told["label"]] = told["steps"]
        else:
            {"finished": self.finished, "closed": self.closed}[what].add(told["label"])


class _Nursery:
    """The process that workers are forked from; one for all tests of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mcp.rig_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            # Ctrl-C is for the test, which then ends the workers.
            process_group=0,
        )
        atexit.register(self._close)

    def ask(self, order: Orders | Reap) -> int:
        """Give an order; return the process id of the worker, or the exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise RigError("the process that workers are forked from has ended")
        return int(answer)

    def _close(self) -> None:
        self._process.kill()
        self._process.communicate()


@functools.cache
def _nursery() -> _Nursery:
    return _Nursery()


class Worker:
    """One worker; it keeps its port over restarts.

    Attributes:
        port: Where it listens.
        pid: Its process, 0 while it does not run.
        log: File with what it said on stderr, in all its lives.
        kills: When it was killed, on the clock of the event loop.
    """

    def __init__(self, orders: Orders, conductor: Conductor) -> None:
        self._conductor = conductor
        self._reserved = bound_socket(0)
        self.port: int = self._reserved.getsockname()[1]
        self._orders = msgspec.structs.replace(orders, port=self.port)
        self.pid = 0
        self.log = Path(orders.log)
        self.kills: list[float] = []

    async def start(self) -> None:
        """Start it, and return when it serves.

        Raises:
            RigError: It did not; the message holds what it said.
        """
        assert not self.pid
        self.pid = pid = await asyncio.to_thread(_nursery().ask, self._orders)
        try:
            await self._conductor.until(lambda: pid in self._conductor.ready, "a worker that serves")
        except RigError as problem:
            raise RigError(f"{problem}; it said:\n{self.said()[-_LOG_TAIL:]}") from None

    async def kill(self) -> None:
        """End it as a crash does; on return its locks are free."""
        self.kills.append(asyncio.get_running_loop().time())
        os.kill(self.pid, signal.SIGKILL)
        await self._reap()

    def ask_to_stop(self) -> None:
        """Tell it to end gracefully."""
        os.kill(self.pid, signal.SIGTERM)

    async def stop(self) -> None:
        """Let it end gracefully.

        Raises:
            RigError: It took too long, or failed.
        """
        self.ask_to_stop()
        await self.stopped()

    async def stopped(self) -> None:
        """Wait for the end that it was told to come to."""
        pid = self.pid
        await self._conductor.until(lambda: pid not in self._conductor.ready, "the graceful end of a worker")
        status = await self._reap()
        # uvicorn raises the signal again when it is done.
        if status != -signal.SIGTERM:
            raise RigError(f"a worker ended with {status}:\n{self.said()[-_LOG_TAIL:]}")

    async def restart(self) -> None:
        """Stop it gracefully and start it again."""
        await self.stop()
        await self.start()

    def freeze(self) -> None:
        """Stop it in the middle of whatever it does, without ending it."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def said(self) -> str:
        """Return what it said on stderr."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    async def close(self) -> None:
        """End it, if it has not ended."""
        if self.pid:
            await self.kill()
        self._reserved.close()

    async def _reap(self) -> int:
        pid, self.pid = self.pid, 0
        status = await asyncio.to_thread(_nursery().ask, Reap(pid))
        await self._conductor.until(lambda: pid not in self._conductor.ready, "the end of a worker")
        return status


class Workers:
    """Several workers over one store.

    Attributes:
        conductor: Paces their tools.
    """

    def __init__(self, workers: list[Worker], conductor: Conductor) -> None:
        self._workers = workers
        self.conductor = conductor

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, path: Path, count: int, **orders: Any) -> AsyncGenerator[Workers]:
        """Start workers; none is left when the context ends.

        Args:
            path: The catalogue of their store.
            count: How many.
            **orders: As in `Orders`; those that it does not know are options of `resumable_http_app`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {name: orders.pop(name) for name in list(orders) if name in Orders.__struct_fields__}
        async with Conductor.listening() as conductor:
            workers = [
                Worker(
                    Orders(str(path), 0, conductor.port, f"{path}.worker{number}", options=orders, **known), conductor
                )
                for number in range(count)
            ]
            try:
                # One first, which makes the store.
                for worker in workers:
                    await worker.start()
                yield cls(workers, conductor)
            finally:
                for worker in workers:
                    await worker.close()

    def __getitem__(self, number: int) -> Worker:
        return self._workers[number]

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers)

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def ports(self) -> list[int]:
        """Where they listen."""
        return [worker.port for worker in self._workers]

    def running_in(self, pid: int) -> Worker:
        """Return the worker that is a process."""
        return next(worker for worker in self._workers if worker.pid == pid)

    def others(self, worker: Worker) -> list[Worker]:
        """Return all but one."""
        return [other for other in self._workers if other is not worker]

    def stopped(self) -> list[Worker]:
        """Return those that do not run."""
        return [worker for worker in self._workers if not worker.pid]

    def complaints(self) -> list[str]:
        """Return the lines in which workers speak of errors."""
        return [
            line
            for worker in self._workers
            for line in worker.said().splitlines()
            if line.startswith(("Traceback", "ERROR", "Task exception")) or "Error:" in line
        ]


class Uvicorn:
    """`uvicorn --workers`: its own supervisor, one port for all.

    Attributes:
        port: Where they listen.
        conductor: Paces their tools, and knows their process ids.
    """

    def __init__(self, port: int, conductor: Conductor, process: subprocess.Popen[bytes]) -> None:
        self.port = port
        self.conductor = conductor
        self._process = process

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, path: Path, count: int, server: ServerKind = "mcpserver", **options: Any
    ) -> AsyncGenerator[Uvicorn]:
        """Start it; nothing is left of it when the context ends."""
        path.parent.mkdir(parents=True, exist_ok=True)
        log = Path(f"{path}.uvicorn")
        with bound_socket(0) as reserved:
            port: int = reserved.getsockname()[1]
        async with Conductor.listening() as conductor:
            orders = Orders(str(path), port, conductor.port, str(log), server, options=options)
            process = await asyncio.to_thread(_start_uvicorn, orders, count)
            try:
                await conductor.until(lambda: len(conductor.ready) >= count, f"{count} of uvicorn's workers")
                # They have started, and are about to listen.
                async with asyncio.timeout(DEADLINE_S):
                    while not await _listens(port):  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
                yield cls(port, conductor, process)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await asyncio.to_thread(process.wait)

    async def stop(self) -> int:
        """Let it end gracefully; return its exit status."""
        self._process.terminate()
        async with asyncio.timeout(DEADLINE_S):
            return await asyncio.to_thread(self._process.wait)


def _start_uvicorn(orders: Orders, count: int) -> subprocess.Popen[bytes]:
    command = ["uvicorn", "tests.mcp.rig_worker:application", "--factory", "--port", str(orders.port)]
    with Path(orders.log).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command, "--workers", str(count), "--log-level", "warning"],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, ORDERS_VARIABLE: msgspec.json.encode(orders).decode()},
            process_group=0,
        )


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True
