"""The other lanes: what other processes wrote and no checkpoint has taken yet, read without locks.

A lane's visible mark says how far one may read. Journals are read as they grow and their events' places remembered; a
journal that is gone has been checkpointed, its events are in the catalogue.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from bisect import bisect_right
from pathlib import Path
from typing import Final, NamedTuple

from logstore.errors import DamageError
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_JOURNAL, decode_header
from logstore.storage.journal import JournalReader
from logstore.storage.lane import END_OF_FILE, Marks, Place, journal_ordinals, journal_path, lane_folders
from logstore.storage.record import decode_frame, iter_frames

_COLLECTS: Final = 1_000
"""Tries at two equal looks at all marks; each look is microseconds, a commit hundreds of them."""


_MOST_GROWN: Final = 10_000
"""Most streams to remember as grown; past that all are said to have."""
_CLOCK_TICK_NS: Final = 1_000_000_000
"""More than the resolution of any file system's times."""


class _Spot(NamedTuple):
    """Where an event lies in a journal."""

    event_id: int
    offset: int
    length: int


def _id_of(spot: _Spot) -> int:
    return spot.event_id


class _Journal:
    """One journal of another lane, as far as it was read."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._path = path
        self._fd = disk.open(path)
        try:
            # Read once: its writer may be writing it at this moment.
            encoded = disk.read(self._fd, HEADER_BYTES, 0)
            self.header = decode_header(encoded, path, KIND_JOURNAL)
        except BaseException:
            disk.close(self._fd)
            raise
        self._reader = JournalReader(self.header, encoded)
        self.streams: dict[str, list[_Spot]] = {}
        self.ids: dict[int, str] = {}

    def read_on(self, end: int | None) -> set[str]:
        """Read the batches up to `end`, or to the end of the file, and return the streams that grew."""
        start = self._reader.offset
        stop = self._disk.size(self._fd) if end is None else end
        grown: set[str] = set()
        if stop <= start:
            return grown
        data = self._read(stop - start, start)
        for batch in self._reader.batches(data, start):
            body = batch.end - len(batch.body)
            for offset, frame in iter_frames(batch.body, self.header.seed):
                event = decode_frame(frame)
                self.streams.setdefault(event.stream, []).append(_Spot(event.id, body + offset, len(frame)))
                self.ids[event.id] = event.stream
                grown.add(event.stream)
        return grown

    def frames(self, stream: str, after: int, limit: int) -> list[bytes]:
        """Return the frames of a stream's first events above an id."""
        spots = self.streams.get(stream, [])
        place = bisect_right(spots, after, key=_id_of)
        spots = spots[place : place + limit]
        return [self._read(spot.length, spot.offset) for spot in spots]

    def _read(self, length: int, offset: int) -> bytes:
        """Return bytes of the file.

        Raises:
            DamageError: The disk does not give them, which is as good as damage.
        """
        try:
            return self._disk.read(self._fd, length, offset)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise _as_damage(error, self._path, offset, length) from error

    def close(self) -> None:
        self._disk.close(self._fd)


def _as_damage(error: OSError, path: Path, offset: int, length: int) -> DamageError:
    """Return damage for an error that says that the disk does not give some bytes, which is as good as that."""
    return DamageError(path, offset, length, f"the disk does not give them: {error}")


class _Lane:
    """Another process's lane."""

    def __init__(self, disk: Disk, folder: Path, *, look_only: bool) -> None:
        self._disk = disk
        self.folder = folder
        self._look_only = look_only
        self.marks = Marks(disk, folder, look_only=look_only)
        self.journals: dict[int, _Journal] = {}
        self.newest = 0
        self._skipped = False

    @property
    def visible(self) -> Place:
        """Up to where the lane may be read."""
        if self._look_only and not self.marks.valid:
            # Nobody has recovered it since the machine was restarted, nor will who only looks: what is whole counts.
            return Place(max(self.journals, default=0), END_OF_FILE)
        return self.marks.visible

    def pin(self) -> set[str]:
        """Open the journals that are there, so that they can be read even when a checkpoint removes them.

        Returns:
            The streams that grew in journals that were removed since: their events are in the catalogue now.
        """
        grown: set[str] = set()
        ordinals = set(journal_ordinals(self._disk, self.folder))
        for gone in self.journals.keys() - ordinals:
            with contextlib.closing(self.journals.pop(gone)) as journal:
                grown |= journal.read_on(None)
        for new in sorted(ordinals - self.journals.keys()):
            try:
                self.journals[new] = _Journal(self._disk, journal_path(self.folder, new))
                self._skipped |= new > self.newest + 1
                self.newest = max(self.newest, new)
            except (FileNotFoundError, DamageError):
                # Checkpointed since, or only being made: nothing of it is visible.
                continue
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                raise _as_damage(error, journal_path(self.folder, new), 0, HEADER_BYTES) from error
        return grown

    def read_on(self, visible: Place) -> set[str]:
        """Read up to a mark and return the streams that grew."""
        grown: set[str] = set()
        ends = {journal.header.follows: journal.header.follows_end for journal in self.journals.values()}
        for ordinal, journal in sorted(self.journals.items()):
            if ordinal < visible.ordinal:
                grown |= journal.read_on(ends.get(ordinal))
            elif ordinal == visible.ordinal:
                grown |= journal.read_on(visible.offset)
        return grown

    def missed(self, visible: Place) -> bool:
        """Whether a journal came and went between two looks, so that nobody knows which streams grew."""
        missed = self._skipped or visible.ordinal > self.newest
        self._skipped = False
        self.newest = max(self.newest, visible.ordinal)
        return missed

    def close(self) -> None:
        for journal in self.journals.values():
            journal.close()
        self.marks.close()


