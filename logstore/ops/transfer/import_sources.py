"""What an import is made of: one source of events, told by its content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import msgspec

from logstore.errors import FormatVersionError
from logstore.ops.transfer.event_json import EXPORT_FORMAT, EXPORT_VERSION, read_event
from logstore.ops.transfer.foreign_databases import ORIGINAL, SQLITE_MAGIC, ForeignEvent, foreign_event, foreign_rows
from logstore.ops.transfer.json_stream import BrokenJsonError, JsonStream, JsonValue
from logstore.storage.record import Event

_LONGEST_REASON: Final = 300


class LeftOut(NamedTuple):
    """An event that was not taken.

    Attributes:
        place: Where it stands in the source.
        reason: Why.
    """

    place: str
    reason: str


class Found(NamedTuple):
    """An event of a source: with its id when it is of a store like this one."""

    place: str
    event: Event | ForeignEvent


class ImportSource:
    """The events of a file, a stream or a database, one after another.

    Args:
        source: A path, or a stream of JSON.

    Attributes:
        ended: Why reading ended before the end, None when it did not.

    Raises:
        OSError: The file cannot be read.
    """

    def __init__(self, source: Path | IO[bytes]) -> None:
        self._undo = ExitStack()
        self._database: Path | None = None
        self._json: JsonStream | None = None
        self.ended: str | None = None
        if isinstance(source, Path):
            file = self._undo.enter_context(source.open("rb"))
            if file.peek(len(SQLITE_MAGIC)).startswith(SQLITE_MAGIC):
                self._database = source
            else:
                self._json = JsonStream(file, str(source))
        else:
            self._json = JsonStream(source, "the input")

    def close(self) -> None:
        """Close what was opened here."""
        self._undo.close()

    def events(self) -> Iterator[Found | LeftOut]:
        """Yield what the source holds.

        Raises:
            BrokenJsonError: It does not even begin as JSON.
            FormatVersionError: A newer release wrote it.
            NotAStoreError: The database is none that is known.
            DamageError: SQLite cannot read the database.
        """
        if self._database is not None:
            for row in foreign_rows(self._database):
                yield _taken(row.place, partial(foreign_event, row.source, row.members))
        elif self._json is not None:
            yield from self._json_events(self._json)

    def _json_events(self, stream: JsonStream) -> Iterator[Found | LeftOut]:
        count = 0
        values = stream.events()
        while True:
            try:
                value = next(values, None)
            except BrokenJsonError as error:
                if count == 0:
                    raise
                self.ended = str(error)
                return
            if count == 0:
                _check_version(stream.members)
            if value is None:
                break
            count += 1
            yield _json_event(value, f"line {value.line}, event {count}", ours=_is_ours(stream.members))
        if _is_ours(stream.members) and stream.members.get("count") != count:
            told = stream.members.get("count", "an end")
            self.ended = f"the export is not whole: {count} events were found, it should have {told}"


def _is_ours(members: dict[str, Any]) -> bool:
    return members.get("format") == EXPORT_FORMAT


def _check_version(members: dict[str, Any]) -> None:
    version = members.get("version")
    if _is_ours(members) and version != EXPORT_VERSION:
        raise FormatVersionError(
            f"the export has version {version!r}, this release reads version {EXPORT_VERSION}: upgrade mcp-logstore"
        )


def _json_event(value: JsonValue, place: str, *, ours: bool) -> Found | LeftOut:
    members = value.value
    if not isinstance(members, dict):
        return LeftOut(place, "this is no object")
    if ours or "kind" in members:
        return _taken(place, partial(read_event, value.text.encode(errors="surrogateescape")))
    return _taken(place, partial(foreign_event, ORIGINAL, members))


def _taken(place: str, read: Callable[[], Event | ForeignEvent]) -> Found | LeftOut:
    try:
        return Found(place, read())
    except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        # Printable: what the source quotes may hold half surrogates.
        reason = str(error).encode(errors="backslashreplace").decode()
        return LeftOut(place, reason[:_LONGEST_REASON])
