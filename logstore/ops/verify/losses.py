"""What is on record as lost, so that it is not found again for ever.

Beside the bytes that `repair` keeps in `damaged/` lies `….lost.json`: which events were lost. It outlives the
catalogue. What recovery found in journals is in the catalogue's table `damage`; which events those were nobody knows.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from logstore.ops.verify.report import Finding
from logstore.storage.files import Disk
from logstore.storage.ids import lane_of, time_ms_of

_SUFFIX: Final = ".lost.json"
_LANE_FILE: Final = re.compile(r"lanes/([0-9]{4})(/|$)", re.ASCII)
_EventId = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,19}\Z")]


class LostRun(msgspec.Struct, frozen=True):
    """Events of one stream that are gone: all of the store's between two ids, both included."""

    stream: str
    first_id: _EventId
    last_id: _EventId
    events: int


class Losses(msgspec.Struct, frozen=True, kw_only=True):
    """What was lost with one damaged file.

    Attributes:
        file: The damaged file, from the log folder.
        reason: What was wrong.
        kept_in: Where its bytes are, from the log folder; empty when there were none to keep.
        found_at: ISO time.
        lost: The events.
    """

    file: str
    reason: str
    kept_in: str
    found_at: str
    lost: list[LostRun]


def iso_moment() -> str:
    """Return the time as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def lost_runs(events: Iterable[tuple[int, str]]) -> list[LostRun]:
    """Return runs for lost events `(id, stream)`, one for each stream."""
    by_stream: dict[str, list[int]] = defaultdict(list)
    for event_id, stream in events:
        by_stream[stream].append(event_id)
    return [LostRun(stream, str(min(ids)), str(max(ids)), len(ids)) for stream, ids in by_stream.items()]


def record_losses(disk: Disk, root: Path, name: str, losses: Losses) -> Path:
    """Put losses on record; on return they are on disk."""
    path = root / "damaged" / f"{name}{_SUFFIX}"
    disk.make_folder(path.parent)
    disk.publish(path, msgspec.json.format(msgspec.json.encode(losses), indent=1) + b"\n")
    return path


def recorded_losses(disk: Disk, root: Path) -> list[Losses]:
    """Return all losses on record; a record that cannot be read says nothing, and what it told is found again."""
    found: list[Losses] = []
    folder = root / "damaged"
    for name in sorted(disk.list(folder)):
        if name.endswith(_SUFFIX):
            try:
                found.append(msgspec.json.decode((folder / name).read_bytes(), type=Losses))
            except (ValueError, RecursionError, msgspec.MsgspecError):
                continue
    return found


class Known:
    """What is on record as lost.

    Args:
        losses: From `recorded_losses`.
        damage: Rows of the table `damage`, from `recorded_damage`.
        root: The log folder.
    """

    def __init__(self, losses: Sequence[Losses], damage: Sequence[Sequence[Any]], root: Path) -> None:
        self._runs: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._lanes: dict[int, int] = {}
        self.findings: list[Finding] = []
        for each in losses:
            for run in each.lost:
                self._runs[run.stream].append((int(run.first_id), int(run.last_id)))
            self.findings.append(
                Finding(
                    kind="damage",
                    file=str(root / each.file),
                    reason=f"{each.reason}; found at {each.found_at}",
                    events=sum(run.events for run in each.lost),
                    event_ids=tuple(int(run.first_id) for run in each.lost[:20]),
                    streams=tuple(run.stream for run in each.lost[:20]),
                )
            )
        repaired = {each.file for each in losses}
        for file, offset, length, lost, reason, _, found_at in damage:
            self._note_lane(str(file), lost, str(found_at))
            if file not in repaired:
                self.findings.append(
                    Finding(
                        kind="damage",
                        file=str(root / str(file)),
                        reason=f"{reason}; found at {found_at}",
                        offset=_number(offset),
                        length=_number(length),
                        events=_number(lost) or 0,
                    )
                )

    def _note_lane(self, file: str, lost: int | None, found_at: str) -> None:
        named = _LANE_FILE.match(file)
        if named is None or lost == 0:
            return
        try:
            at = datetime.strptime(found_at, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
        except ValueError:
            return
        lane = int(named[1])
        self._lanes[lane] = max(self._lanes.get(lane, 0), int(at.timestamp() * 1000) + 1000)

    def explains(self, event_id: int, stream: str) -> bool:
        """Whether it is on record that an event is lost, or that events of its journal are, at a later time."""
        if any(first <= event_id <= last for first, last in self._runs.get(stream, ())):
            return True
        return time_ms_of(event_id) <= self._lanes.get(lane_of(event_id), 0)


def _number(value: Any) -> int | None:
    """Return what a damaged column may hold, if it is a number."""
    return value if isinstance(value, int) else None
