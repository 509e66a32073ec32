"""The system calls by which a child process touches files, stopped one by one until this process says what happens.

The child is forked and puts a filter over itself: the kernel stops such a call of any of its threads, SQLite's too,
which pass no door of ours, and asks here. So a campaign counts them, kills the child at the n-th, or has the n-th fail.

Source: seccomp_unotify(2), and `linux/seccomp.h` for the layouts and numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

Kind = Literal["read", "open", "create", "write", "extend", "sync", "rename", "unlink", "mkdir"]
"""What a call does; all but the first two change something."""

Fate = Literal["go", "kill", "tear", "short"] | int
"""What becomes of a call: it is done; the process dies before it, or after some pages of a write; some pages are
written, and the call says so; or it fails with an errno."""

_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}
_CALLS: Final[dict[str, dict[str, tuple[int, ...]]]] = {
    "x86_64": {
        "read": (0,),
        "write": (1,),
        "open": (2,),
        "pread": (17,),
        "pwrite": (18,),
        "sync": (74, 75),
        "extend": (77, 285),
        "rename": (82,),
        "mkdir": (83,),
        "unlink": (84, 87),
        "submit": (209,),
        "openat": (257,),
        "mkdirat": (258,),
        "unlinkat": (263,),
        "renameat": (264, 316),
    },
    "aarch64": {
        "submit": (2,),
        "mkdirat": (34,),
        "unlinkat": (35,),
        "renameat": (38, 276),
        "extend": (46, 47),
        "openat": (56,),
        "read": (63,),
        "write": (64,),
        "pread": (67,),
        "pwrite": (68,),
        "sync": (82, 83),
    },
}
"""The numbers of each call; `unlink` is also rmdir, `sync` fsync and fdatasync, `extend` ftruncate and fallocate.

