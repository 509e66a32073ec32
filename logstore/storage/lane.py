"""A lane: the journal folder of one open store, held by a lock.

```
lanes/0003/lock                    flock of the process that writes here; never unlinked
lanes/0003/state                   reservation: no id or ordinal at or above it was given out
lanes/0003/marks                   mapped: how far readers may read, how far the disk has it
lanes/0003/0000000042.journal      journal files, named by an ordinal that is never used twice
```

The lock is the only sign of life: the kernel releases it with the process, there is no heartbeat to miss.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import google_crc32c

from logstore.errors import DamageError, StoreLockedError
from logstore.storage import ids
from logstore.storage.files import Disk, Lock
from logstore.storage.header import KIND_JOURNAL, FileHeader, new_salt
from logstore.storage.journal import MAX_FILE_BYTES, PAGE_BYTES, JournalWriter
from logstore.storage.kernel_sync import Done as Synced
from logstore.storage.kernel_sync import KernelSync

_SUFFIX: Final = ".journal"
_JOURNAL_NAME: Final = re.compile(r"[0-9]{10}\.journal", re.ASCII)
_LANE_NAME: Final = re.compile(r"[0-9]{4}", re.ASCII)
_TEMPORARY: Final = ".tmp"
_INCARNATION_AT: Final = 32
_STATE_FIELDS: Final = struct.Struct("<QQQ")
_CRC: Final = struct.Struct("<I")
_STATE_SLOTS: Final = (0, PAGE_BYTES)
STATE_SLOT_BYTES: Final = _STATE_FIELDS.size + _CRC.size

RESERVE_AHEAD_MS: Final = 2_000
_RESERVE_ORDINALS: Final = 64
_LAST_FLOOR: Final = ids.MAX_ID - (1 << 53)
_LAST_ORDINAL: Final = 0xF0000000
"""Far beyond what any clock or lane gets to before the year 2109; behind them enough is left for decades."""


class Place(NamedTuple):
    """A place in a lane: everything in files of smaller ordinals, and this one up to `offset`."""

    ordinal: int
    offset: int


NOWHERE: Final = Place(0, 0)
END_OF_FILE: Final = MAX_FILE_BYTES
"""An offset behind everything that a mark can name."""
_MOST_ORDINAL: Final = 0xFFFFFFFF


@functools.cache
def boot_id() -> bytes:
    """Return 16 bytes that change when the machine restarts; what only the page cache held is gone then."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        # macOS has no such file; the parent of all processes starts with the machine.
        text = str(Path("/dev").stat().st_ctime_ns) if sys.platform == "darwin" else ""
    return bytes.fromhex(text.strip().replace("-", ""))[:16] if "-" in text else text.encode()[:16].ljust(16, b"\0")


class Marks:
    """Two places of a lane in a small mapped file, each one aligned 64-bit word, read by others without locks.

    | offset | size | field |
    | --- | --- | --- |
    | 0 | 8 | visible: acknowledged up to here (ordinal in the upper, offset in the lower half) |
    | 8 | 8 | durable: on disk up to here |
    | 16 | 16 | boot id of the machine when the lane was opened: `visible` is void after a restart of the machine |
    | 32 | 8 | incarnation that writes, or wrote last |

    Args:
        disk: The file door.
        folder: Of the lane.
        look_only: Change nothing, and make no file where there is none.

    Raises:
        FileNotFoundError: There is none, and nothing may be changed.
    """

    def __init__(self, disk: Disk, folder: Path, *, look_only: bool = False) -> None:
        self._disk = disk
        self._path = folder / "marks"
        fd = disk.open(self._path, create=not look_only)
        try:
            # Several processes may do this at once, so nothing is written.
            if look_only and disk.size(fd) < PAGE_BYTES:
                raise FileNotFoundError(errno.ENOENT, "only being made", str(self._path))
            disk.extend(fd, PAGE_BYTES)
            self._map = mmap.mmap(fd, PAGE_BYTES, access=mmap.ACCESS_READ if look_only else mmap.ACCESS_WRITE)
        finally:
            disk.close(fd)
        # A cast view stores a word in one instruction; struct's "<Q" writes it byte by byte.
        self._words = memoryview(self._map).cast("Q")

    @property
    def word(self) -> int:
        """The visible mark as one number, to see whether it moved."""
        return int(self._words[0])

    @property
    def visible(self) -> Place:
        """Up to where readers may read; `NOWHERE` when the machine was restarted since."""
        return _place(self._words[0]) if self.valid else NOWHERE

    @property
    def durable(self) -> Place:
        """Up to where the disk is known to hold the lane: a witness, never too far."""
        return _place(self._words[1])

    @property
    def valid(self) -> bool:
        """Whether the lane was last opened since the machine started."""
        return self._map[16:32] == boot_id()

    @property
    def incarnation(self) -> int:
        """The opening that writes the lane, or wrote it last; 0 once what it left is being adopted."""
        return int(self._words[4])

    def disown(self) -> None:
        """Say that nobody writes the lane any more; the caller holds its lock."""
        fd = self._disk.open(self._path, write=True)
        try:
            # The page's first write may be this one, see `begin`; from here on it has a block.
            self._disk.write(fd, bytes(8), _INCARNATION_AT)
        finally:
            self._disk.close(fd)

    def begin(self, incarnation: int) -> None:
        """Start a new incarnation of the lane: nothing is visible yet."""
        page = bytes(16) + boot_id() + incarnation.to_bytes(8, sys.byteorder)
        fd = self._disk.open(self._path, write=True)
        try:
            # Written, not only mapped: a store into a mapped page that has no block kills the process on a full disk.
            self._disk.write(fd, page.ljust(PAGE_BYTES, b"\0"), 0)
        finally:
            self._disk.close(fd)

    def show(self, ordinal: int, offset: int) -> None:
        """Let readers read up to the given place."""
        self._words[0] = ordinal << 32 | offset

    def witness(self, ordinal: int, offset: int) -> None:
        """Tell recovery that the disk holds the lane up to the given place."""
        self._words[1] = ordinal << 32 | offset

    def close(self) -> None:
        """Unmap the file."""
        self._words.release()
        self._map.close()


