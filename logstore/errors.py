"""Every error that logstore raises on purpose.

```
LogstoreError
├── ConfigurationError      a setting is unknown or out of range (also a ValueError)
├── InvalidStreamError      a stream name that cannot be stored (also a ValueError)
├── InvalidMessageError     a message that is not JSON (also a ValueError)
├── StoreClosedError        the store was closed, or belongs to the parent of this process
├── StoreLockedError        another process holds what this call needs for itself
├── NotAStoreError          the path holds something that is not a logstore store
├── FormatVersionError      files written by a newer release
├── DamageError             bytes that were durable once are not what was written
├── IndexReplacedError      the catalogue was made again while work on it was under way
├── WriteFailedError        the disk refused a write or a sync
└── ReplayError             a resume that cannot be served
    ├── UnknownEventError   the event id is not in the store
    ├── GapError            events between the given id and the oldest kept one are gone
    └── ForeignSessionError the event belongs to another session
```

A torn write at the end of a journal is no error: it was never acknowledged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "ConfigurationError",
    "DamageError",
    "ForeignSessionError",
    "FormatVersionError",
    "GapError",
    "IndexReplacedError",
    "InvalidMessageError",
    "InvalidStreamError",
    "LogstoreError",
    "NotAStoreError",
    "ReplayError",
    "StoreClosedError",
    "StoreLockedError",
    "UnknownEventError",
    "WriteFailedError",
]


class LogstoreError(Exception):
    """Base of every error in this package."""


class ConfigurationError(LogstoreError, ValueError):
    """A setting is unknown or has a value outside what is allowed."""


class InvalidStreamError(LogstoreError, ValueError):
    """A stream name is empty, too long, or holds characters that cannot be stored."""


class InvalidMessageError(LogstoreError, ValueError):
    """A message is not JSON, so that it would not come back as it was given.

    Attributes:
        path: Where in the message the offending value is, such as `$.params.args[2]`.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"message at {path}: {reason}")
        self.path = path


class StoreClosedError(LogstoreError):
    """The store was closed, or was opened by a parent of this process."""


class StoreLockedError(LogstoreError):
    """Another process uses the store in a way that excludes this call.

    Attributes:
        pids: The processes that hold the lock, as far as the system tells.
    """

    def __init__(self, message: str, pids: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.pids = tuple(pids)


class NotAStoreError(LogstoreError):
    """The path is a directory, a foreign database, or cannot hold a store."""


class FormatVersionError(LogstoreError):
    """A file was written by a newer release; it is refused, never repaired.

    Attributes:
        path: The file, None for what is no file.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class DamageError(LogstoreError):
    """Bytes that were durable once are not what was written.

    Attributes:
        path: The damaged file.
        offset: Where the damage begins, in bytes.
        length: How many bytes it covers.
    """

    def __init__(self, path: Path, offset: int, length: int, reason: str) -> None:
        # A path need not be text, and what is damaged is noted where only text can be.
        shown = str(path).encode(errors="backslashreplace").decode()
        super().__init__(f"{shown}: {length} damaged bytes at offset {offset}: {reason}")
        self.path = path
        self.offset = offset
        self.length = length


class IndexReplacedError(LogstoreError):
    """The catalogue was made again while work on it was under way; the work begins anew."""


class WriteFailedError(LogstoreError):
    """The disk refused a write or a sync; the event was not stored durably."""


class ReplayError(LogstoreError):
    """A resume cannot be served."""


class UnknownEventError(ReplayError):
    """The event id is not in the store: never given out, or dropped by retention."""


class GapError(ReplayError):
    """Events after the given id existed and are gone; a replay would have a hole.

    Attributes:
        stream: The stream that was read.
        after: The last event id that the reader holds.
    """

    def __init__(self, stream: str, after: str, reason: str) -> None:
        super().__init__(f"stream {stream!r} has a gap after event {after}: {reason}")
        self.stream = stream
        self.after = after


class ForeignSessionError(ReplayError):
    """The event belongs to another session than the one that asks for it."""
