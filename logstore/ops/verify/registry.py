"""The registry of sessions, byte by byte, and the copy of it that the index has."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import NamedTuple

import msgspec

from logstore.errors import DamageError, FormatVersionError
from logstore.ops.verify.report import Finding, found
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_REGISTRY, decode_header
from logstore.storage.registry import ENDED, OPENED, Entry, salvage_entries


class RegistryCheck(NamedTuple):
    """What was found of the registry."""

    bytes: int
    findings: list[Finding]


class CopiedSession(NamedTuple):
    """A session as the index has it."""

    key: str
    incarnation: int
    opened_us: int | None
    ended: bool
    stream_prefix: str


def copied_sessions(connection: sqlite3.Connection) -> list[CopiedSession]:
    """Return the sessions as the index has them; it may be behind the registry, never ahead."""
    rows = connection.execute(
        """
        SELECT session_hash, incarnation, CAST(strftime('%s', opened_at) AS INTEGER) * 1000000, ended_at IS NOT NULL,
               stream_prefix
        FROM sessions
        """
    )
    return [CopiedSession._make(row) for row in rows]


def check_registry(disk: Disk, root: Path, copied: list[CopiedSession], catalogue: Path) -> RegistryCheck:
    """Read the registry, and compare it with a copy that was taken before."""
    path = root / "registry.log"
    try:
        data = disk.read_file(path)
    except FileNotFoundError:
        return RegistryCheck(0, [found("registry", path, "the registry is gone: its sessions are lost")])
    except OSError as error:
        return RegistryCheck(0, [found("registry", path, f"the disk does not give the file: {error}")])
    try:
        header = decode_header(data, path, KIND_REGISTRY)
    except FormatVersionError as error:
        return RegistryCheck(len(data), [found("version", path, str(error), 0, HEADER_BYTES)])
    except DamageError as error:
        return RegistryCheck(len(data), [found("registry", path, str(error), 0, min(HEADER_BYTES, len(data)))])
    findings: list[Finding] = []
    sessions = _Sessions()
    end = HEADER_BYTES
    for offset, after, entry in salvage_entries(data, header.salt):
        if offset != end:
            findings.append(found("registry", path, "bytes that are no whole entry", end, offset - end))
        end = after
        sessions.apply(entry)
    lost = [str(each.key) for each in copied if sessions.lacks(each)]
    if lost and not findings:
        reason = f"{len(lost)} sessions that were here are not: {', '.join(lost[:5])}"
        findings.append(found("registry", path, reason, end, len(data) - end))
    elif end < len(data):
        # Only a power cut tears one; nothing tells it from damage, and the next opening cuts it off.
        reason = "the last entry is not whole: torn by a power cut, or damaged"
        findings.append(found("registry", path, reason, end, len(data) - end))
    altered = [str(each.key) for each in copied if sessions.denies(each)]
    if altered:
        reason = f"{len(altered)} sessions are others than in the registry: {', '.join(altered[:5])}"
        findings.append(found("index", catalogue, reason))
    return RegistryCheck(len(data), findings)


class _Sessions:
    """The sessions of a registry's entries."""

    def __init__(self) -> None:
        self._alive: dict[str, Entry] = {}
        self._owners: dict[str, set[int]] = {}
        self._ended: set[str] = set()
        self._newest_us = 0

    def apply(self, entry: Entry) -> None:
        """Take the next entry."""
        self._newest_us = max(self._newest_us, entry.time_us)
        self._owners.setdefault(entry.key, set()).add(entry.incarnation)
        if entry.kind == ENDED:
            self._alive.pop(entry.key, None)
            self._ended.add(entry.key)
        elif entry.kind == OPENED:
            self._alive[entry.key] = entry
        elif (opened := self._alive.get(entry.key)) is not None:
            self._alive[entry.key] = msgspec.structs.replace(opened, incarnation=entry.incarnation)

    def lacks(self, copy: CopiedSession) -> bool:
        """Whether a session that the index has is missing, or has an owner in the index that it never had."""
        if copy.ended or copy.key in self._ended:
            return False
        alive = self._alive.get(copy.key)
        if alive is None:
            # One that ended long ago is gone from a registry that was written anew, and the copy may not know.
            return copy.opened_us is not None and copy.opened_us + 1_000_000 > self._newest_us
        # A process that was opened earlier may have taken it over since.
        return type(copy.incarnation) is not int or (
            alive.incarnation < copy.incarnation and copy.incarnation not in self._owners[copy.key]
        )

    def denies(self, copy: CopiedSession) -> bool:
        """Whether the index has another state of a session than it can have had."""
        alive = self._alive.get(copy.key)
        if alive is None or copy.key in self._ended:
            return False
        return copy.ended or copy.stream_prefix != alive.stream_prefix