def _place(word: int) -> Place:
    return Place(word >> 32, word & 0xFFFFFFFF)


def is_held(disk: Disk, folder: Path) -> bool:
    """Whether a process has the store open on this lane."""
    try:
        # Shared, so that two who ask do not take each other for the holder.
        lock = disk.lock(folder / "lock", shared=True, create=False)
    except FileNotFoundError:
        return False
    if lock is None:
        return True
    lock.release()
    return False


def journal_ordinals(disk: Disk, folder: Path) -> list[int]:
    """Return the ordinals of a lane's journal files, ascending."""
    return sorted(int(name.removesuffix(_SUFFIX)) for name in disk.list(folder) if _JOURNAL_NAME.fullmatch(name))


def journal_path(folder: Path, ordinal: int) -> Path:
    """Return the path of a lane's journal file."""
    return folder / f"{ordinal:010d}{_SUFFIX}"


def remove_unpublished(disk: Disk, folder: Path) -> None:
    """Remove what a dead process began beside its place and did not finish."""
    for name in disk.list(folder):
        if name.endswith(_TEMPORARY):
            disk.unlink(folder / name)


def lane_folders(disk: Disk, root: Path) -> Iterator[tuple[int, Path]]:
    """Yield number and folder of every lane that ever was."""
    for name in sorted(disk.list(root / "lanes")):
        if _LANE_NAME.fullmatch(name) and int(name) < ids.LANE_COUNT:
            yield int(name), root / "lanes" / name


class Reservation(NamedTuple):
    """Bounds that no id and no ordinal of a lane has reached."""

    event_id: int
    ordinal: int


class _State(NamedTuple):
    """A reservation as it is in a slot; the highest sequence number is the newest."""

    sequence: int
    reservation: Reservation


def read_reservation(disk: Disk, folder: Path) -> Reservation:
    """Return the newest whole reservation of a lane, zeros when there is none."""
    return _read_state(disk, folder).reservation


def _read_state(disk: Disk, folder: Path) -> _State:
    """Return the newest whole state. Two slots are written in turn, so a torn write leaves the one before."""
    newest = _State(0, Reservation(0, 0))
    try:
        fd = disk.open(folder / "state")
    except FileNotFoundError:
        return newest
    try:
        slots = [disk.read(fd, STATE_SLOT_BYTES, offset) for offset in _STATE_SLOTS]
    finally:
        disk.close(fd)
    return max([newest, *(state for data in slots if (state := _decode_slot(data)) is not None)])


def _decode_slot(data: bytes) -> _State | None:
    """Return what a slot holds, None when it was not written whole, or never by this package."""
    fields, checksum = data[: _STATE_FIELDS.size], data[_STATE_FIELDS.size :]
    if checksum != _CRC.pack(google_crc32c.value(fields)):
        return None
    sequence, event_id, ordinal = _STATE_FIELDS.unpack(fields)
    if max(sequence, event_id) > ids.MAX_ID or ordinal > _MOST_ORDINAL:
        return None
    return _State(sequence, Reservation(event_id, ordinal))


