"""Every byte of a lane: journals, marks and state, whether its process lives or is dead."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final, NamedTuple

from logstore.errors import DamageError, FormatVersionError
from logstore.ops.verify.ledger import JournalEvent
from logstore.ops.verify.report import Finding, found
from logstore.ops.verify.segments import Spot
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_JOURNAL, FileHeader, decode_header, frame_seed
from logstore.storage.ids import lane_of
from logstore.storage.journal import (
    PAGE_BYTES,
    JournalReader,
    read_header,
    scan_headless,
    scan_journal,
)
from logstore.storage.lane import (
    END_OF_FILE,
    NOWHERE,
    STATE_SLOT_BYTES,
    Marks,
    Place,
    bad_slots,
    is_held,
    journal_ordinals,
    journal_path,
    read_reservation,
)
from logstore.storage.record import FRAME_HEADER, decode_stamp, iter_frames

_MARKS_USED: Final = 40
_STATE, _MARKS = -1, -2
"""Stand for ordinals where sizes are noted."""


class LaneCheck(NamedTuple):
    """What was found of one lane.

    Attributes:
        files: Read.
        bytes: Read.
        events: In journals that are not done with.
        unknown: Events of journals that are to be removed since all of them are in the index.
        findings: What is wrong.
    """

    files: int
    bytes: int
    events: list[JournalEvent]
    unknown: list[Spot]
    findings: list[Finding]


class _Signs(NamedTuple):
    """What a lane says of itself at one moment."""

    alive: bool
    adopting: bool
    visible: Place
    durable: Place


class LaneLook:
    """One lane being read.

    Args:
        disk: The file door.
        folder: Of the lane.
        number: Of the lane.
        store_id: Of the store.
        done: Ordinals of the journals whose events are all in segments, as the index says.
        quick: Whether to read headers only.
    """

    def __init__(self, disk: Disk, folder: Path, number: int, store_id: int, done: set[int], *, quick: bool) -> None:
        self._disk = disk
        self._folder = folder
        self._number = number
        self._store_id = store_id
        self._seed = frame_seed(store_id)
        self._done = done
        self._quick = quick
        self._sizes: dict[int, int] = {}
        self._events: list[JournalEvent] = []
        self._unknown: list[Spot] = []
        self._findings: list[Finding] = []

    def run(self) -> LaneCheck:
        """Read everything; what looks wrong while the lane is in use is looked at again."""
        signs = self._signs()
        ordinals = journal_ordinals(self._disk, self._folder)
        ends = self._ends(ordinals)
        for ordinal in ordinals:
            before = len(self._events), len(self._unknown)
            findings = self._journal(ordinal, signs, ends)
            if findings:
                del self._events[before[0] :], self._unknown[before[1] :]
                # The lane may have been adopted, or a file given up, since it was looked at first.
                signs = self._signs()
                ends = self._ends(journal_ordinals(self._disk, self._folder))
                findings = self._journal(ordinal, signs, ends)
            self._findings += findings
        self._check_state(bool(ordinals))
        if not signs.alive:
            self._check_marks()
        return LaneCheck(len(self._sizes), sum(self._sizes.values()), self._events, self._unknown, self._findings)

    def _signs(self) -> _Signs:
        alive = is_held(self._disk, self._folder)
        try:
            with contextlib.closing(Marks(self._disk, self._folder, look_only=True)) as marks:
                return _Signs(alive, marks.incarnation == 0, marks.visible, marks.durable)
        except FileNotFoundError:
            return _Signs(alive, True, NOWHERE, NOWHERE)

    def _ends(self, ordinals: list[int]) -> dict[int, int]:
        """Return where files end, as the header of the file that followed each says."""
        ends: dict[int, int] = {}
        for ordinal in ordinals:
            path = journal_path(self._folder, ordinal)
            # One that the disk does not give is told when it is read whole.
            with contextlib.suppress(OSError, DamageError, FormatVersionError):
                fd = self._disk.open(path)
                try:
                    header = read_header(self._disk, fd, path)
                finally:
                    self._disk.close(fd)
                ends[header.follows] = header.follows_end
        return ends

    def _journal(self, ordinal: int, signs: _Signs, ends: dict[int, int]) -> list[Finding]:
        """Read a journal; its events are noted when it is whole."""
        path = journal_path(self._folder, ordinal)
        if signs.alive and not signs.adopting and ordinal > signs.visible.ordinal:
            # Nothing of it is visible yet.
            return []
        try:
            data = self._read(path)
        except FileNotFoundError:
            return []
        except OSError as error:
            return [found("damage", path, f"the disk does not give the file: {error}")]
        self._sizes[ordinal] = len(data)
        try:
            return self._judge(path, ordinal, data, signs, ends.get(ordinal))
        except FormatVersionError as error:
            return [found("version", path, str(error), 0, HEADER_BYTES)]

    def _judge(self, path: Path, ordinal: int, data: bytes, signs: _Signs, end: int | None) -> list[Finding]:
        """Note a journal's events, and return what is wrong with it."""
        if ordinal in self._done:
            # It will only be removed; but then all of it must be in the index.
            self._unknown += [
                Spot(each.event_id, each.stream, each.checksum, each.file, each.offset or 0)
                for each in self._recovered(path, data, end)
            ]
            return []
        if not signs.alive:
            return self._dead(path, ordinal, data, end, signs)
        if signs.adopting:
            # Being brought into segments, by who tells what is damaged.
            self._events += self._recovered(path, data, end)
            return []
        return self._live(path, data, signs.visible.offset if ordinal == signs.visible.ordinal else end)

    def _read(self, path: Path) -> bytes:
        if not self._quick:
            return self._disk.read_file(path)
        fd = self._disk.open(path)
        try:
            return self._disk.read(fd, HEADER_BYTES, 0)
        finally:
            self._disk.close(fd)

    def _live(self, path: Path, data: bytes, end: int | None) -> list[Finding]:
        """Read what others may read of a journal whose process lives."""
        try:
            header = decode_header(data, path, KIND_JOURNAL)
        except DamageError as error:
            return [found("damage", path, str(error), 0, HEADER_BYTES)]
        if self._quick:
            return []
        if end == END_OF_FILE:
            end = None
        events, whole = self._whole_batches(path, data, header, end)
        self._events += events
        if end is not None and whole < end:
            return [
                found("damage", path, "bytes that others may read, and that are no whole batch", whole, end - whole)
            ]
        return []

    def _whole_batches(
        self, path: Path, data: bytes, header: FileHeader, end: int | None
    ) -> tuple[list[JournalEvent], int]:
        """Return the events up to the first batch that is not whole, and where that is."""
        reader = JournalReader(header, data[:HEADER_BYTES])
        events: list[JournalEvent] = []
        for batch in reader.batches(data, limit=end):
            base = batch.end - len(batch.body)
            events += [self._event(path, frame, base + offset) for offset, frame in iter_frames(batch.body, self._seed)]
        return events, reader.offset

    def _dead(self, path: Path, ordinal: int, data: bytes, end: int | None, signs: _Signs) -> list[Finding]:
        """Read a journal as recovery will."""
        witness = end or 0
        if signs.durable.ordinal == ordinal:
            witness = max(witness, signs.durable.offset)
        if end is None and signs.visible.ordinal == ordinal and signs.visible.offset != END_OF_FILE:
            # The machine has not been restarted since: what was handed to it is there.
            witness = max(witness, signs.visible.offset)
        if self._quick:
            return self._check_header(path, data, witness)
        try:
            scan = scan_journal(data, path, witness, end)
            if scan.header.store_id != self._store_id:
                raise DamageError(path, 0, HEADER_BYTES, "the file belongs to another store")
            findings = self._misplaced(path, ordinal, scan.header)
        except DamageError as error:
            scan = scan_headless(data, self._store_id, witness, end, str(error))
            findings = []
        self._events += [self._event(path, frame, None) for frame in scan.frames]
        for bad in scan.damage:
            lost = "" if bad.lost_events is None else f"; {bad.lost_events} events are lost"
            findings.append(found("damage", path, f"{bad.reason}{lost}", bad.offset, bad.length))
        return findings

    def _recovered(self, path: Path, data: bytes, end: int | None) -> list[JournalEvent]:
        """Return the events of a journal that somebody else answers for, up to its first bad batch."""
        try:
            header = decode_header(data, path, KIND_JOURNAL)
        except DamageError:
            return []
        return self._whole_batches(path, data, header, end)[0]

    def _check_header(self, path: Path, data: bytes, witness: int) -> list[Finding]:
        try:
            decode_header(data, path, KIND_JOURNAL)
        except DamageError as error:
            if witness > PAGE_BYTES:
                return [found("damage", path, str(error), 0, HEADER_BYTES)]
        return []

    def _misplaced(self, path: Path, ordinal: int, header: FileHeader) -> list[Finding]:
        if header.number == ordinal and (not header.incarnation or lane_of(header.incarnation) == self._number):
            return []
        reason = f"the file is journal {header.number} of lane {lane_of(header.incarnation):04d} by its header"
        return [found("damage", path, reason, 0, HEADER_BYTES)]

    def _event(self, path: Path, frame: bytes, offset: int | None) -> JournalEvent:
        stamp = decode_stamp(frame)
        return JournalEvent(stamp.id, stamp.prev, stamp.stream, frame[: FRAME_HEADER.size], str(path), offset)

    def _check_state(self, has_journals: bool) -> None:
        """Check both slots of the reservation; a write of 28 bytes is not torn."""
        path = self._folder / "state"
        bad = self._bad_slots(path)
        if bad and self._bad_slots(path) == bad:
            for offset in bad:
                self._findings.append(
                    found("lane", path, "a reservation does not match its checksum", offset, STATE_SLOT_BYTES)
                )
        elif has_journals and read_reservation(self._disk, self._folder).event_id == 0:
            self._findings.append(found("lane", path, "the reservation of ids is gone"))

    def _bad_slots(self, path: Path) -> list[int]:
        try:
            data = self._disk.read_file(path)
        except FileNotFoundError:
            return []
        self._sizes[_STATE] = len(data)
        return bad_slots(data)

    def _check_marks(self) -> None:
        """Check what a dead lane's marks say against what there can be."""
        path = self._folder / "marks"
        try:
            data = self._disk.read_file(path)
            with contextlib.closing(Marks(self._disk, self._folder, look_only=True)) as marks:
                durable, incarnation = marks.durable, marks.incarnation
        except FileNotFoundError:
            return
        self._sizes[_MARKS] = len(data)
        reserved = read_reservation(self._disk, self._folder).ordinal
        if data[_MARKS_USED:PAGE_BYTES].strip(b"\0"):
            self._findings.append(found("lane", path, "bytes where the marks have none", _MARKS_USED, None))
        if incarnation and lane_of(incarnation) != self._number:
            self._findings.append(found("lane", path, "the incarnation is not one of this lane", 32, 8))
        if reserved and durable.ordinal >= reserved:
            self._findings.append(found("lane", path, f"the mark names journal {durable.ordinal}, never begun", 8, 8))
