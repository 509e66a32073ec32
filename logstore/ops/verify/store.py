"""Look at every byte of a store, and at whether its parts agree; nothing is changed.

Others may append, checkpoint, compact and drop meanwhile. What is committed does not change any more, so each part is
compared with the index as of one moment; what looks wrong is looked at again before it is told.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from logstore.errors import DamageError, FormatVersionError, WriteFailedError
from logstore.ops.access import StoreView
from logstore.ops.backup.pool import default_backups
from logstore.ops.progress import Progress, silent
from logstore.ops.verify.backups import check_backups
from logstore.ops.verify.catalogue import (
    check_database,
    check_tables,
    done_journals,
    live_segments,
    recorded_damage,
    row_counts,
    run_counts,
)
from logstore.ops.verify.index import Index
from logstore.ops.verify.journals import LaneLook
from logstore.ops.verify.ledger import Ledger
from logstore.ops.verify.losses import Known, recorded_losses
from logstore.ops.verify.registry import check_registry, copied_sessions
from logstore.ops.verify.report import Report, found
from logstore.ops.verify.segments import SegmentCheck, check_segment
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_SEGMENT, decode_header
from logstore.storage.lane import lane_folders
from logstore.storage.segment import segment_numbers, segment_path

_MOST_GAPS: Final = 1_000
_BEING_MADE_S: Final = 0.2

_T = TypeVar("_T")


def verify(
    path: Path,
    *,
    quick: bool = False,
    backups: Path | None = None,
    progress: Progress = silent,
    disk: Disk | None = None,
) -> Report:
    """Verify a store. Nothing is written, neither to the store nor beside it.

    Args:
        path: The catalogue.
        quick: Look only at headers, lengths, counts, and at what SQLite says quickly.
        backups: Folder of its backups; None for the default one, if it is there.
        progress: Told of the bytes.
        disk: The file door.

    Raises:
        NotAStoreError: There is no store at the path.
        StoreLockedError: A restore is under way.
        WriteFailedError: There is no room for notes, which are many when journals hold much.
    """
    report = Report(path=str(path), quick=quick)
    try:
        with StoreView(path, disk) as view, contextlib.closing(_Verification(view, report, progress)) as verification:
            verification.run()
    except FormatVersionError as error:
        report.findings.append(found("version", error.path or path, str(error)))
    except sqlite3.OperationalError as error:
        # The index's own errors are findings.
        raise WriteFailedError(f"no room for the notes of a verification ({error}); point TMPDIR elsewhere") from error
    folder = backups or default_backups(path)
    if backups is not None or folder.is_dir():
        checked = check_backups(folder, disk or Disk(), quick=quick, progress=progress)
        report.findings += checked.findings
        report.files += checked.files
        report.bytes += checked.bytes
    report.sort()
    return report


class _Verification:
    """One look at one store."""

    def __init__(self, view: StoreView, report: Report, progress: Progress) -> None:
        self._view = view
        self._disk = view.disk
        self._root = view.root
        self._report = report
        self._progress = progress
        self._index: Index | None = Index(view.path)
        self._ledger = Ledger()

    def close(self) -> None:
        """Close everything."""
        self._ledger.close()
        if self._index is not None:
            self._index.close()

    def run(self) -> None:
        """Look at everything, in an order in which what moves meanwhile is seen in its old place or its new one."""
        self._check_catalogue()
        done = self._ask(done_journals) or {}
        copied = self._ask(copied_sessions) or []
        registry = check_registry(self._disk, self._root, copied, self._view.path)
        if registry.findings:
            copied = self._ask(copied_sessions) or []
            registry = check_registry(self._disk, self._root, copied, self._view.path)
        self._count(1, registry.bytes)
        self._report.findings += registry.findings
        if self._view.store_id is None:
            if segment_numbers(self._disk, self._root):
                self._report.findings.append(
                    found("damage", self._root, "no file has a header that can be read: nothing can be verified")
                )
            return
        if self._report.quick:
            self._check_lengths()
        else:
            self._check_segments(self._view.store_id)
        self._check_lanes(self._view.store_id, done)
        if not self._report.quick:
            self._settle()
        self._tell_known()

    def _ask(self, question: Callable[[sqlite3.Connection], _T]) -> _T | None:
        """Ask the index; once it refuses it is told as damaged, and not asked again: None."""
        if self._index is None:
            return None
        try:
            try:
                return self._index.ask(question)
            except sqlite3.OperationalError:
                # Its tables may be being made at this moment.
                time.sleep(_BEING_MADE_S)
                return self._index.ask(question)
        except (sqlite3.Error, OSError) as error:
            self._index.close()
            self._index = None
            self._report.findings.append(found("catalogue", self._view.path, f"it cannot be read: {error}"))
            return None

    def _count(self, files: int, size: int, events: int = 0) -> None:
        self._report.files += files
        self._report.bytes += size
        self._report.events += events

    def _check_catalogue(self) -> None:
        path = self._view.path
        if self._view.catalogue_error is not None:
            self._report.findings.append(found("catalogue", path, self._view.catalogue_error))
            self._index = None
            return
        quick = self._report.quick
        self._progress("checking the catalogue", 0, None)
        self._report.findings += self._ask(lambda index: check_database(index, path, quick=quick)) or []
        self._report.findings += self._ask(lambda index: check_tables(index, path)) or []
        self._count(1, path.stat().st_size if path.exists() else 0)

    def _check_lengths(self) -> None:
        """Check headers and lengths of all segments."""
        known = self._ask(live_segments) or {}
        for number, (size, sealed) in sorted(known.items()):
            if self._header_problem(number, size, sealed):
                now = (self._ask(live_segments) or {}).get(number)
                problem = self._header_problem(number, *now) if now else None
                if problem:
                    self._report.findings.append(found("damage", segment_path(self._root, number), problem))
        self._count(len(known), len(known) * HEADER_BYTES)

    def _header_problem(self, number: int, size: int, sealed: int) -> str | None:
        path = segment_path(self._root, number)
        try:
            fd = self._disk.open(path)
        except FileNotFoundError:
            return "the file is gone, and the index names it"
        try:
            found_size = self._disk.size(fd)
            header = decode_header(self._disk.read(fd, HEADER_BYTES, 0), path, KIND_SEGMENT)
        except (DamageError, FormatVersionError, OSError) as error:
            return str(error)
        finally:
            self._disk.close(fd)
        if header.number != number or header.store_id != self._view.store_id:
            return f"the file is segment {header.number} of store {header.store_id} by its header"
        if type(size) is not int or found_size < size or (sealed == 1 and found_size != size):
            return f"the file has {found_size} bytes, the index knows {size}"
        return None

    def _check_segments(self, store_id: int) -> None:
        rows = self._ask(row_counts) or {}
        runs = self._ask(run_counts) or {}
        known = self._ask(live_segments) or {}
        numbers = sorted({*known, *segment_numbers(self._disk, self._root)})
        total = sum(size for size, _ in known.values() if type(size) is int)
        for number in numbers:
            check = self._segment(number, store_id, full=False)
            if check is None:
                continue
            incomplete = rows.get(number, 0) > check.live or runs.get(number, 0) > check.runs
            if check.findings or (self._index is not None and incomplete):
                # Retention and compaction may have been here since: what counts is how it is now.
                self._progress("looking again at a segment", number, None)
                check = self._segment(number, store_id, full=True)
                if check is None:
                    continue
            self._count(1, check.bytes, check.live if self._index is not None else check.events)
            self._report.findings += check.findings
            self._ledger.add_links(check.links)
            self._ledger.add_unknown(check.unknown)
            self._progress("verifying segments", self._report.bytes, total)

    def _segment(self, number: int, store_id: int, *, full: bool) -> SegmentCheck | None:
        disk, root, seed = self._disk, self._root, self._view.seed

        def look(connection: sqlite3.Connection | None) -> SegmentCheck | None:
            return check_segment(disk, root, number, store_id, seed, connection, full)

        check = self._ask(look)
        return look(None) if self._index is None else check

    def _check_lanes(self, store_id: int, done: dict[int, set[int]]) -> None:
        for number, folder in lane_folders(self._disk, self._root):
            look = LaneLook(self._disk, folder, number, store_id, done.get(number, set()), quick=self._report.quick)
            check = look.run()
            self._report.findings += check.findings
            self._ledger.add_journal(check.events)
            self._ledger.add_unknown(check.unknown)
            self._count(check.files, check.bytes, len(check.events))
            self._progress("verifying lanes", number + 1, None)

    def _settle(self) -> None:
        """Judge what had to wait until everything was seen."""
        self._report.findings += self._ledger.findings
        if self._index is None:
            return
        disk, root, ledger = self._disk, self._root, self._ledger
        known = self._known()
        conflicts = self._ask(lambda index: ledger.compare_with_index(index, disk, root)) or []
        if conflicts:
            # A checkpoint may have taken them, and compaction moved them, since the journals were read.
            conflicts = self._ask(lambda index: ledger.compare_with_index(index, disk, root)) or []
        self._report.findings += conflicts
        self._report.findings += self._ask(ledger.unindexed) or []
        gaps = self._ask(lambda index: list(ledger.missing_predecessors(index))) or []
        gaps = [link for link in gaps if not known.explains(link.prev, link.stream)]
        for link in gaps[:_MOST_GAPS]:
            reason = f"event {link.event_id} follows event {link.prev}, which is not in the store"
            self._report.findings.append(
                found("gap", Path(link.file), reason, link.offset, None, [(link.prev, link.stream)])
            )

    def _known(self) -> Known:
        return Known(recorded_losses(self._disk, self._root), self._ask(recorded_damage) or [], self._root)

    def _tell_known(self) -> None:
        """List what is on record as lost, but for what was found again."""
        told = {each.file for each in self._report.findings}
        self._report.known += [each for each in self._known().findings if each.file not in told]
