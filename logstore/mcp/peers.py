"""The other workers: each serves its app to the others on a private unix socket.

A frame is its length (4 bytes, little endian) and a msgpack array. A connection carries one command:

| command | answer |
| --- | --- |
| `["request", scope, body]` | `["begun"]`, `["start", status, headers]`, `["body", bytes, more]`…; `["again", stops]` |
| `["end", name, older_than_ns]` | `[true]`: the connections of that stream are being ended |
| `["reading", tokens]` | of which of these sessions connections are open |
| `["ping"]` | `[true]` |

`again` means that the session is no longer served there, and that nothing was done: look again who serves it. So does
an end without an answer before `begun`, which is sent before the request is handed to the SDK; after it the request may
have been served.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Protocol, TypeVar

import anyio
import msgspec
from starlette.types import ASGIApp, Message, Scope

from logstore.mcp.connections import Connection
from logstore.storage.ids import parse_event_id

logger = logging.getLogger("logstore.mcp")

CALL_KEY: Final = "logstore.peer"
"""Where the ASGI scope of a request that another worker passed on has its `PeerCall`; no client can put it there."""

_LENGTH: Final = struct.Struct("<I")
_MAX_FRAME_BYTES: Final = 1 << 30
_LONGEST_PATH: Final = 100
"""A unix socket's address has room for 108 bytes, on macOS 104."""
_OPEN_FILES: Final = Path("/proc/self/fd")
"""Linux: an open folder has a short path here."""
_SUFFIX: Final = ".sock"
_ASIDE: Final = "logstore-peer-"
_ASK_S: Final = 0.5
"""What a worker that does not answer may hold up a question to all."""
_SILENCE_S: Final = 5.0
"""Without the beginning of a response for this long, the other worker is asked whether it lives."""
_BACKLOG: Final = 4096
"""Connections that wait to be accepted; asyncio's 100 are fewer than a busy balancer sends at once."""
_FINISH_S: Final = 2.0
"""What the responses that have begun may hold up the end of this worker's socket."""

_Address = tuple[str, int | None] | None
_T = TypeVar("_T")


class _Scope(msgspec.Struct, omit_defaults=True):
    """What of a request's ASGI scope is passed on."""

    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    raw_path: bytes | None = None
    query_string: bytes = b""
    root_path: str = ""
    scheme: str = "http"
    http_version: str = "1.1"
    client: _Address = None
    server: _Address = None


class _Request(msgspec.Struct, array_like=True, tag="request"):
    scope: _Scope
    body: bytes


class _End(msgspec.Struct, array_like=True, tag="end"):
    name: str
    older_than_ns: int


class _Reading(msgspec.Struct, array_like=True, tag="reading"):
    tokens: Sequence[str]


class _Ping(msgspec.Struct, array_like=True, tag="ping"):
    pass


class _Start(msgspec.Struct, array_like=True, tag="start"):
    status: Annotated[int, msgspec.Meta(ge=100, le=999)]
    headers: list[tuple[bytes, bytes]]


class _Body(msgspec.Struct, array_like=True, tag="body"):
    body: bytes
    more: bool


class _Begun(msgspec.Struct, array_like=True, tag="begun"):
    pass


class _Again(msgspec.Struct, array_like=True, tag="again"):
    stopping: bool


_Command = _End | _Reading | _Ping

_encode = msgspec.msgpack.Encoder().encode
# Another release may be at the other end, and whoever may write to the folder: nothing is taken for what it is not.
_decode_command = msgspec.msgpack.Decoder(_Request | _End | _Reading | _Ping).decode
_decode_first = msgspec.msgpack.Decoder(_Begun | _Start | _Again).decode
_decode_body = msgspec.msgpack.Decoder(_Body).decode
_decode_answer = msgspec.msgpack.Decoder(tuple[bool | list[str]]).decode


class Outcome(enum.Enum):
    """How it went to pass a request on."""

    DONE = "answered, or the client went away"
    AGAIN = "the session is not served there any more; nothing was done"
    STOPPING = "the worker stops; nothing was done"
    UNREACHABLE = "nobody listens there; nothing was done"
    LOST = "the worker, or the client, went away before the end of the answer; the request may have been served"
    SILENT = "the worker has the request and does not react"


class _NoFrameError(EOFError):
    """What came is no frame that this release knows."""


class PeerCall:
    """Marks a request that another worker passed on.

    Args:
        on_begin: Called when it begins.

    Attributes:
        again: Set to send it back: look again who serves the session. What is sent then is dropped.
        stopping: Whether that is because this worker stops.
        begun: Whether it cannot be sent back any more.
    """

    __slots__ = ("_on_begin", "again", "begun", "stopping")

    def __init__(self, on_begin: Callable[[], None]) -> None:
        self._on_begin = on_begin
        self.again = False
        self.stopping = False
        self.begun = False

    def begin(self) -> None:
        """Tell the other worker that from here on the request may have been served, whatever comes."""
        if not self.begun:
            self.begun = True
            self._on_begin()


