"""Segment files: the events of one stream, or of many small ones in a pack, for reading.

A segment is a header and then frames, append-only; it grows only while its writer lives and is sealed at a size. The
frames are the ones of the journal, copied without being encoded again. In a pack each stream's run is contiguous.
A sealed segment never changes: its SHA-256 is in the catalogue.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_SEGMENT, FileHeader, decode_header
from logstore.storage.ids import MAX_ID
from logstore.storage.record import iter_frames

_SUFFIX: Final = ".segment"
_NAME: Final = re.compile(r"(0|[1-9][0-9]{0,18})\.segment", re.ASCII)
UNPUBLISHED: Final = ".tmp"
"""What follows the name of a segment that is not in its place yet: nobody else looks at it."""


def segment_path(root: Path, number: int) -> Path:
    """Return the path of a segment."""
    return root / "segments" / f"{number}{_SUFFIX}"


def segment_numbers(disk: Disk, root: Path) -> list[int]:
    """Return the numbers of all segment files, oldest first."""
    names = (name.removesuffix(_SUFFIX) for name in disk.list(root / "segments") if _NAME.fullmatch(name))
    return sorted(number for number in map(int, names) if number <= MAX_ID)


class SegmentWriter:
    """Appends runs of frames to one new segment; used by one thread at a time, but for a `sync` beside looks at it.

    Args:
        disk: The file door.
        root: The log folder.
        header: Its header.
        suffix: Behind the name of a file that is to be published when it is whole.

    Attributes:
        number: Number of the segment.
        end: Its length so far, in bytes.
    """

    def __init__(self, disk: Disk, root: Path, header: FileHeader, suffix: str = "") -> None:
        self._disk = disk
        self._root = root
        self.number = header.number
        path = segment_path(root, header.number)
        self.path = path.with_name(path.name + suffix)
        self._fd = disk.create(self.path)
        self._digest = hashlib.sha256()
        self.end = 0
        try:
            self.append(header.encode())
        except BaseException:
            self.close()
            # Nothing is in it, and the next try takes another number.
            with contextlib.suppress(OSError):
                disk.unlink(self.path)
            raise

    def append(self, data: bytes) -> int:
        """Write bytes at the end and return the offset where they begin; `sync` makes them durable."""
        offset = self.end
        self._disk.write(self._fd, data, offset)
        self._digest.update(data)
        self.end = offset + len(data)
        return offset

    def sync(self) -> None:
        """Return when everything written is on disk; a new file also needs its folder synced."""
        self._disk.sync(self._fd)

    def publish(self) -> None:
        """Put a synced file that was begun beside its place there; the folder is synced on return."""
        path = segment_path(self._root, self.number)
        self._disk.rename(self.path, path)
        self.path = path
        self._disk.sync_folder(path.parent)

    def discard(self) -> None:
        """Close a file that failed, and remove it unless it is in its place: the index may name it all the same."""
        self.close()
        if self.path.name.endswith(UNPUBLISHED):
            # What is left of it the next pass of compaction removes.
            with contextlib.suppress(OSError):
                self._disk.unlink(self.path)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._disk.close(fd)

    @property
    def sha256(self) -> str:
        """Digest of the whole file as written."""
        return self._digest.hexdigest()


def iter_segment(data: bytes, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield `(offset, frame)` of a whole segment up to its first invalid frame.

    Raises:
        DamageError: The header is bad.
        FormatVersionError: A newer release wrote the file.
    """
    header = decode_header(data, path, KIND_SEGMENT)
    return iter_frames(data, header.seed, HEADER_BYTES)