`submit` is io_submit, with which the kernel is asked for nothing but syncs.
"""
_KINDS: Final[dict[str, Kind]] = {
    "read": "read",
    "pread": "read",
    "open": "open",
    "openat": "open",
    "write": "write",
    "pwrite": "write",
    "extend": "extend",
    "sync": "sync",
    "submit": "sync",
    "rename": "rename",
    "renameat": "rename",
    "unlink": "unlink",
    "unlinkat": "unlink",
    "mkdir": "mkdir",
    "mkdirat": "mkdir",
}
_BY_DESCRIPTOR: Final = frozenset(("read", "pread", "write", "pwrite", "sync", "extend"))
_NO_NEW_PRIVS: Final = 38
_SET_FILTER: Final = 1
_IS_THERE: Final = 2
_NEW_LISTENER: Final = 8
_ALLOW: Final = 0x7FFF0000
_ASK: Final = 0x7FC00000
_LOAD_NUMBER: Final = (0x20, 0, 0, 0)
_JUMP_IF_EQUAL: Final = 0x15
_RETURN: Final = 0x06
_INSTRUCTION: Final = struct.Struct("=HBBI")
_POINTER: Final = struct.Struct("=Q")
_DESCRIPTOR: Final = struct.Struct("=I")
_DESCRIPTOR_AT: Final = 20
"""In a `struct iocb`, see `linux/aio_abi.h`."""
_QUESTION: Final = struct.Struct("=QIIiIQ6Q")
_ANSWER: Final = struct.Struct("=QqiI")
_RECEIVE: Final = 0xC0502100
_SEND: Final = 0xC0182101
_CONTINUE: Final = 1
_MOST_PATH_BYTES: Final = 4096
_PAGE: Final = 4096
_WORD_BYTES: Final = 1 << 16
_POLL_MS: Final = 1000
_LAST_WORDS_S: Final = 2.0


class DiskCall(NamedTuple):
    """A call that a thread of the child waits with.

    Attributes:
        kind: What it does.
        path: The file or folder; of a rename its new name.
        tearable: Whether a part of it can be done: a write to more than one page. The kernel looks for a kill, and for
            room, page by page: no crash of a process tears what lies within one.
    """

    kind: Kind
    path: str
    tearable: bool = False


class Judge(Protocol):
    """Who is asked what becomes of the child's calls, and told what it says.

    Attributes:
        reads: Whether calls that only read are asked about, too.
        listens: Whether calls are asked about at this moment.
    """

    reads: bool
    listens: bool

    def call(self, call: DiskCall) -> Fate:
        """Decide over a call."""
        ...

    def word(self, line: str) -> None:
        """Hear a line, before the calls that the thread which said it makes after that."""
        ...


Say = Callable[[str], None]
"""How the child tells a line."""


class HangsError(Exception):
    """The child did not end in time; what its threads do are its last words."""


def is_supported() -> bool:
    """Whether this system can stop the calls of a child: Linux from 5.5 on, where seccomp is not forbidden."""
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return False
    return _seccomp(_IS_THERE, 0, ctypes.byref(ctypes.c_uint32(_ASK))) == 0


def run_watched(work: Callable[[Say], None], judge: Judge, folder: Path, deadline_s: float) -> int:
    """Fork, have the child work, and judge its calls on files below a folder; call it without any other thread.

    Args:
        work: What the child does; an exception is its last words, and status 1.
        judge: Who decides.
        folder: Calls on other files are done without a question.
        deadline_s: When it hangs.

    Returns:
        The exit status, or the negative number of the signal that it died of.

    Raises:
        HangsError: It is not done in time.
    """
    parent, child = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        parent.close()
        _be_child(work, child, reads=judge.reads)
    child.close()
    with parent:
        try:
            words, listeners, _, _ = socket.recv_fds(parent, _WORD_BYTES, 1)
            if not listeners:
                raise RuntimeError(f"the child cannot be watched: {words.decode()}")
            (listener,) = listeners
            with contextlib.closing(_Watch(pid, listener, parent, judge, folder)) as watch:
                watch.run(time.monotonic() + deadline_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _be_child(work: Callable[[Say], None], channel: socket.socket, *, reads: bool) -> None:
    status = 1
    mutex = threading.Lock()

    def say(line: str) -> None:
        with mutex:
            channel.sendall(line.encode() + b"\n")

    try:
        faulthandler.register(signal.SIGUSR1, channel.fileno())
        listener = _ask_about_calls(reads=reads)
        socket.send_fds(channel, [b"."], [listener])
        os.close(listener)
        work(say)
        status = 0
    except BaseException:
        say(traceback.format_exc().rstrip())
    finally:
        # Without what an interpreter does at its end: that is the parent's.
        os._exit(status)


def _names() -> dict[int, str]:
    return {number: name for name, numbers in _CALLS[platform.machine()].items() for number in numbers}


def _ask_about_calls(*, reads: bool) -> int:
    """Put the filter over this process, and return the descriptor by which another one is asked."""
    numbers = [number for number, name in _names().items() if reads or _KINDS[name] != "read"]
    program = [_LOAD_NUMBER]
    program += [(_JUMP_IF_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ASK)]
    code = ctypes.create_string_buffer(b"".join(_INSTRUCTION.pack(*each) for each in program))
    described = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    # Without it only root may.
    ctypes.CDLL(None).prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    listener = _seccomp(_SET_FILTER, _NEW_LISTENER, described)
    if listener < 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
    return listener


def _seccomp(operation: int, flags: int, argument: Any) -> int:
    number = _SECCOMP[platform.machine()]
    return int(ctypes.CDLL(None, use_errno=True).syscall(number, operation, flags, argument))


class _Question(NamedTuple):
    """A call as the kernel has it."""

    id: int
    thread: int
    name: str
    arguments: tuple[int, ...]


class _Watch:
    """One child, until it ends."""

    def __init__(self, pid: int, listener: int, channel: socket.socket, judge: Judge, folder: Path) -> None:
        self._listener = listener
        self._channel = channel
        self._judge = judge
        self._folder = str(folder) + "/"
        self._pid = pid
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        self._names = _names()
        self._said = b""

    def close(self) -> None:
        """Close everything; calls that still wait fail."""
        os.close(self._memory)
        os.close(self._listener)

    def run(self, deadline: float) -> None:
        """Answer until the child is gone."""
        poll = select.poll()
        hangs = False
        for fd in (self._listener, self._channel.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            ready = dict(poll.poll(_POLL_MS))
            # What it says comes before what it does after that.
            if not self._hear():
                return
            if ready.get(self._listener, 0) & select.POLLIN:
                self._answer()
            elif time.monotonic() > deadline:
                if hangs:
                    raise HangsError
                hangs = True
                deadline += _LAST_WORDS_S
                os.kill(self._pid, signal.SIGUSR1)

    def _hear(self) -> bool:
        """Take in what was said; tell whether the child lives."""
        try:
            while data := self._channel.recv(_WORD_BYTES, socket.MSG_DONTWAIT):
                *lines, self._said = (self._said + data).split(b"\n")
                for line in lines:
                    self._judge.word(line.decode())
        except BlockingIOError:
            return True
        except ConnectionResetError:
            pass
        return False

    def _answer(self) -> None:
        buffer = bytearray(_QUESTION.size)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, buffer)
        except FileNotFoundError:
            # It died while it asked.
            return
        asked, thread, _, number, _, _, *arguments = _QUESTION.unpack(buffer)
        question = _Question(asked, thread, self._names[number], tuple(arguments))
        call = self._described(question) if self._judge.listens else None
        fate: Fate = "go" if call is None else self._judge.call(call)
        if isinstance(fate, int):
            self._reply(asked, error=-fate)
        elif fate == "short":
            self._reply(asked, value=self._do_part(question))
        elif fate == "go":
            self._reply(asked, flags=_CONTINUE)
        else:
            if fate == "tear":
                self._do_part(question)
            os.kill(self._pid, signal.SIGKILL)

    def _reply(self, asked: int, value: int = 0, error: int = 0, flags: int = 0) -> None:
        # Unless it died meanwhile.
        with contextlib.suppress(FileNotFoundError):
            fcntl.ioctl(self._listener, _SEND, bytearray(_ANSWER.pack(asked, value, error, flags)))

    def _described(self, question: _Question) -> DiskCall | None:
        """Return what a call does, None when that is not the campaign's business, or nothing."""
        name, arguments = question.name, question.arguments
        if name in _BY_DESCRIPTOR:
            path = self._path_of(question.thread, arguments[0])
        elif name == "submit":
            # Of its requests, of which there is one, the descriptor.
            (request,) = _POINTER.unpack(os.pread(self._memory, _POINTER.size, arguments[2]))
            (fd,) = _DESCRIPTOR.unpack(os.pread(self._memory, _DESCRIPTOR.size, request + _DESCRIPTOR_AT))
            path = self._path_of(question.thread, fd)
        else:
            # The last path of its arguments; with `…at` each comes behind a folder.
            place = {"open": 0, "openat": 1, "rename": 1, "renameat": 3}.get(name, int(name.endswith("at")))
            path = self._text(arguments[place])
        if not path.startswith(self._folder):
            return None
        kind = self._kind(name, arguments, path)
        return kind and DiskCall(kind, path, name == "pwrite" and _whole_pages(*arguments[2:4]) > 0)

    def _kind(self, name: str, arguments: tuple[int, ...], path: str) -> Kind | None:
        kind = _KINDS[name]
        if kind == "open" and arguments[1 if name == "open" else 2] & os.O_CREAT and not os.path.lexists(path):
            return "create"
        if (kind == "mkdir" and os.path.lexists(path)) or (kind == "unlink" and not os.path.lexists(path)):
            # It fails, or is done already.
            return None
        return kind

    def _path_of(self, thread: int, fd: int) -> str:
        try:
            return str(Path(f"/proc/{thread}/fd/{fd}").readlink()).removesuffix(" (deleted)")
        except OSError:
            # Closed, or the thread is gone: the kernel has the answer to that.
            return ""

    def _text(self, address: int) -> str:
        return os.pread(self._memory, _MOST_PATH_BYTES, address).partition(b"\0")[0].decode(errors="replace")

    def _do_part(self, question: _Question) -> int:
        """Write the first pages of what a call would write; return how many bytes."""
        fd, address, length, offset, *_ = question.arguments
        data = os.pread(self._memory, _whole_pages(length, offset), address)
        own = os.open(f"/proc/{question.thread}/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            return os.pwrite(own, data, offset)
        finally:
            os.close(own)


def _whole_pages(length: int, offset: int) -> int:
    """Return how many bytes of a write lie before the page boundary in its middle; 0 when it is within one page."""
    return max(0, (offset + length // 2 + _PAGE // 2) // _PAGE * _PAGE - offset) % max(1, length)