class Host(Protocol):
    """What others may ask of this worker."""

    def end_connections(self, name: str, older_than_ns: int) -> None:
        """End the connections of a stream that began before a time."""
        ...

    def reading(self, tokens: Iterable[str]) -> list[str]:
        """Return those of the sessions that have connections."""
        ...


class Peers:
    """This worker's socket, and the way to the others.

    Args:
        folder: Where all workers of a store have their sockets.
        own: Name of this worker, its incarnation.
        app: Serves what others pass on.
        state: What the lifespan gave to requests.
        host: Answers questions.
    """

    def __init__(self, folder: Path, own: int, app: ASGIApp, state: Any, host: Host) -> None:
        self._folder = folder
        self._own = own
        self._app = app
        self._state = state
        self._host = host
        self._server: asyncio.Server | None = None
        self._serving: dict[asyncio.Task[None], PeerCall | None] = {}
        self._fd = -1

    async def open(self) -> None:
        """Listen."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._path_of(self._own)
        place = self._address_of(self._own)
        if place is None:
            # The link at the known place says where it is.
            place = Path(tempfile.mkdtemp(prefix=_ASIDE)) / "s"
            path.symlink_to(place)
        self._server = await asyncio.start_unix_server(self._accept, place, backlog=_BACKLOG)

    async def close(self) -> None:
        """Stop listening, let the responses that have begun come to their end, and end the rest."""
        if self._server is not None:
            self._server.close()
        begun = [task for task, call in self._serving.items() if call is not None and call.begun]
        if begun:
            # A call that is lost here would be one whose answer is stored.
            await asyncio.wait(begun, timeout=_FINISH_S)
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        self.forget(self._own)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def others(self) -> list[int]:
        """Return the names of the other workers whose sockets are there, of dead ones too; they are ids."""
        names = (path.stem for path in self._folder.glob(f"*{_SUFFIX}"))
        workers = [worker for name in names if (worker := parse_event_id(name)) is not None]
        return [worker for worker in workers if worker != self._own]

    def is_listed(self, worker: int) -> bool:
        """Whether a worker's socket is there."""
        return os.path.lexists(self._path_of(worker))

    def forget(self, dead: int) -> None:
        """Remove the socket of a worker that is gone."""
        path = self._path_of(dead)
        with contextlib.suppress(OSError):
            place = path.readlink()
            if place.parent.name.startswith(_ASIDE) and place.parent.stat().st_uid == os.geteuid():
                shutil.rmtree(place.parent, ignore_errors=True)
        path.unlink(missing_ok=True)

    def _path_of(self, worker: int) -> Path:
        return self._folder / f"{worker}{_SUFFIX}"

    def _address_of(self, worker: int) -> Path | None:
        """Return a path to a worker's socket that is short enough for an address, None when there is none."""
        path = self._path_of(worker)
        if len(os.fsencode(path)) <= _LONGEST_PATH:
            return path
        if not _OPEN_FILES.exists():
            return None
        if self._fd < 0:
            self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        return _OPEN_FILES / str(self._fd) / path.name

    async def _connect(self, worker: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        address = self._address_of(worker)
        reader, writer = await asyncio.open_unix_connection(address or self._path_of(worker).readlink())
        if writer.get_extra_info("peername") is None:
            # The queue of the other one is full: the system says try again, which asyncio takes for connected.
            writer.close()
            raise ConnectionRefusedError(f"worker {worker} has too many connections waiting")
        return reader, writer

    # Asking.

    async def end_everywhere(self, name: str, older_than_ns: int) -> None:
        """Have every other worker end the connections of a stream that began before a time."""
        await self._tell_all(_End(name, older_than_ns))

    async def read_elsewhere(self, tokens: Sequence[str]) -> set[str]:
        """Return those of some sessions of which connections are open at another worker."""
        answers = await self._tell_all(_Reading(tokens))
        return {token for answer in answers if isinstance(answer, list) for token in answer}

    async def _tell_all(self, command: _Command) -> list[bool | list[str]]:
        """Give every other worker a command and return the answers of those that answer soon."""
        answers = await asyncio.gather(*(self._ask(worker, _ASK_S, command) for worker in self.others()))
        return [answer for answer in answers if answer is not None]

    async def answers(self, worker: int) -> bool:
        """Whether another worker reacts."""
        return await self._ask(worker, _SILENCE_S, _Ping()) is not None

    async def _ask(self, worker: int, patience_s: float, command: _Command) -> bool | list[str] | None:
        with anyio.move_on_after(patience_s), contextlib.suppress(OSError, EOFError):
            reader, writer = await self._connect(worker)
            with contextlib.closing(writer):
                writer.write(_frame(command))
                return (await _read(reader, _decode_answer))[0]
        return None

    async def forward(self, worker: int, scope: Scope, connection: Connection) -> Outcome:
        """Pass a request on that was received whole, and its response back; never twice."""
        try:
            reader, writer = await self._connect(worker)
        except OSError:
            return Outcome.UNREACHABLE
        outcome, begun, gone = Outcome.LOST, asyncio.Event(), asyncio.Event()
        with contextlib.closing(writer):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_close_when_gone, connection, writer, gone)
                try:
                    fields = {name: scope[name] for name in _Scope.__struct_fields__ if scope.get(name) is not None}
                    writer.write(_frame(_Request(_Scope(**fields), connection.body)))
                    await writer.drain()
                    outcome = await self._relay(worker, reader, connection, begun)
                except (OSError, EOFError) as error:
                    # Whoever reads the response sees its end. One whose client went away may still begin there, and
                    # what another release does is not known.
                    may_have_begun = begun.is_set() or gone.is_set() or isinstance(error, _NoFrameError)
                    outcome = Outcome.LOST if may_have_begun else Outcome.AGAIN
                tasks.cancel_scope.cancel()
        return outcome

    async def _relay(
        self, worker: int, reader: asyncio.StreamReader, connection: Connection, begun: asyncio.Event
    ) -> Outcome:
        first = await self._first(worker, reader)
        if isinstance(first, _Begun):
            begun.set()
            first = await self._first(worker, reader)
        if isinstance(first, _Again):
            return Outcome.STOPPING if first.stopping else Outcome.AGAIN
        if first is None:
            return Outcome.SILENT
        if isinstance(first, _Begun):
            raise _NoFrameError("a request begins twice")
        begun.set()
        headers = first.headers
        if is_stream := _is_stream(headers):
            # The other worker may die before all of it has come.
            headers = [(name, value) for name, value in headers if name.lower() != b"content-length"]
        start: Message = {"type": "http.response.start", "status": first.status, "headers": headers}
        if is_stream:
            await connection.send(start)
        while not (connection.finished or connection.ended):
            part = await _read(reader, _decode_body)
            if not connection.status:
                # Anything but a stream comes at once, or not at all; then nothing of it has gone out.
                await connection.send(start)
            await connection.send({"type": "http.response.body", "body": part.body, "more_body": part.more})
        return Outcome.DONE

    async def _first(self, worker: int, reader: asyncio.StreamReader) -> _Begun | _Start | _Again | None:
        """Return the next frame, None when there is none and the other worker does not react."""
        first: asyncio.Future[_Begun | _Start | _Again] = asyncio.ensure_future(_read(reader, _decode_first))
        try:
            while not (await asyncio.wait({first}, timeout=_SILENCE_S))[0]:
                if not await self.answers(worker):
                    return None
            return first.result()
        finally:
            first.cancel()

    # Serving.

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving[task] = None
        try:
            command = await _read(reader, _decode_command)
            if isinstance(command, _Request):
                call = self._serving[task] = PeerCall(lambda: writer.write(_frame(_Begun())))
                await self._serve(call, command, reader, writer)
            elif isinstance(command, _End):
                self._host.end_connections(command.name, command.older_than_ns)
                writer.write(_frame((True,)))
            else:
                answer = self._host.reading(command.tokens) if isinstance(command, _Reading) else True
                writer.write(_frame((answer,)))
            await writer.drain()
        except (OSError, EOFError):
            # The other worker is gone, or its client: nobody is left to tell.
            pass
        except asyncio.CancelledError:
            # Closing; a task of asyncio's server must not end so.
            pass
        finally:
            del self._serving[task]
            writer.close()

    async def _serve(
        self, call: PeerCall, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        scope: Scope = {
            **msgspec.structs.asdict(request.scope),
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "state": dict(self._state or {}),
            CALL_KEY: call,
        }
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": request.body, "more_body": False}
            with contextlib.suppress(OSError):
                await reader.read(1)
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if call.again:
                return
            if message["type"] == "http.response.start":
                headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
                writer.write(_frame(_Start(message["status"], headers)))
            else:
                writer.write(_frame(_Body(bytes(message.get("body", b"")), message.get("more_body", False))))
            with contextlib.suppress(OSError):
                await writer.drain()

        try:
            await self._app(scope, receive, send)
        except Exception:
            logger.exception("a request that another worker passed on failed")
            # It would fail again.
            call.begin()
        if call.again:
            writer.write(_frame(_Again(call.stopping)))


async def _close_when_gone(connection: Connection, writer: asyncio.StreamWriter, gone: asyncio.Event) -> None:
    while not gone.is_set():
        if (await connection.receive())["type"] == "http.disconnect":
            gone.set()
    writer.close()


def _is_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)


def _frame(items: Any) -> bytes:
    body = _encode(items)
    return _LENGTH.pack(len(body)) + body


async def _read(reader: asyncio.StreamReader, decode: Callable[[bytes], _T]) -> _T:
    """Return the next frame.

    Raises:
        EOFError: There is none; a `_NoFrameError` when it is none that is known.
    """
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > _MAX_FRAME_BYTES:
        raise _NoFrameError(f"a frame of {length} bytes is none of ours")
    body = await reader.readexactly(length)
    try:
        return decode(body)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _NoFrameError(f"a frame that is none of ours: {error}") from error
