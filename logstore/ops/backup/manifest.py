"""The manifest of a backup: which files make the store, and the checksum of the manifest itself.

A JSON object of two members: `sha256`, and `backup`, whose bytes it is the SHA-256 of. A manifest that was cut off or
altered is refused whole; there is no half of a backup.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from logstore.errors import DamageError, FormatVersionError
from logstore.ops.backup.pool import MANIFEST_SUFFIX, Target, object_key
from logstore.storage.ids import LANE_COUNT, MAX_ID

BACKUP_VERSION: Final = 1
_NAME: Final = "%Y%m%dT%H%M%S.%fZ"

Kind = Literal["segment", "journal", "registry", "dropped"]
# A manifest may come from anywhere: nothing in it names a place outside of the store, or of the objects.
_Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Place = Annotated[
    str,
    msgspec.Meta(pattern=r"^(segments/[0-9]{1,19}\.segment|lanes/[0-9]{4}/[0-9]{10}\.journal|registry\.log|dropped)\Z"),
]
_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the store.

    Attributes:
        kind: What it is; `dropped` is the list of what retention has let go of, which files may still hold.
        path: Where it belongs, from the log folder.
        bytes: Its length.
        sha256: Of these bytes; names the object.
        events: How many it holds, None when nobody counted.
        damaged: Whether its bytes were not what the store had written once; they are kept as they were.
        reason: What is wrong with a damaged one.
    """

    kind: Kind
    path: _Place
    bytes: _Count
    sha256: _Digest
    events: _Count | None = None
    damaged: bool = False
    reason: str = ""

    @property
    def key(self) -> str:
        """Key of the object that holds it."""
        return object_key(self.sha256)


class LaneMark(msgspec.Struct, frozen=True, kw_only=True):
    """A lane when the backup was begun: what it had given out at most, and what was visible of it."""

    lane: Annotated[int, msgspec.Meta(ge=0, lt=LANE_COUNT)]
    reserved_id: _Count
    reserved_ordinal: _Count
    visible_ordinal: _Count
    visible_offset: _Count


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One backup.

    Attributes:
        version: Of this format.
        store_id: Of the store.
        engine: Release that wrote it.
        begun: ISO time; the backup holds what was acknowledged then.
        finished: ISO time.
        files: All files of the store.
        lanes: All lanes that ever were.
        events: Events that the store serves when it is restored.
        bytes: Total length of the files.
    """

    version: int
    store_id: _Count
    engine: str
    begun: str
    finished: str
    files: list[StoredFile]
    lanes: list[LaneMark]
    events: _Count
    bytes: _Count

    @property
    def damaged(self) -> list[StoredFile]:
        """The files that were damaged when they were copied."""
        return [file for file in self.files if file.damaged]


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    sha256: str
    backup: msgspec.Raw


class _Version(msgspec.Struct):
    version: int


def manifest_key(begun: datetime) -> str:
    """Return the key of a manifest: keys sort by time."""
    return begun.astimezone(UTC).strftime(_NAME) + MANIFEST_SUFFIX


def time_of(key: str) -> datetime | None:
    """Return the time in a manifest's key; None for a file that somebody named otherwise."""
    try:
        return datetime.strptime(key.removesuffix(MANIFEST_SUFFIX), _NAME).replace(tzinfo=UTC)
    except ValueError:
        return None


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest."""
    backup = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    sealed = _Sealed(sha256=hashlib.sha256(backup).hexdigest(), backup=msgspec.Raw(backup))
    return msgspec.json.encode(sealed) + b"\n"


def read_manifest(target: Target, key: str) -> Manifest:
    """Return a manifest whose checksum was verified.

    Raises:
        FileNotFoundError: There is none.
        DamageError: It is cut off or altered.
        FormatVersionError: A newer release wrote it.
    """
    data = b"".join(target.read(key))
    place = Path(target.locate(key))
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
        backup = bytes(sealed.backup)
        if hashlib.sha256(backup).hexdigest() != sealed.sha256:
            raise DamageError(place, 0, len(data), "the manifest was altered; take another backup")
        version = msgspec.json.decode(backup, type=_Version).version
        if version > BACKUP_VERSION:
            raise FormatVersionError(
                f"{place} has backup version {version}, this release reads up to {BACKUP_VERSION}: upgrade mcp-logstore"
            )
        manifest = msgspec.json.decode(backup, type=Manifest)
        _check(manifest)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise DamageError(place, 0, len(data), f"this is no whole manifest ({error}); take another backup") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Refuse what the types cannot.

    Raises:
        ValueError: With what is wrong.
    """
    if datetime.fromisoformat(manifest.begun).tzinfo is None:
        raise ValueError("the time at which it was begun has no zone")
    names = Counter([*(file.path for file in manifest.files), *(f"lane {mark.lane}" for mark in manifest.lanes)])
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"it names {twice[0]} twice")


def missing_objects(target: Target, manifest: Manifest) -> list[str]:
    """Say of each object that is not there, or not of the right length; no bytes are read."""
    problems: list[str] = []
    for file in manifest.files:
        size = target.size(file.key)
        if size is None:
            problems.append(f"{file.path}: {target.locate(file.key)} is missing")
        elif size != file.bytes:
            problems.append(f"{file.path}: {target.locate(file.key)} has {size} bytes, not {file.bytes}")
    return problems
