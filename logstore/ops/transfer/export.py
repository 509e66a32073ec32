"""Export: the events of a store as JSON that people and programs read.

The order is stream by stream, by name, and each stream in its own order. An export of a store that is being written
holds each stream as it was when its turn came; every event that was acknowledged before the export began is in it.

`json` is one object, laid out with one event a line:

```
{"format": "logstore-export", "version": 1, "exported_at": "…", "store_id": "…", "events": [
{"event_id": "…", …},
{"event_id": "…", …}
], "count": 2, "gaps": []}
```

`ndjson` is one JSON object a line: first the one with `format`, then the events, last the one with `count` and `gaps`,
so that a file that was cut off can be told. The events are those of `event_json`. Session ids are not in it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Final, Literal, NamedTuple

import msgspec

from logstore.errors import ConfigurationError
from logstore.ops.access import StoreView
from logstore.ops.progress import Progress, silent
from logstore.ops.transfer.event_json import EXPORT_FORMAT, EXPORT_VERSION, iso_time, write_event
from logstore.ops.transfer.over_gaps import Gap, GapReader
from logstore.ops.transfer.selection import Moment, Selection
from logstore.storage.files import Disk

logger = logging.getLogger("logstore")

Form = Literal["json", "ndjson"]

_WRITE_BYTES: Final = 1 << 20
_PROGRESS_EVENTS: Final = 1_000

_encode = msgspec.json.Encoder().encode


class ExportResult(NamedTuple):
    """What an export did.

    Attributes:
        events: How many it wrote.
        gaps: Where events are missing, the first thousand places.
        gap_count: How many such places there are.
        missing: How many events are known to be missing.
    """

    events: int
    gaps: list[Gap]
    gap_count: int
    missing: int


def export_events(
    path: Path,
    target: Path | IO[bytes],
    *,
    stream: str | None = None,
    session: str | None = None,
    start: Moment = None,
    end: Moment = None,
    form: Form = "json",
    progress: Progress = silent,
) -> int:
    """Export events and return how many; places where events are missing are logged. See `export_store`."""
    result = export_store(path, target, Selection(stream, session, start, end), form=form, progress=progress)
    for gap in result.gaps:
        logger.error("stream %r has a gap after event %s: %s", gap.stream_id, gap.after, gap.reason)
    return result.events


def export_store(
    path: Path,
    target: Path | IO[bytes],
    selection: Selection,
    *,
    form: Form = "json",
    progress: Progress = silent,
    disk: Disk | None = None,
) -> ExportResult:
    """Export events, in constant memory; the store may be in use, and nothing of it is changed.

    A file comes into its place whole, private, and on disk: it is written beside it first. What cannot be read is
    left out and reported; everything behind it that can be read is there.

    Args:
        path: The catalogue of the store.
        target: A file, which is replaced; or a stream of bytes.
        selection: Which events.
        form: `json` or `ndjson`, see above.
        progress: Told how many events are written.
        disk: The file door.

    Raises:
        ConfigurationError: A time that is none, a session that the store does not know, a target inside the store.
        NotAStoreError: There is no store at the path.
        DamageError: The catalogue cannot be read.
        OSError: The disk refuses; what was at the target is still there.
    """
    disk = disk or Disk()
    with StoreView(path, disk) as view:
        export = _Export(view, selection, progress)
        with _opened(disk, view, target) as write:
            export.write(write, form)
    return ExportResult(export.events, export.reader.gaps, export.reader.gap_count, export.reader.missing)


class _Export:
    """One export under way.

    Attributes:
        events: How many events there were.
        reader: Knows what was missing.
    """

    def __init__(self, view: StoreView, selection: Selection, progress: Progress) -> None:
        self._view = view
        self._first_us, self._last_us = selection.times_us()
        self._progress = progress
        self.reader = GapReader(view)
        self._names = selection.streams(view)
        self.events = 0

    def write(self, write: Callable[[bytes], object], form: Form) -> None:
        """Write everything."""
        lines = form == "ndjson"
        head = self._head()
        write(head + b"\n" if lines else head[:-1] + b',"events":[\n')
        waiting: list[bytes] = []
        size, before = 0, b""
        for line in self._lines():
            waiting += (before, line)
            before = b"\n" if lines else b",\n"
            size += len(line)
            if size >= _WRITE_BYTES:
                write(b"".join(waiting))
                waiting, size = [], 0
        if self.events:
            waiting.append(b"\n")
        tail = _encode({"count": self.events, "gaps": self.reader.gaps})
        waiting += (tail if lines else b"]," + tail[1:], b"\n")
        write(b"".join(waiting))

    def _head(self) -> bytes:
        return _encode(
            {
                "format": EXPORT_FORMAT,
                "version": EXPORT_VERSION,
                "exported_at": iso_time(time.time_ns() // 1000),
                "store_id": None if self._view.store_id is None else str(self._view.store_id),
            }
        )

    def _lines(self) -> Iterator[bytes]:
        for name in self._names:
            for event in self.reader.events(name):
                if self._first_us is not None and event.time_us < self._first_us:
                    continue
                if self._last_us is not None and event.time_us > self._last_us:
                    continue
                yield write_event(event)
                self.events += 1
                if self.events % _PROGRESS_EVENTS == 0:
                    self._progress("events exported", self.events, None)


@contextlib.contextmanager
def _opened(disk: Disk, view: StoreView, target: Path | IO[bytes]) -> Generator[Callable[[bytes], object]]:
    """Give a function that writes to the target; a file is in its place when the block ends well."""
    if not isinstance(target, Path):
        yield target.write
        target.flush()
        return
    try:
        target = target.resolve()
    except RuntimeError as error:
        # What Python says of a circle of symbolic links, before 3.13.
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target)) from error
    _refuse_own_files(view, target)
    if target.exists() and not target.is_file():
        # A pipe or a device, which no file may take the place of; a folder is refused here.
        with target.open("wb") as stream:
            yield stream.write
        return
    part = target.with_name(f".{target.name}.logstore-part")
    disk.unlink(part)
    try:
        with _new_file(disk, part) as write:
            yield write
        disk.rename(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.unlink(part)
        raise
    disk.sync_folder(target.parent)


def _refuse_own_files(view: StoreView, target: Path) -> None:
    """Refuse a target that is a file of the store: it would be replaced."""
    catalogue, root = view.path.resolve(), view.root.resolve()
    own = {catalogue.with_name(catalogue.name + suffix) for suffix in ("", "-wal", "-shm")}
    if target in own or target == root or root in target.parents:
        raise ConfigurationError(f"{target} belongs to the store itself; export to another file")


@contextlib.contextmanager
def _new_file(disk: Disk, path: Path) -> Generator[Callable[[bytes], object]]:
    """Give a function that appends to a new private file, which is on disk when the block ends well."""
    fd = disk.create(path)
    end = 0

    def write(data: bytes) -> None:
        nonlocal end
        disk.write(fd, data, end)
        end += len(data)

    try:
        yield write
        disk.sync(fd)
    finally:
        disk.close(fd)