def bad_slots(state: bytes) -> list[int]:
    """Return the offsets of the slots of a lane's `state` that hold something, and not a whole reservation."""
    slots = {offset: state[offset : offset + STATE_SLOT_BYTES] for offset in _STATE_SLOTS}
    return [offset for offset, data in slots.items() if data.strip(b"\0") and _decode_slot(data) is None]


def first_reservation(disk: Disk, folder: Path, reservation: Reservation) -> None:
    """Give a lane that has no `state` yet its first one; on return the file is on disk, its folder's entry not."""
    fd = disk.create(folder / "state")
    try:
        _write_slot(disk, fd, _State(1, reservation))
    finally:
        disk.close(fd)


def _write_slot(disk: Disk, fd: int, state: _State) -> None:
    fields = _STATE_FIELDS.pack(state.sequence, *state.reservation)
    # Never over the newest, which a torn write would take along.
    slot = _STATE_SLOTS[state.sequence % len(_STATE_SLOTS)]
    disk.write(fd, fields + _CRC.pack(google_crc32c.value(fields)), slot)
    disk.sync(fd)


class Lane:
    """The lane that this process writes.

    Made by `Lane.acquire`. The journal methods run in one thread at a time, that of the group commit, or
    while that thread has nothing to do on the loop.

    Attributes:
        number: Number of the lane.
        folder: Its folder.
        ids: Where its event ids come from.
        incarnation: An id that no other opening of any lane has.
        journal: The file being written, None before the first event and after a rotation.
    """

    def __init__(self, disk: Disk, folder: Path, number: int, lock: Lock, store_id: int) -> None:
        self._disk = disk
        self._lock = lock
        self._store_id = store_id
        self.folder = folder
        self.number = number
        self.marks = Marks(disk, folder)
        self.ids = ids.IdGenerator(number)
        self.incarnation = 0
        self.journal: JournalWriter | None = None
        self._sequence, self._reserved = _read_state(disk, folder)
        self._state_in_folder = False
        existing = journal_ordinals(disk, folder)
        self._ordinal = max(self._reserved.ordinal, existing[-1] + 1 if existing else 1)
        self._last_place = NOWHERE

    @classmethod
    def acquire(cls, disk: Disk, root: Path, store_id: int) -> Lane:
        """Take the first lane that nobody holds.

        Raises:
            StoreLockedError: All lanes are held.
        """
        for number in range(ids.LANE_COUNT):
            folder = root / "lanes" / f"{number:04d}"
            disk.make_folder(folder)
            if (lock := disk.lock(folder / "lock")) is not None:
                try:
                    return cls(disk, folder, number, lock, store_id)
                except BaseException:
                    lock.release()
                    raise
        raise StoreLockedError(f"all {ids.LANE_COUNT} lanes of {root} are held by open stores; close some")

    def begin(self, floor: int, now_us: int) -> None:
        """Draw an incarnation, above `floor` and above everything this lane ever gave out.

        Before the first write what an earlier incarnation left must be adopted, then `marks.begin` called.

        Raises:
            DamageError: There are no ids, or no ordinals, above what is said to have been given out.
        """
        if self._ordinal > _LAST_ORDINAL:
            raise DamageError(self.folder, 0, 0, f"journal {self._ordinal - 1} or its reservation is none of ours")
        self.advance(max(floor, self._reserved.event_id))
        self.incarnation = self.ids.next(now_us)
        self.reserve(self.incarnation)

    def advance(self, floor: int) -> None:
        """Give out only ids above `floor` from now on.

        Raises:
            DamageError: There are none.
        """
        if floor > _LAST_FLOOR:
            reason = f"the store says that ids up to {floor} were given out, and there are none above; restore a backup"
            raise DamageError(self.folder / "state", 0, 0, reason)
        self.ids.advance(floor)

    @property
    def reserved_id(self) -> int:
        """Ids below this one may be written without another sync."""
        return self._reserved.event_id

    def reserve(self, event_id: int) -> None:
        """Return when the disk knows that ids past `event_id` may be given out."""
        self._write_state(Reservation(ids.later(event_id, RESERVE_AHEAD_MS), self._ordinal + _RESERVE_ORDINALS))

    def _write_state(self, reservation: Reservation) -> None:
        sequence = self._sequence + 1
        fd = self._disk.open(self.folder / "state", create=True)
        try:
            _write_slot(self._disk, fd, _State(sequence, reservation))
        finally:
            self._disk.close(fd)
        if not self._state_in_folder:
            self._disk.sync_folder(self.folder)
            self._state_in_folder = True
        self._sequence, self._reserved = sequence, reservation

    def write(self, frames: Sequence[bytes], last_id: int) -> None:
        """Write one batch to the journal, which is begun when there is none.

        Args:
            frames: The events, in id order.
            last_id: The id of the last of them.

        Raises:
            OSError: The disk refused; the file must be given up with `abandon`.
        """
        if last_id >= self._reserved.event_id:
            self.reserve(last_id)
        if self.journal is None:
            self._begin_journal()
        assert self.journal is not None
        self.journal.write(frames)

    def can_write_inline(self, last_id: int, file_bytes: int) -> bool:
        """Whether `write` would do without a sync and without a new file."""
        return self.journal is not None and self.journal.end < file_bytes and last_id < self._reserved.event_id

    def begin_rewrite(self) -> None:
        """Begin a file for what a given-up one may not hold, beside its place.

        Its header says that the other one ends: that must not be seen before everything else that this file is for.
        """
        self._begin_journal(_TEMPORARY)

    def publish_rewrite(self) -> None:
        """Put the synced file in its place; on return it stays there."""
        assert self.journal is not None
        path = journal_path(self.folder, self.journal.header.number)
        self._disk.rename(self.journal.path, path)
        self.journal.path = path
        self._disk.sync_folder(self.folder)

    def _begin_journal(self, suffix: str = "") -> None:
        if self._ordinal >= self._reserved.ordinal:
            self.reserve(self._reserved.event_id)
        header = FileHeader(
            kind=KIND_JOURNAL,
            store_id=self._store_id,
            salt=new_salt(),
            number=self._ordinal,
            incarnation=self.incarnation,
            follows=self._last_place.ordinal,
            follows_end=self._last_place.offset,
        )
        # The ordinal is spent even when the file cannot be made: half of it may be there.
        self._ordinal += 1
        path = journal_path(self.folder, header.number)
        self.journal = JournalWriter(self._disk, path.with_name(path.name + suffix), header)

    def sync(self) -> None:
        """Return when everything written is on disk."""
        assert self.journal is not None
        self.journal.sync()
        self._witness()

    def begin_sync(self, kernel_sync: KernelSync, done: Synced) -> bool:
        """Begin what `sync` does, see `JournalWriter.begin_sync`; when it has ended well, `synced` is to be called."""
        assert self.journal is not None
        return self.journal.begin_sync(kernel_sync, done)

    def synced(self) -> None:
        """Note that everything written is on disk: a sync that ran beside this process has ended well."""
        assert self.journal is not None
        self.journal.synced()
        self._witness()

    def _witness(self) -> None:
        assert self.journal is not None
        self.marks.witness(self.journal.header.number, self.journal.durable)

    def rotate(self) -> None:
        """Seal the journal; the next write begins a new one. On return the sealed file is on disk whole."""
        if self.journal is not None:
            self.journal.seal()
            self._last_place = Place(self.journal.header.number, self.journal.end)
            self.marks.witness(*self._last_place)
            self.journal = None

    def abandon(self) -> None:
        """Give up a file that failed: the next one says that this one ends at its last good sync.

        A failed sync is never repeated: the kernel marks the pages clean, so that the next one succeeds without
        having written them.
        """
        if self.journal is not None:
            journal, self.journal = self.journal, None
            self._last_place = Place(journal.header.number, max(journal.durable, PAGE_BYTES))
            journal.close()

    def discard(self) -> None:
        """Remove a file that failed before anything of it was acknowledged."""
        if self.journal is not None:
            journal, self.journal = self.journal, None
            # The disk fails already; the file holds nothing that another one does not.
            with contextlib.suppress(OSError):
                journal.close()
                self._disk.unlink(journal.path)

    def show(self) -> None:
        """Let other processes read what was written so far."""
        if self.journal is not None:
            self.marks.show(self.journal.header.number, self.journal.end)

    def end(self) -> None:
        """Give the lane back; its journal files, if any are left, wait for whoever opens the store next."""
        if self.journal is not None:
            self.journal.close()
            self.journal = None
        self.marks.close()
        self._lock.release()

    def settle(self) -> None:
        """Shrink the reservation to what was used, so that the next opening begins at the clock."""
        self._write_state(Reservation(self.ids.last + 1, self._ordinal))
