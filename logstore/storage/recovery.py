"""Recovery: what a dead process left in its lane goes to segments.

The caller holds the lock of the lane, and the checkpoint lock.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

from logstore.errors import DamageError
from logstore.storage.catalogue import Catalogue
from logstore.storage.checkpoint import Journal, SegmentStore
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_JOURNAL, decode_header
from logstore.storage.journal import JournalScan, scan_headless, scan_journal
from logstore.storage.lane import END_OF_FILE, Marks, Place, journal_ordinals, journal_path, remove_unpublished
from logstore.storage.scan import read_from_device
from logstore.storage.tail import Unsegmented

logger = logging.getLogger("logstore")


def adopt_lane(
    disk: Disk, root: Path, number: int, folder: Path, catalogue: Catalogue, segments: SegmentStore, store_id: int
) -> int:
    """Bring everything that a dead process acknowledged into segments, and remove its journals.

    Returns:
        The highest event id found, 0 for none.

    Raises:
        FormatVersionError: A newer release wrote the journals.
        OSError, sqlite3.Error: The disk or the catalogue refused; the journals that are left can be adopted again.
    """
    with contextlib.closing(Marks(disk, folder)) as marks:
        marks.disown()
    done = catalogue.checkpointed_journals(number)
    ordinals = journal_ordinals(disk, folder)
    ends = _ends_by_successor(disk, folder, ordinals)
    witnesses = _witnesses(disk, folder)
    highest = 0
    for ordinal in ordinals:
        journal = Journal(folder, number, ordinal)
        if ordinal in done:
            # The process died between the commit and the unlink.
            segments.write(Unsegmented.none(), [journal], time.time_ns() // 1000)
            continue
        scan = _recover_journal(disk, root, journal, catalogue, store_id, ends.get(ordinal), witnesses)
        places = {event_id: place for place, event_id in enumerate(scan.ids)}
        highest = max(highest, max(places, default=0))
        # Some may be in segments: a checkpoint got them there, and the index, which knew that, was lost.
        for event_id in catalogue.indexed(list(places)):
            del places[event_id]
        segments.write(_events(scan, places), [journal], time.time_ns() // 1000)
    if ordinals:
        logger.info("adopted %d journal files of lane %04d", len(ordinals), number)
        _show_adopted(disk, folder, ordinals[-1])
    remove_unpublished(disk, folder)
    return highest


def _show_adopted(disk: Disk, folder: Path, ordinal: int) -> None:
    """Move the lane's mark, so that who follows looks again: the dead process may have died before it moved it."""
    with contextlib.closing(Marks(disk, folder)) as marks:
        if marks.valid:
            marks.show(ordinal, END_OF_FILE)


def _witnesses(disk: Disk, folder: Path) -> list[Place]:
    """Return up to where the marks say that there was something.

    What was visible was handed to the system, which has it as long as it runs: after a kill that witnesses the last
    batches also where they were not synced.
    """
    with contextlib.closing(Marks(disk, folder)) as marks:
        return [place for place in (marks.durable, marks.visible) if place.offset != END_OF_FILE]


def _ends_by_successor(disk: Disk, folder: Path, ordinals: list[int]) -> dict[int, int]:
    """Return where files end, as the header of the file that followed each says."""
    ends: dict[int, int] = {}
    for ordinal in ordinals:
        fd = disk.open(journal_path(folder, ordinal))
        try:
            header = decode_header(disk.read(fd, HEADER_BYTES, 0), journal_path(folder, ordinal), KIND_JOURNAL)
        except DamageError:
            continue
        finally:
            disk.close(fd)
        ends[header.follows] = header.follows_end
    return ends


def _recover_journal(
    disk: Disk, root: Path, journal: Journal, catalogue: Catalogue, store_id: int, end: int | None, marks: list[Place]
) -> JournalScan:
    """Read one journal file, keep aside what is torn or damaged, and say what was lost."""
    path = journal_path(journal.folder, journal.ordinal)
    data = read_from_device(disk, path)
    # Where the next file says that this one ends, nobody knows better.
    witness = end or max((place.offset for place in marks if place.ordinal == journal.ordinal), default=0)
    try:
        scan = scan_journal(data, path, witness, end)
        if scan.header.store_id != store_id:
            raise DamageError(path, 0, len(data), "the file belongs to another store")
    except DamageError as error:
        scan = scan_headless(data, store_id, witness, end, str(error))
    name = f"lane-{journal.lane:04d}-{path.name}"
    if scan.damage:
        kept = _keep_aside(disk, root, name, data)
        with catalogue.transaction():
            for bad in scan.damage:
                logger.error(
                    "%s: %d damaged bytes at offset %d (%s); %s events lost, the file is kept in %s",
                    path,
                    bad.length,
                    bad.offset,
                    bad.reason,
                    "unknown" if bad.lost_events is None else bad.lost_events,
                    kept,
                )
                catalogue.add_damage(
                    f"lanes/{journal.lane:04d}/{path.name}",
                    bad.offset,
                    bad.length,
                    bad.lost_events,
                    bad.reason,
                    str(kept.relative_to(root)),
                )
    elif scan.torn_bytes:
        kept = _keep_aside(disk, root, f"{name}.torn", data[scan.end :])
        logger.warning("%s ends in a torn write of %d bytes, kept in %s", path, scan.torn_bytes, kept)
    return scan


def _keep_aside(disk: Disk, root: Path, name: str, data: bytes) -> Path:
    path = root / "damaged" / name
    disk.make_folder(path.parent)
    disk.publish(path, data)
    return path


def _events(scan: JournalScan, places: dict[int, int]) -> Unsegmented:
    """Return the events of a journal of which it is known by id where they are in it."""
    chosen = [places[event_id] for event_id in sorted(places)]
    return Unsegmented(
        [scan.ids[place] for place in chosen],
        [scan.streams[place] for place in chosen],
        [scan.frames[place] for place in chosen],
    )
