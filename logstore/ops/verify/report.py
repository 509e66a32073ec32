"""What `verify` found, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec

Kind = Literal["damage", "conflict", "gap", "registry", "version", "index", "catalogue", "lane", "backup"]
"""What is wrong, the worst first.

- `damage`: bytes of the log are not what was written, or gone.
- `conflict`: two different events have the same id.
- `gap`: an event names a predecessor that is not in the store: a replay ends there.
- `registry`: sessions are damaged or gone.
- `version`: a file says that a newer release wrote it.
- `index`: the catalogue and the files do not agree.
- `catalogue`: the SQLite file is missing or damaged.
- `lane`: what a lane keeps beside its journals is damaged.
- `backup`: a backup cannot be restored whole.
"""

_ORDER: Final[dict[str, int]] = {kind: place for place, kind in enumerate(get_args(Kind))}
_MOST_IDS: Final = 100
_MOST_STREAMS: Final = 20

_ADVICE: Final[dict[Kind, str]] = {
    "damage": "`logstore repair {path}` keeps what is whole and says what is lost; a backup may have the rest",
    "conflict": "`logstore repair {path}` cannot choose: restore a backup from before the damage",
    "gap": "the events before the gap are gone: a backup may have them; `logstore repair {path}` notes them as lost",
    "registry": "`logstore repair {path}` keeps the sessions that are whole",
    "version": "upgrade mcp-logstore; if no newer release ever wrote here, the file is damaged: restore a backup",
    "index": "`logstore reindex {path}` makes the catalogue again from the log",
    "catalogue": "`logstore reindex {path}` makes the catalogue again from the log",
    "lane": "`logstore repair {path}` opens the store, which writes it anew",
    "backup": "`logstore repair {path}` puts damaged objects aside, so that the next backup makes them again",
}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong.

    Attributes:
        kind: See `Kind`.
        file: Path of the file.
        reason: What is wrong, in words.
        offset: Where it begins in the file, in bytes; None for the file as a whole.
        length: How many bytes it covers.
        events: How many events it concerns, as far as that is known.
        event_ids: The first hundred of them.
        streams: Their streams, at most twenty.
    """

    kind: Kind
    file: str
    reason: str
    offset: int | None = None
    length: int | None = None
    events: int = 0
    event_ids: tuple[int, ...] = ()
    streams: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the finding for programs: ids as text."""
        fields: dict[str, Any] = msgspec.structs.asdict(self)
        fields["event_ids"] = [str(event_id) for event_id in self.event_ids]
        fields["streams"] = list(self.streams)
        return fields


def found(
    kind: Kind,
    file: Path,
    reason: str,
    offset: int | None = None,
    length: int | None = None,
    events: Iterable[tuple[int, str]] = (),
) -> Finding:
    """Return a finding; `events` are the ids and streams of the events that it concerns."""
    # A damaged index may have anything for a name.
    concerned = sorted((event_id, str(stream)) for event_id, stream in events)
    return Finding(
        kind=kind,
        file=str(file),
        reason=reason,
        offset=offset,
        length=length,
        events=len(concerned),
        event_ids=tuple(event_id for event_id, _ in concerned[:_MOST_IDS]),
        streams=tuple(islice(dict.fromkeys(stream for _, stream in concerned), _MOST_STREAMS)),
    )


class Report(msgspec.Struct, kw_only=True):
    """The outcome of a look at a whole store.

    Attributes:
        path: The catalogue of the store.
        quick: Whether only headers, lengths and counts were looked at.
        findings: What is wrong, the worst first.
        known: What was lost before and is on record: repaired, or recovered from.
        files: Files read.
        bytes: Bytes read.
        events: Events read.
    """

    path: str
    quick: bool
    findings: list[Finding] = []
    known: list[Finding] = []
    files: int = 0
    bytes: int = 0
    events: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing was found; what is on record as lost does not count."""
        return not self.findings

    def sort(self) -> None:
        """Put the worst first."""
        self.findings.sort(key=lambda each: (_ORDER[each.kind], each.file, each.offset or 0))

    def advice(self) -> list[str]:
        """Return what to do next, a line for each kind of finding."""
        lines = (_ADVICE[each.kind].format(path=self.path) for each in self.findings)
        return list(dict.fromkeys(lines))

    def as_dict(self) -> dict[str, Any]:
        """Return the report for programs: ids as text, paths as they are."""
        return {
            "path": self.path,
            "ok": self.ok,
            "quick": self.quick,
            "findings": [each.as_dict() for each in self.findings],
            "known": [each.as_dict() for each in self.known],
            "files": self.files,
            "bytes": self.bytes,
            "events": self.events,
            "advice": self.advice(),
        }
