"""The registry of sessions, byte by byte, and the copy of it that the index has."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import NamedTuple

from logstore.errors import DamageError, FormatVersionError
from logstore.ops.verify_report import Finding, found
from logstore.ops.verify_segments import read_whole
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES, KIND_REGISTRY, decode_header
from logstore.storage.registry import ENDED, OPENED, Entry, salvage_entries


class RegistryCheck(NamedTuple):
    """What was found of the registry."""

    bytes: int
    findings: list[Finding]


class CopiedSession(NamedTuple):
    """A session as the index has it, not ended."""

    key: str
    incarnation: int
    opened_us: int | None


def copied_sessions(connection: sqlite3.Connection) -> list[CopiedSession]:
    """Return the sessions that have not ended, as the index knows; it may be behind the registry, never ahead."""
    rows = connection.execute(
        """
        SELECT session_hash, incarnation, CAST(strftime('%s', opened_at) AS INTEGER) * 1000000 FROM sessions
        WHERE ended_at IS NULL
        """
    )
    return [CopiedSession._make(row) for row in rows]


def check_registry(disk: Disk, root: Path, copied: list[CopiedSession]) -> RegistryCheck:
    """Read the registry, and compare it with a copy that was taken before."""
    path = root / "registry.log"
    try:
        data = read_whole(disk, path)
    except FileNotFoundError:
        return RegistryCheck(0, [found("registry", path, "the registry is gone: its sessions are lost")])
    try:
        header = decode_header(data, path, KIND_REGISTRY)
    except FormatVersionError as error:
        return RegistryCheck(len(data), [found("version", path, str(error), 0, HEADER_BYTES)])
    except DamageError as error:
        return RegistryCheck(len(data), [found("registry", path, str(error), 0, min(HEADER_BYTES, len(data)))])
    findings: list[Finding] = []
    entries: list[Entry] = []
    end = HEADER_BYTES
    for offset, after, entry in salvage_entries(data, header.salt):
        if offset != end:
            findings.append(found("registry", path, "bytes that are no whole entry", end, offset - end))
        end = after
        entries.append(entry)
    # What follows the last whole entry may be torn: only the copy tells whether an entry was there.
    lost = _lost_sessions(entries, copied)
    if lost and not findings:
        names = ", ".join(lost[:5])
        findings.append(
            found("registry", path, f"{len(lost)} sessions that were here are not: {names}", end, len(data) - end)
        )
    return RegistryCheck(len(data), findings)


def _lost_sessions(entries: list[Entry], copied: list[CopiedSession]) -> list[str]:
    """Return the sessions of the copy that the registry no longer has, or has with an earlier owner."""
    owners: dict[str, int] = {}
    ended: set[str] = set()
    newest_us = 0
    for entry in entries:
        newest_us = max(newest_us, entry.time_us)
        if entry.kind == ENDED:
            owners.pop(entry.key, None)
            ended.add(entry.key)
        elif entry.kind == OPENED or entry.key in owners:
            owners[entry.key] = entry.incarnation
    lost: list[str] = []
    for key, incarnation, opened_us in copied:
        if key in ended:
            continue
        # One that ended long ago is gone from a registry that was written anew, and the copy may not know.
        gone = key not in owners and opened_us is not None and opened_us + 1_000_000 > newest_us
        if gone or (key in owners and owners[key] < incarnation):
            lost.append(key)
    return lost
