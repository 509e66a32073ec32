"""Mend a damaged store: damaged bytes are only ever copied aside, and what is lost is said and put on record.

Nothing is thrown away: copies of damaged files, and beside them what was lost with each, are in `damaged/` in the log
folder. Journals are recovered by every opening; here that is only told. A crash at any moment leaves a store that opens
with everything that could be read before.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from logstore.errors import DamageError
from logstore.ops.access import StoreView, open_existing
from logstore.ops.backup.pool import FolderTarget, default_backups, wait_for_lock
from logstore.ops.progress import Progress, silent
from logstore.ops.verify.backups import check_backups
from logstore.ops.verify.index import Index
from logstore.ops.verify.losses import Losses, iso_moment, lost_runs, record_losses
from logstore.ops.verify.repair_segments import mend_segment
from logstore.ops.verify.report import Finding, Report
from logstore.ops.verify.store import verify
from logstore.storage.catalogue import iso_now
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_REGISTRY, decode_header
from logstore.storage.journal import PAGE_BYTES
from logstore.storage.lane import STATE_SLOT_BYTES, bad_slots
from logstore.storage.opening import OpenStore
from logstore.storage.registry import encode_registry, salvage_entries

_INDEX_KINDS: Final = ("index", "catalogue")
_ROUNDS: Final = 2
"""What a damaged index hid comes to light when it is made again."""


class Repaired(msgspec.Struct, kw_only=True):
    """What a repair did.

    Attributes:
        actions: In words, in order.
        lost: What is on record as lost since.
        report: The store as it is now; what could not be mended is among its findings.
    """

    actions: list[str]
    lost: list[Finding]
    report: Report


def repair(
    path: Path, *, backups: Path | None = None, progress: Progress = silent, disk: Disk | None = None
) -> Repaired:
    """Verify a store, mend what is damaged, and verify it again. It may be open in other processes.

    Args:
        path: The catalogue.
        backups: Folder of its backups; None for the default one, if it is there.
        progress: Told how far it is.
        disk: The file door.

    Raises:
        NotAStoreError: There is no store at the path.
        StoreLockedError: Another process holds what is to be mended, with its pid.
        LogstoreError: The store cannot be opened.
        OSError, sqlite3.Error: The disk or the catalogue refused; the store is as readable as before.
    """
    disk = disk or Disk()
    before = verify(path, backups=backups, progress=progress, disk=disk)
    if before.ok:
        return Repaired(actions=[], lost=[], report=before)
    actions: list[str] = []
    if any(each.kind == "registry" for each in before.findings):
        actions += _mend_registry(path, disk)
    # Opening recovers the journals of dead processes, and makes an index that is lost.
    store = open_existing(path, disk)
    try:
        if any(each.kind == "registry" for each in before.findings):
            _end_lost_sessions(store)
        for _ in range(_ROUNDS):
            found = verify(path, backups=backups, progress=progress, disk=disk)
            done = _mend(store, path, found, progress)
            actions += done
            if not done:
                break
    finally:
        store.close(empty=True)
    actions += _mend_backups(path, backups, disk, progress)
    after = verify(path, backups=backups, progress=progress, disk=disk)
    known = set(before.known)
    lost = [each for each in after.known if each not in known]
    return Repaired(actions=actions, lost=lost, report=after)


def _mend(store: OpenStore, path: Path, found: Report, progress: Progress) -> list[str]:
    """Mend what a look at the open store found; return what was done."""
    actions: list[str] = []
    for lane in sorted({Path(each.file).parent for each in found.findings if each.kind == "lane"}):
        actions += _mend_lane(store, lane)
    numbers = _damaged_segments(store, found)
    if numbers:
        index = Index(path)
        # As long as compaction rests no segment moves.
        with wait_for_lock(store.disk, store.root / "compaction.lock", shared=False), contextlib.closing(index):
            for number in numbers:
                mended = mend_segment(store, index, number)
                if mended is not None:
                    kept = f", its bytes are in {mended.kept_in}" if mended.kept_in else ""
                    actions.append(
                        f"{mended.file}: {mended.kept_events} events moved to a new segment, "
                        f"{len(mended.lost)} are lost{kept}"
                    )
                progress("segments repaired", len(actions), len(numbers))
    if any(each.kind in _INDEX_KINDS for each in found.findings):
        _mend_marks(store)
        indexed = store.reindex()
        actions.append(f"{path}: made again from the log, {indexed.events} events")
    elif not numbers:
        actions += _record_gaps(store, found)
    return actions


def _damaged_segments(store: OpenStore, found: Report) -> list[int]:
    folder = store.root / "segments"
    damaged = (Path(each.file) for each in found.findings if each.kind in ("damage", "version"))
    return sorted({int(path.stem) for path in damaged if path.parent == folder and path.stem.isdigit()})


def _mend_registry(path: Path, disk: Disk) -> list[str]:
    """Put a registry in place that holds the entries which are whole; who has the store open reads that from then on.

    Before the store is opened: no opening gets past a damaged one.
    """
    with StoreView(path, disk) as view:
        store_id = view.store_id
        root = view.root
    place = root / "registry.log"
    if store_id is None:
        raise DamageError(place, 0, 0, "no file says which store this is: restore a backup")
    with wait_for_lock(disk, root / "registry.lock", shared=False):
        try:
            data = disk.read_file(place)
        except FileNotFoundError:
            disk.publish(place, encode_registry(store_id, ()))
            return [f"{place}: begun again, all sessions are lost"]
        # The salt is where it always was, whatever else of the header is damaged.
        salt = int.from_bytes(data[24:32], "little")
        with contextlib.suppress(DamageError):
            salt = decode_header(data[:HEADER_BYTES], place, KIND_REGISTRY).salt
        entries = [each.entry for each in salvage_entries(data, salt)]
        aside = root / "damaged" / f"registry-{time.time_ns()}.log"
        disk.make_folder(aside.parent)
        disk.publish(aside, data)
        disk.publish(place, encode_registry(store_id, entries))
    return [f"{place}: {len(entries)} whole entries kept, the damaged file is {aside}"]


def _end_lost_sessions(store: OpenStore) -> None:
    """Let the index show the sessions that the registry has lost as ended, and put the loss on record."""
    alive = {session.key for session in store.registry.sessions()}
    with store.changing_catalogue(store.catalogue.inode) as catalogue:
        connection = catalogue.connection
        rows = connection.execute("SELECT session_hash FROM sessions WHERE ended_at IS NULL").fetchall()
        lost = [key for (key,) in rows if key not in alive]
        connection.executemany(
            "UPDATE sessions SET ended_at = ? WHERE session_hash = ?", ((iso_now(), key) for key in lost)
        )
        reason = f"the registry was damaged; {len(lost)} sessions are lost: {', '.join(lost[:20])}"
        catalogue.add_damage("registry.log", 0, 0, None, reason, "damaged")
    store.registry.all_changed()
    with store.changing_catalogue(store.catalogue.inode) as catalogue:
        catalogue.put_sessions(store.registry.changes())


def _mend_lane(store: OpenStore, folder: Path) -> list[str]:
    """Reset what a dead lane keeps beside its journals; the whole half of a reservation stays."""
    disk = store.disk
    # Its own was written anew when the store was opened.
    lock = disk.lock(folder / "lock") if folder != store.lane.folder else None
    if lock is None:
        return []
    aside = store.root / "damaged"
    disk.make_folder(aside)
    with lock:
        now = time.time_ns()
        state, marks = disk.read_file(folder / "state"), disk.read_file(folder / "marks")
        disk.publish(aside / f"lane-{folder.name}-state-{now}", state)
        disk.publish(aside / f"lane-{folder.name}-marks-{now}", marks)
        _overwrite(disk, folder / "state", [(offset, STATE_SLOT_BYTES) for offset in bad_slots(state)])
        # In place: whoever has the store open has it mapped.
        _overwrite(disk, folder / "marks", [(0, PAGE_BYTES)])
    return [f"{folder}: reservation and marks reset, what they were is in {aside}"]


def _overwrite(disk: Disk, path: Path, places: list[tuple[int, int]]) -> None:
    """Write zeros to parts of a file; on return they are on disk."""
    fd = disk.open(path, write=True)
    try:
        for offset, size in places:
            disk.write(fd, bytes(size), offset)
        disk.sync(fd)
    finally:
        disk.close(fd)


def _mend_marks(store: OpenStore) -> None:
    """Take back marks in the index that its own rows deny: whoever makes the index again believes them."""
    with store.changing_catalogue(store.catalogue.inode) as catalogue:
        connection = catalogue.connection
        connection.execute(
            "UPDATE segments SET dropped = 0 WHERE dropped != 0 AND segment_id IN (SELECT segment_id FROM extents)"
        )
        connection.execute(
            """
            UPDATE streams SET dropped_id = 0, dropped_at = NULL
            WHERE typeof(dropped_id) != 'integer' OR dropped_id < 0 OR (dropped_id > 0 AND dropped_at IS NULL)
            OR (dropped_id = 0 AND dropped_at IS NOT NULL)
            """
        )
        connection.execute(
            """
            UPDATE streams SET dropped_id =
            (SELECT min(first_id) - 1 FROM extents WHERE extents.stream_id = streams.stream_id)
            WHERE EXISTS (SELECT 1 FROM extents WHERE extents.stream_id = streams.stream_id AND last_id <= dropped_id)
            """
        )


def _record_gaps(store: OpenStore, found: Report) -> list[str]:
    """Put events on record as lost that others name as their predecessors."""
    by_file: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for each in found.findings:
        if each.kind == "gap":
            by_file[each.file] += zip(each.event_ids, each.streams, strict=False)
    for file, events in by_file.items():
        losses = Losses(
            file=_relative(file, store.root),
            reason="events that others follow are not in the store",
            kept_in="",
            found_at=iso_moment(),
            lost=lost_runs(events),
        )
        record_losses(store.disk, store.root, f"gaps-{time.time_ns()}", losses)
    return [f"{file}: {len(events)} gaps are on record as lost events" for file, events in by_file.items()]


def _relative(file: str, root: Path) -> str:
    return str(Path(file).relative_to(root))


def _mend_backups(path: Path, backups: Path | None, disk: Disk, progress: Progress) -> list[str]:
    """Put objects aside that have other bytes than they were written with: the next backup makes them again."""
    folder = backups or default_backups(path)
    if not folder.is_dir():
        return []
    damaged = check_backups(folder, disk, quick=False, progress=progress).damaged
    return list(_set_aside(folder, damaged, disk)) if damaged else []


def _set_aside(folder: Path, damaged: Iterable[Path], disk: Disk) -> Iterable[str]:
    aside = folder / "damaged"
    disk.make_folder(aside)
    with FolderTarget(folder, disk).removing():
        for path in damaged:
            disk.rename(path, aside / path.name)
            disk.sync_folder(aside)
            disk.sync_folder(path.parent)
            yield f"{path}: moved to {aside}; the next backup makes it again, if the store still has it"
