"""The header that every file of the log begins with.

| offset | size | field |
| --- | --- | --- |
| 0 | 8 | magic `LOGSTORE` |
| 8 | 2 | format version |
| 10 | 1 | kind: 1 journal, 2 segment, 3 registry |
| 11 | 1 | checksum: 1 is CRC-32C |
| 12 | 4 | zero |
| 16 | 8 | store id, random, the same in all files of a store |
| 24 | 8 | salt, random, of this file alone |
| 32 | 8 | number: a journal's ordinal in its lane, a segment's number |
| 40 | 8 | incarnation of the writer |
| 48 | 8 | journal: ordinal of the file it follows, 0 for none |
| 56 | 8 | journal: where that file ends; what lies beyond does not exist |
| 64 | 4 | CRC-32C of the bytes before |
"""

from __future__ import annotations

import secrets
import struct
from pathlib import Path
from typing import Final

import google_crc32c
import msgspec

from logstore.errors import DamageError, FormatVersionError

KIND_JOURNAL: Final = 1
KIND_SEGMENT: Final = 2
KIND_REGISTRY: Final = 3

FORMAT_VERSION: Final = 1
_MAGIC: Final = b"LOGSTORE"
_CHECKSUM_CRC32C: Final = 1
_FIELDS: Final = struct.Struct("<8sHBB4xQQQQQQ")
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _FIELDS.size + _CRC.size


class FileHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says of itself; the fields are those of the table above."""

    kind: int
    store_id: int
    salt: int
    number: int = 0
    incarnation: int = 0
    follows: int = 0
    follows_end: int = 0

    def encode(self) -> bytes:
        """Return the header as bytes."""
        fields = _FIELDS.pack(
            _MAGIC,
            FORMAT_VERSION,
            self.kind,
            _CHECKSUM_CRC32C,
            self.store_id,
            self.salt,
            self.number,
            self.incarnation,
            self.follows,
            self.follows_end,
        )
        return fields + _CRC.pack(google_crc32c.value(fields))

    @property
    def seed(self) -> int:
        """Start value of the checksums of this store's frames."""
        return frame_seed(self.store_id)


def new_salt() -> int:
    """Return a random number that no other file has, never 0: zeroed bytes must not pass for it."""
    return secrets.randbits(64) | 1


def frame_seed(store_id: int) -> int:
    """Return the start value of the checksums of a store's frames."""
    return int(google_crc32c.value(store_id.to_bytes(8, "little")))


def decode_header(data: bytes, path: Path, kind: int) -> FileHeader:
    """Return the header at the start of `data`.

    Args:
        data: At least the first `HEADER_BYTES` of the file.
        path: The file, for messages.
        kind: The kind that the file must be of.

    Raises:
        FormatVersionError: A newer release wrote the file.
        DamageError: The bytes are not a header of this kind.
    """
    if len(data) < HEADER_BYTES:
        raise DamageError(path, 0, len(data), "the file is shorter than its header")
    magic, version, found, checksum, store_id, salt, number, incarnation, follows, end = _FIELDS.unpack_from(data)
    if magic != _MAGIC:
        raise DamageError(path, 0, HEADER_BYTES, "the file does not begin as a logstore file")
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path} has format version {version}, this release reads up to {FORMAT_VERSION}: upgrade mcp-logstore",
            path,
        )
    if _CRC.unpack_from(data, _FIELDS.size)[0] != google_crc32c.value(data[: _FIELDS.size]):
        raise DamageError(path, 0, HEADER_BYTES, "the file header's checksum does not match")
    if found != kind or checksum != _CHECKSUM_CRC32C:
        raise DamageError(path, 0, HEADER_BYTES, f"the file is of kind {found}, checksum {checksum}; {kind} was meant")
    return FileHeader(
        kind=kind,
        store_id=store_id,
        salt=salt,
        number=number,
        incarnation=incarnation,
        follows=follows,
        follows_end=end,
    )