class Foreign:
    """All lanes but the process's own; used by one thread at a time, but for `moves`.

    Args:
        disk: The file door.
        root: The log folder.
        own: Number of the lane that this process writes, None when it only looks and changes nothing.

    Attributes:
        moves_seen: What `moves` last returned.
    """

    def __init__(self, disk: Disk, root: Path, own: int | None) -> None:
        self._disk = disk
        self._root = root
        self._folder = root / "lanes"
        self._own = own
        self._lanes: dict[int, _Lane] = {}
        self._folder_time = -1
        self._mutex = threading.Lock()
        self._words: tuple[int, ...] = ()
        self._grown: set[str] = set()
        self._missed = False
        self.moves_seen = 0

    def moves(self) -> int:
        """Return a number that grows whenever another lane has become longer, was opened anew, or was added."""
        # A mark begins at nothing with each opening: by itself it may have gone there and back.
        words = tuple(word for lane in self._all() for word in (lane.marks.word, lane.marks.incarnation))
        if words != self._words:
            self._words = words
            self.moves_seen += 1
        return self.moves_seen

    def _all(self) -> list[_Lane]:
        """Return all other lanes, those included that were added since the last look."""
        with self._mutex:
            changed = self._folder.stat().st_mtime_ns if self._own is not None or self._folder.exists() else 0
            if changed != self._folder_time:
                # A folder made within the clock's tick of the last change leaves the same time behind.
                self._folder_time = changed if time.time_ns() - changed > _CLOCK_TICK_NS else -1
                for number, folder in lane_folders(self._disk, self._root):
                    if number != self._own and number not in self._lanes:
                        self._add(number, folder)
            return list(self._lanes.values())

    def _add(self, number: int, folder: Path) -> None:
        try:
            self._lanes[number] = _Lane(self._disk, folder, look_only=self._own is None)
        except FileNotFoundError:
            if self._own is not None:
                raise
            # Only being made by somebody else: look again.
            self._folder_time = -1

    def news(self) -> tuple[set[str], bool]:
        """Return the streams that grew since the last call, and whether others may have grown too.

        Whoever read on meanwhile, for another stream, saw them grow too; those who follow must hear of it.
        """
        self.read_on()
        grown, self._grown = self._grown, set()
        missed, self._missed = self._missed, False
        return grown, missed

    def read_on(self) -> None:
        """Pin every lane and read all that is visible now.

        The marks are looked at together: with those of one lane older than those of another, a stream that moved
        between them would show its later events without the earlier ones.

        Raises:
            DamageError: The disk does not give what another process wrote.
        """
        try:
            self._read_on()
        except BaseException:
            # Which streams had grown until then is forgotten, and they are not found to have grown again.
            self._missed = True
            raise

    def _read_on(self) -> None:
        lanes = self._all()
        grown: set[str] = set()
        for lane in lanes:
            grown |= lane.pin()
        seen = [lane.visible for lane in lanes]
        for _ in range(_COLLECTS):
            again = [lane.visible for lane in lanes]
            if again == seen:
                break
            seen = again
        for lane, visible in zip(lanes, seen, strict=True):
            if visible.ordinal not in lane.journals:
                # Begun since the look at the folder; or checkpointed, then there is nothing to open.
                grown |= lane.pin()
            self._missed |= lane.missed(visible)
            grown |= lane.read_on(visible)
        self._grown |= grown
        if len(self._grown) > _MOST_GROWN:
            self._grown.clear()
            self._missed = True

    def frames(self, stream: str, after: int, limit: int) -> list[bytes]:
        """Return a stream's first events above an id, as far as `read_on` has read; perhaps more, or some twice."""
        return [
            frame
            for lane in list(self._lanes.values())
            for journal in lane.journals.values()
            for frame in journal.frames(stream, after, limit)
        ]

    def ids_by_stream(self) -> dict[str, list[int]]:
        """Return the ids of all events, ascending, by stream, as far as `read_on` has read."""
        found: dict[str, list[int]] = {}
        for lane in list(self._lanes.values()):
            for journal in lane.journals.values():
                for stream, spots in journal.streams.items():
                    found.setdefault(stream, []).extend(spot.event_id for spot in spots)
        return {stream: sorted(ids) for stream, ids in found.items()}

    def stream_of(self, event_id: int) -> str | None:
        """Return the stream of an event, as far as `read_on` has read."""
        for lane in list(self._lanes.values()):
            for journal in lane.journals.values():
                if (stream := journal.ids.get(event_id)) is not None:
                    return stream
        return None

    def close(self) -> None:
        """Close all files."""
        for lane in list(self._lanes.values()):
            lane.close()
        self._lanes.clear()
