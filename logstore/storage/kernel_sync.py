"""A sync that the kernel runs beside the process, which the event loop is told the end of: Linux's asynchronous I/O.

A thread that syncs is woken, and wakes the loop, and each takes the interpreter from the other: half of what a single
writer waits for. Here a thread of the kernel syncs, and an eventfd wakes the loop. Without it, a thread of ours does.

Source: io_submit(2), `linux/aio_abi.h`. The kernel's thread calls what fdatasync(2) calls, on the same open file: its
errors are the same, and told once.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import platform
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final, NamedTuple


class _Numbers(NamedTuple):
    """The numbers of the system calls."""

    setup: int
    submit: int
    events: int


_NUMBERS: Final = {"x86_64": _Numbers(206, 209, 208), "aarch64": _Numbers(0, 2, 4)}
_FDATASYNC: Final = 3
_TELL_EVENTFD: Final = 1
_OF_THE_DISK: Final = frozenset((errno.EIO, errno.ENOSPC, errno.EDQUOT))
"""What a disk says; by everything else the system says that it does not begin such a sync, or not now."""

Done = Callable[[OSError | None], None]
"""Called on the loop once the file is on disk, or with the error; only what the first call says counts."""


_spare: Final[list[ctypes.c_ulong]] = []
"""Contexts of the kernel that nobody uses now: to give one back takes 30 ms in which the process stands still."""
# They are not a child's.
os.register_at_fork(after_in_child=_spare.clear)


class _Request(ctypes.Structure):
    """`struct iocb`, on a little-endian machine."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("operation", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("eventfd", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """`struct io_event`."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("request", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("result2", ctypes.c_int64),
    )


class KernelSync:
    """Syncs one file at a time, beside the event loop that it is bound to.

    A signal's handler may raise anywhere in here: then it is not known what the kernel did, and this is not used again.

    Raises:
        OSError: This system has none of it, or no more of it to give.
    """

    def __init__(self) -> None:
        # The machine is the kernel's, whose numbers are others for a process of 32 bits.
        if sys.platform != "linux" or platform.machine() not in _NUMBERS or sys.maxsize < 1 << 32:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._numbers = _NUMBERS[platform.machine()]
        # None of the calls waits for anything, so that the interpreter's lock need not be given up for them.
        self._library = ctypes.PyDLL(None, use_errno=True)
        self._library.syscall.restype = ctypes.c_long
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done: Done | None = None
        self._path = ""
        self._is_sound = True
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Of a store that nobody closed, too.
        self._close_eventfd = weakref.finalize(self, os.close, self._eventfd)
        try:
            self._context = _spare.pop()
        except IndexError:
            self._context = self._make_context()
        self._request = _Request(operation=_FDATASYNC, flags=_TELL_EVENTFD, eventfd=self._eventfd)
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._event = _Event()

    def _make_context(self) -> ctypes.c_ulong:
        context = ctypes.c_ulong(0)
        self._call(self._numbers.setup, ctypes.c_long(1), ctypes.byref(context))
        return context

    def _call(self, number: int, *arguments: Any) -> None:
        if self._library.syscall(ctypes.c_long(number), *arguments) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell this loop from now on, also the end of what an earlier one did not live to see.

        Raises:
            NotImplementedError, OSError: The loop cannot watch a descriptor.
        """
        loop.add_reader(self._eventfd, self._take)
        self._loop = loop

    def start(self, fd: int, path: str, done: Done) -> bool:
        """Begin a sync of all that was written to a file; the one before must have ended.

        Args:
            fd: The file.
            path: Its path, for the error.
            done: Called on the loop.

        Returns:
            False when the file is not synced in this way, and will not be.

        Raises:
            OSError: The disk refused.
        """
        if not self._is_sound:
            return False
        assert self._done is None
        self._request.fd = fd
        # It may have ended before the next line.
        self._path, self._done = path, done
        try:
            self._call(self._numbers.submit, self._context, ctypes.c_long(1), self._requests)
        except OSError as error:
            self._done = None
            if error.errno not in _OF_THE_DISK:
                self._is_sound = False
                return False
            raise OSError(error.errno, error.strerror, path) from None
        return True

    def _take(self) -> None:
        done = self._done
        try:
            os.eventfd_read(self._eventfd)
            one = ctypes.c_long(1)
            self._call(self._numbers.events, self._context, one, one, ctypes.byref(self._event), None)
            self._done = None
            if done is not None:
                done(error_of(self._event.result, self._path))
        except BaseException:
            # Whether it was told is not known; who was does not listen again.
            self._done = done
            self.close()
            raise

    def close(self) -> None:
        """Let go of everything; who waits for a sync that is under way is told that its end is not known."""
        done, self._done = self._done, None
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._eventfd)
        self._close_eventfd()
        if self._is_sound and done is None:
            # Only once, and not with an end in it that the next one would take for that of its own sync.
            _spare.append(self._context)
        self._is_sound = False
        if done is not None:
            done(OSError(errno.EIO, "it is not known whether a sync has ended", self._path))


def error_of(result: int, path: str) -> OSError | None:
    """Return what a request's result means: 0 or the negative of an errno."""
    return OSError(-result, os.strerror(-result), path) if result < 0 else None
