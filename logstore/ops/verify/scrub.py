"""Reading a running store's segments in the background, a few bytes at a time, so that damage is found unasked.

Where it is stands in the table `maintenance`, so that the next process, or the same one after a restart, goes on there.
What is found is logged once and noted in the table `damage`, where health sees it.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from typing import Final

import msgspec

from logstore.ops.verify.index import Index
from logstore.ops.verify.registry import check_registry, copied_sessions
from logstore.ops.verify.report import Finding
from logstore.ops.verify.segments import SegmentCheck, check_segment
from logstore.storage.catalogue import iso_now
from logstore.storage.header import frame_seed
from logstore.storage.opening import OpenStore

logger = logging.getLogger("logstore")

_TASK: Final = "scrub"
_REST_S: Final = 86_400.0


class ScrubState(msgspec.Struct):
    """How far a scrub is.

    Attributes:
        after: Number of the segment that was read last, 0 at the beginning of a round.
        bytes: Read in this round.
        rounds: Rounds that were finished.
        findings: What was found in this round.
        finished_s: When the last round was finished, seconds since 1970.
    """

    after: int = 0
    bytes: int = 0
    rounds: int = 0
    findings: int = 0
    finished_s: float = 0.0


class Scrub:
    """Reads sealed segments round and round. Its methods block: call them in a thread, from one at a time.

    Args:
        store: The open store.
    """

    def __init__(self, store: OpenStore) -> None:
        self._store = store
        self._index = Index(store.catalogue.path)
        self._state: ScrubState | None = None
        self._started = iso_now()

    def close(self) -> None:
        """Close the index."""
        self._index.close()

    def step(self, budget_bytes: int) -> list[Finding]:
        """Read on, until the budget is spent; a segment is read whole. A step ends with the round.

        A round begins a day after the last one ended, or later.

        Args:
            budget_bytes: Bytes that may be read for this call: rate times the time since the last one.

        Returns:
            What is damaged, and was not on record before. On return it is.

        Raises:
            sqlite3.Error: The catalogue is damaged; `verify` says more.
            IndexReplacedError: The index was made again meanwhile; the next step goes on.
            OSError: The disk refuses.
        """
        state = self._state = self._state or self._index.ask(_saved_state)
        found: list[Finding] = []
        # Also when the clock stepped back.
        if state.after == 0 and 0 <= time.time() - state.finished_s < _REST_S:
            return []
        before = msgspec.structs.replace(state)
        read = 0
        while read < budget_bytes and not self._store.stopping.is_set():
            following = self._index.ask(lambda connection: _next_segment(connection, state.after))
            if following is None:
                found += self._finish_round(state)
                break
            number, size = following
            read += size
            check = self._check(number)
            state.after = number
            if check is not None:
                state.bytes += check.bytes
                found += check.findings
        return self._note(state, found) if state != before or found else []

    def _check(self, number: int) -> SegmentCheck | None:
        store = self._store
        disk, root, store_id = store.disk, store.root, store.store_id

        def look(connection: sqlite3.Connection, *, full: bool) -> SegmentCheck | None:
            return check_segment(disk, root, number, store_id, frame_seed(store_id), connection, full)

        check = self._index.ask(lambda connection: look(connection, full=False))
        if check is None or not check.findings:
            return check
        # Compaction may have been here since: what counts is how it is now.
        return self._index.ask(lambda connection: look(connection, full=True))

    def _finish_round(self, state: ScrubState) -> list[Finding]:
        """Read the registry, too; begin again at the first segment."""
        copied = self._index.ask(copied_sessions)
        path = self._store.catalogue.path
        check = check_registry(self._store.disk, self._store.root, copied, path)
        if check.findings:
            check = check_registry(self._store.disk, self._store.root, self._index.ask(copied_sessions), path)
        if state.after or check.findings:
            state.after, state.bytes, state.rounds, state.findings = 0, 0, state.rounds + 1, 0
            state.finished_s = time.time()
            self._started = iso_now()
        return check.findings

    def _note(self, state: ScrubState, found: list[Finding]) -> list[Finding]:
        """Put findings and place on record, and return those that were not; each is logged once."""
        store = self._store
        new: list[Finding] = []
        with store.changing_catalogue(store.catalogue.inode) as catalogue:
            connection = catalogue.connection
            for each in found:
                file = os.path.relpath(each.file, store.root)
                known = connection.execute(
                    "SELECT 1 FROM damage WHERE file = ? AND offset = ?", (file, each.offset or 0)
                ).fetchone()
                if known is None:
                    new.append(each)
                    lost = each.events or None
                    catalogue.add_damage(file, each.offset or 0, each.length or 0, lost, each.reason, "")
            state.findings += len(new)
            connection.execute(
                "INSERT OR REPLACE INTO maintenance VALUES (?, ?, ?, ?, ?)",
                (_TASK, os.getpid(), self._started, iso_now(), msgspec.json.encode(state).decode()),
            )
        for each in new:
            logger.error(
                "%s, offset %s: %s; run `logstore verify %s`", each.file, each.offset, each.reason, store.catalogue.path
            )
        return new


def _saved_state(connection: sqlite3.Connection) -> ScrubState:
    row = connection.execute("SELECT summary FROM maintenance WHERE task = ?", (_TASK,)).fetchone()
    try:
        return msgspec.json.decode(row[0], type=ScrubState) if row else ScrubState()
    except (msgspec.MsgspecError, TypeError):
        return ScrubState()


def _next_segment(connection: sqlite3.Connection, after: int) -> tuple[int, int] | None:
    """Return number and length of the next sealed segment; what is still written is read later."""
    row = connection.execute(
        """
        SELECT segment_id, bytes FROM segments WHERE segment_id > ? AND sealed = 1 AND dropped = 0
        ORDER BY segment_id LIMIT 1
        """,
        (after,),
    ).fetchone()
    return None if row is None else (int(row[0]), int(row[1]))
