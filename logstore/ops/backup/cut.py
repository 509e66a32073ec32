"""What a store holds at one moment: the look with which a backup begins.

Under the checkpoint lock no event moves from a journal to a segment and no journal goes; under the registry lock no
session moves. So all marks and rows are of one moment, and everything that was acknowledged before it is in them. The
locks are held while they are read, not while bytes are copied.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec

from logstore.errors import DamageError
from logstore.ops.backup.manifest import LaneMark
from logstore.storage.catalogue import Catalogue
from logstore.storage.database import connect
from logstore.storage.files import Disk
from logstore.storage.ids import MAX_ID
from logstore.storage.journal import read_header
from logstore.storage.lane import NOWHERE, Marks, Place, journal_ordinals, journal_path, lane_folders, read_reservation
from logstore.storage.opening import OpenStore

_COLLECTS: Final = 1_000
"""Tries at two equal looks at all marks; each look is microseconds, a commit hundreds of them."""
_IDS_A_STATEMENT: Final = 250


class SegmentMark(NamedTuple):
    """A segment as the catalogue has it; `sha256` is that of a sealed one."""

    file: str
    bytes: int
    events: int
    sha256: str | None


class JournalMark(NamedTuple):
    """An open journal: a checkpoint may remove it while it is being copied.

    Attributes:
        file: Its path from the log folder.
        fd: The descriptor.
        end: Up to where it is visible; None when the file says.
    """

    file: str
    fd: int
    end: int | None


class Cut(NamedTuple):
    """A store at one moment; whoever took it closes what it holds open.

    Attributes:
        begun: The moment.
        segments: Segments that hold live events.
        journals: Journals whose events are in no segment.
        registry: The registry's bytes.
        lanes: All lanes.
        catalogue: The index, as it was.
    """

    begun: datetime
    segments: list[SegmentMark]
    journals: list[JournalMark]
    registry: bytes
    lanes: list[LaneMark]
    catalogue: sqlite3.Connection


def take_cut(store: OpenStore, held: contextlib.ExitStack) -> Cut:
    """Look at a whole store at one moment.

    Args:
        store: An open store, that of a running log or another.
        held: Closes the journals and the index.

    Raises:
        sqlite3.Error: The catalogue cannot be read.
        OSError: The disk refuses.
    """
    disk = store.disk
    # In this order: a checkpoint asks the registry, whose other callers may be waiting for the registry's lock.
    with store.checkpoint_lock(), contextlib.ExitStack() as locked:
        lock = disk.lock(store.root / "registry.lock", wait=True)
        assert lock is not None
        locked.enter_context(lock)
        # A transaction that only reads: it goes on seeing what was committed when it began.
        catalogue = held.enter_context(contextlib.closing(connect(store.catalogue.path, write=False)))
        catalogue.execute("BEGIN")
        rows = catalogue.execute(
            "SELECT file, bytes, events, CASE sealed WHEN 1 THEN sha256 END FROM segments WHERE dropped = 0"
        ).fetchall()
        done = set(catalogue.execute("SELECT lane, ordinal FROM journals"))
        visible = _visible(disk, store.root)
        lanes = [_lane_mark(disk, number, folder, place) for number, folder, place in visible]
        journals = [
            mark for number, folder, place in visible for mark in _journals(disk, number, folder, place, done, held)
        ]
        begun = datetime.now(UTC)
        registry = disk.read_file(store.root / "registry.log")
    return Cut(begun, [SegmentMark(*row) for row in sorted(rows)], journals, registry, lanes, catalogue)


def _visible(disk: Disk, root: Path) -> list[tuple[int, Path, Place]]:
    """Return how far each lane may be read.

    Looked at together, as a reader does: with one lane's mark older than another's, a stream that moved between them
    would be copied with its later events and without the earlier ones.
    """
    with contextlib.ExitStack() as opened:
        folders = list(lane_folders(disk, root))
        lanes = [opened.enter_context(contextlib.closing(Marks(disk, folder))) for _, folder in folders]
        seen = [marks.visible for marks in lanes]
        for _ in range(_COLLECTS):
            again = [marks.visible for marks in lanes]
            if again == seen:
                break
            seen = again
    return [(number, folder, place) for (number, folder), place in zip(folders, seen, strict=True)]


def _lane_mark(disk: Disk, number: int, folder: Path, visible: Place) -> LaneMark:
    # Read after the mark: what is visible is below it.
    reserved = read_reservation(disk, folder)
    return LaneMark(
        lane=number,
        reserved_id=reserved.event_id,
        reserved_ordinal=reserved.ordinal,
        visible_ordinal=visible.ordinal,
        visible_offset=visible.offset,
    )


def _journals(
    disk: Disk, number: int, folder: Path, visible: Place, done: set[tuple[int, int]], held: contextlib.ExitStack
) -> Iterator[JournalMark]:
    """Open the journals of a lane that hold something visible which no segment has."""
    if visible == NOWHERE:
        return
    # Listed after the mark was read; what was begun since is not visible.
    ordinals = [each for each in journal_ordinals(disk, folder) if each <= visible.ordinal]
    opened: dict[int, int] = {}
    ends: dict[int, int] = {visible.ordinal: visible.offset}
    for ordinal in ordinals:
        path = journal_path(folder, ordinal)
        fd = opened[ordinal] = disk.open(path)
        held.callback(disk.close, fd)
        # A damaged header says nothing; where the file before ends is found by reading that.
        with contextlib.suppress(DamageError):
            header = read_header(disk, fd, path)
            ends.setdefault(header.follows, header.follows_end)
    for ordinal, fd in opened.items():
        if (number, ordinal) not in done:
            yield JournalMark(f"lanes/{folder.name}/{journal_path(folder, ordinal).name}", fd, ends.get(ordinal))


def count_live(catalogue: sqlite3.Connection) -> int:
    """Return how many events the segments serve; some that retention dropped may still have rows."""
    (any_dropped,) = catalogue.execute(
        "SELECT EXISTS (SELECT 1 FROM segments WHERE dropped) OR EXISTS (SELECT 1 FROM streams WHERE dropped_id)"
    ).fetchone()
    if not any_dropped:
        return int(catalogue.execute("SELECT count(*) FROM events").fetchone()[0])
    return int(
        catalogue.execute(
            """
            SELECT count(*) FROM events JOIN segments USING (segment_id)
            JOIN streams ON streams.stream_id = events.stream_id
            WHERE segments.dropped = 0 AND event_id > dropped_id
            """
        ).fetchone()[0]
    )


def count_unknown(catalogue: sqlite3.Connection, ids: Iterable[int]) -> int:
    """Return how many of the events no segment has, as far as the index knows."""
    count = 0
    rest = iter(ids)
    while part := list(islice(rest, _IDS_A_STATEMENT)):
        marks = ", ".join("?" * len(part))
        (known,) = catalogue.execute(f"SELECT count(*) FROM events WHERE event_id IN ({marks})", part).fetchone()
        count += len(part) - known
    return count


def dropped_streams(catalogue: sqlite3.Connection) -> bytes:
    """Return, a JSON line each, `[stream, dropped_id, dropped_at]` of what retention has let go of."""
    rows = catalogue.execute("SELECT name, dropped_id, dropped_at FROM streams WHERE dropped_id > 0 ORDER BY stream_id")
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class _Dropped(msgspec.Struct, array_like=True):
    """A line of `dropped_streams`."""

    stream: str
    dropped_id: Annotated[int, msgspec.Meta(ge=1, le=MAX_ID)]
    dropped_at: str | None


_decode_dropped = msgspec.json.Decoder(_Dropped).decode


def note_dropped(catalogue: Catalogue, data: bytes) -> None:
    """Note in a fresh catalogue what retention had let go of, from the bytes of `dropped_streams`.

    Raises:
        ValueError: They are something else.
    """
    try:
        dropped = {each.stream: each for each in map(_decode_dropped, data.splitlines())}
    except (RecursionError, msgspec.MsgspecError) as error:
        raise ValueError(str(error)) from error
    with catalogue.transaction():
        catalogue.connection.executemany(
            """
            INSERT INTO streams (name, created_at, dropped_id, dropped_at)
            VALUES (:stream, :dropped_at, :dropped_id, :dropped_at)
            """,
            (msgspec.structs.asdict(each) for each in dropped.values()),
        )
