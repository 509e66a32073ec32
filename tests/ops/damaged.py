"""What the tests of verify, repair, scrub and dump share: stores with known content, and ways to damage them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

from logstore.errors import GapError
from logstore.ops.access import StoreView, open_existing
from logstore.storage import Event, Log
from logstore.storage.files import Disk
from logstore.storage.header import frame_seed
from logstore.storage.lane import Lane
from logstore.storage.record import encode_frame
from tests.engine import deadline, in_segments, small

GROWN = "grown"
"""A stream with segments of its own."""
TINY = tuple(f"tiny {number}" for number in range(5))
Contents = dict[str, list[tuple[int, bytes]]]


def make(path: Path, *, grown: int = 4) -> None:
    """Make a store with packs, segments of a stream's own, and sessions; and close it."""

    async def run() -> None:
        async with deadline(), Log(path, small()) as log:
            await log.sessions.open("one session", b"its state", "tiny 1")
            for turn in range(grown):
                await log.append_many([(GROWN, f"grown {turn} {number} ".encode() * 200, 1) for number in range(100)])
                for stream in TINY:
                    await log.append_many([(stream, f"{stream} {turn} {number}".encode(), 2) for number in range(3)])
                await in_segments(log)
            await log.sessions.open("another session", b"", "tiny 2")
            await log.append("last", b"last")

    asyncio.run(run())


def copied(path: Path, folder: Path) -> Path:
    """Copy a store that nobody has open and return the copy's catalogue."""
    shutil.copytree(path.parent, folder)
    return folder / path.name


def log_of(path: Path) -> Path:
    return path.with_name("events-log")


def segments(path: Path) -> list[Path]:
    """Return the segment files, the one with the most bytes first."""
    return sorted(log_of(path).glob("segments/*.segment"), key=lambda each: -each.stat().st_size)


def read(path: Path, *streams: str) -> Contents:
    """Return what streams hold, over their gaps, without opening the store."""
    found: Contents = {}
    with StoreView(path) as view:
        for stream in streams or (GROWN, *TINY, "last"):
            found[stream] = list(_over_gaps(view, stream))
    return found


def _over_gaps(view: StoreView, stream: str) -> list[tuple[int, bytes]]:
    found: dict[int, bytes] = {}
    sql = "select event_id from events join streams using (stream_id) where name = ? order by event_id"
    ids = [event_id for (event_id,) in ask(view.path, sql, stream)]
    for event_id in ids:
        if not found or event_id > max(found):
            with contextlib.suppress(GapError):
                # Not `read` of the view, which asks for an unbroken chain of predecessors.
                found.update(
                    (event.id, event.payload) for event in view.reader.read(stream, event_id - 1, 1_000, ()).events
                )
    return sorted(found.items())


def change(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(data)] = data
    path.write_bytes(whole)


def execute(path: Path, sql: str, *arguments: Any) -> None:
    """Change the catalogue behind the store's back."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(sql, arguments)


def ask(path: Path, sql: str, *arguments: Any) -> list[Any]:
    """Ask the catalogue."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(sql, arguments).fetchall()


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Return time and digest of every file."""
    files = [each for each in sorted(folder.rglob("*")) if each.is_file() and not each.name.endswith("-shm")]
    return {str(each): (each.stat().st_mtime_ns, hashlib.sha256(each.read_bytes()).hexdigest()) for each in files}


class DeadLane:
    """A lane that a process has written and left behind when it died."""

    def __init__(self, path: Path) -> None:
        store = open_existing(path)
        self.store_id = store.store_id
        # One that nobody uses, so that the store's own stays free of journals.
        self.lane = Lane.acquire(Disk(), store.root, store.store_id)
        self.lane.begin(store.highest_reserved(), 0)
        self.lane.marks.begin(self.lane.incarnation)
        store.close(empty=True)

    def write(self, stream: str, payload: bytes, prev: int = 0, *, sync: bool = True) -> int:
        """Write one event, which the disk has on return, or the operating system."""
        event = Event(self.lane.ids.next(0), prev, 1, stream, 0, payload)
        self.lane.write([encode_frame(event, frame_seed(self.store_id))], event.id)
        if sync:
            self.lane.sync()
        self.lane.show()
        return event.id

    def die(self) -> Path:
        """Leave everything as it is and return the journal."""
        assert self.lane.journal is not None
        journal = self.lane.journal.path
        self.lane.end()
        return journal
