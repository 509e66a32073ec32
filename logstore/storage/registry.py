"""The registry: a small shared log of which process owns which session.

`registry.log` is a file header and then entries, each a frame of its own:

| offset | size | field |
| --- | --- | --- |
| 0 | 4 | length of the body in bytes, u32 little endian |
| 4 | 4 | CRC-32C of the body, started from the file's salt |
| 8 | length | body: msgpack array `[kind, key, incarnation, time_us, data, stream_prefix]` |

Every process reads it as it grows; an append happens under `registry.lock`, after a look at what others appended, and
is on disk when it returns. When most entries are outdated the file is written anew and put in its place.
"""

from __future__ import annotations

import logging
import re
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import google_crc32c
import msgspec

from logstore.errors import DamageError
from logstore.storage.checksums import PartChecksums
from logstore.storage.files import Disk, Lock
from logstore.storage.header import HEADER_BYTES, KIND_REGISTRY, FileHeader, decode_header, new_salt
from logstore.storage.ids import MAX_ID
from logstore.storage.record import MAX_TIME_US

logger = logging.getLogger("logstore")

_FRAME: Final = struct.Struct("<II")
_MAX_ENTRY_BYTES: Final = 1 << 20
_BODY_START: Final = re.compile(rb"[\x95\x96]")
"""First byte of every body: a msgpack array of six, or five."""
_REWRITE_ENTRIES: Final = 10_000
"""Outdated entries that make a rewrite worth it."""

OPENED: Final = 1
OWNED: Final = 2
ENDED: Final = 3
RELEASED: Final = 4
"""Its owner lives and serves it no more: whoever is asked for it next takes it over."""


class Session(NamedTuple):
    """One session as the registry has it.

    Attributes:
        key: What the session is found by; a hash, never a secret.
        incarnation: The opening of the store that owns it.
        opened_us: When it was opened, microseconds since 1970.
        data: What its opener wants to find again.
        stream_prefix: What the names of its streams begin with, empty when they cannot be told by that.
        changed_us: When it was last opened, taken over, released or touched; microseconds since 1970.
        released: Whether its owner serves it no more.
    """

    key: str
    incarnation: int
    opened_us: int
    data: bytes
    stream_prefix: str = ""
    changed_us: int = 0
    released: bool = False


class SessionChange(NamedTuple):
    """A session as the catalogue shows it; times in microseconds since 1970."""

    key: str
    incarnation: int
    opened_us: int
    ended_us: int | None
    stream_prefix: str = ""


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One line of the registry: a session was opened, taken over or touched, released, or ended."""

    kind: int
    key: str
    incarnation: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
    time_us: Annotated[int, msgspec.Meta(ge=0, le=MAX_TIME_US)]
    data: bytes
    stream_prefix: str = ""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Entry)


def _seed(header: FileHeader) -> int:
    return int(google_crc32c.value(header.salt.to_bytes(8, "little")))


def _encode(entry: Entry, seed: int) -> bytes:
    body = _encoder.encode(entry)
    if len(body) > _MAX_ENTRY_BYTES:
        raise ValueError(f"a session of {len(body)} bytes is larger than the largest, {_MAX_ENTRY_BYTES}")
    return _FRAME.pack(len(body), google_crc32c.extend(seed, body)) + body


class Registry:
    """The sessions of a store, shared by all processes that have it open. Safe to call from any thread.

    Args:
        disk: The file door.
        root: The log folder.
    """

    def __init__(self, disk: Disk, root: Path) -> None:
        self._disk = disk
        self._root = root
        self._path = root / "registry.log"
        self._mutex = threading.Lock()
        self._fd = -1
        self._header: FileHeader | None = None
        self._end = 0
        self._failed = False
        self._entries = 0
        self._sessions: dict[str, Session] = {}
        self._changed: dict[str, SessionChange] = {}

    def open(self, store_id: int) -> int:
        """Open the registry, made when there is none, and return the id of the store.

        Args:
            store_id: Id for a new store; an existing one keeps its own.

        Raises:
            DamageError: An entry that was on disk is bad.
            FormatVersionError: A newer release wrote it.
        """
        with self._locked(), self._mutex:
            if not self._path.exists():
                header = FileHeader(kind=KIND_REGISTRY, store_id=store_id, salt=new_salt())
                self._disk.publish(self._path, header.encode())
            try:
                self._reopen()
                self._cut_torn()
            except BaseException:
                self._close()
                raise
            assert self._header is not None
            return self._header.store_id

    def close(self) -> None:
        """Close the file."""
        with self._mutex:
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1

    def find(self, key: str) -> Session | None:
        """Return a session that has not ended, as of now."""
        with self._mutex:
            self._catch_up()
            return self._sessions.get(key)

    def sessions(self) -> list[Session]:
        """Return all sessions that have not ended, oldest first."""
        with self._mutex:
            self._catch_up()
            return list(self._sessions.values())

    def open_session(self, key: str, incarnation: int, now_us: int, data: bytes, stream_prefix: str = "") -> Session:
        """Add a session; on return it is on disk.

        Raises:
            ValueError: Key and data together are larger than 1 MiB.
            OSError: The disk refused.
        """
        self._append(Entry(OPENED, key, incarnation, now_us, data, stream_prefix))
        return Session(key, incarnation, now_us, data, stream_prefix, now_us)

    def end_session(self, key: str, incarnation: int, now_us: int, *, unchanged_since_us: int | None = None) -> None:
        """End a session; on return that is on disk.

        Args:
            key: The session.
            incarnation: Who ends it.
            now_us: The time.
            unchanged_since_us: End it only if its last change is not after this.
        """
        with self._locked(), self._mutex:
            self._catch_up()
            session = self._sessions.get(key)
            if unchanged_since_us is None or (session is not None and session.changed_us <= unchanged_since_us):
                self._append_locked(Entry(ENDED, key, incarnation, now_us, b""))

    def release(self, key: str, incarnation: int, now_us: int) -> None:
        """Note that a session's owner serves it no more, if it is the owner; on return that is on disk."""
        with self._locked(), self._mutex:
            self._catch_up()
            session = self._sessions.get(key)
            if session is not None and session.incarnation == incarnation and not session.released:
                self._append_locked(Entry(RELEASED, key, incarnation, now_us, b""))

    def take_over(self, key: str, previous: int, incarnation: int, now_us: int) -> Session | None:
        """Give a session to another owner, unless somebody else was faster.

        Args:
            key: The session.
            previous: The owner that the caller found dead, or that released it; the new one itself to touch it.
            incarnation: The new owner.
            now_us: The time.

        Returns:
            The session as it is now: check whose it is. None when it has ended.
        """
        with self._locked(), self._mutex:
            self._catch_up()
            session = self._sessions.get(key)
            if session is not None and session.incarnation == previous:
                self._append_locked(Entry(OWNED, key, incarnation, now_us, b""))
                session = self._sessions[key]
            return session

    def _append(self, entry: Entry) -> None:
        with self._locked(), self._mutex:
            self._catch_up()
            self._append_locked(entry)

    def _append_locked(self, entry: Entry) -> None:
        assert self._header is not None
        if self._failed or self._entries - len(self._sessions) > _REWRITE_ENTRIES:
            # After a failed sync the next one succeeds without having written what the first one could not.
            self._rewrite()
        data = _encode(entry, _seed(self._header))
        self._cut_torn()
        self._failed = True
        self._disk.write(self._fd, data, self._end)
        self._disk.sync(self._fd)
        self._failed = False
        self._end += len(data)
        self._apply(entry)

    def _cut_torn(self) -> None:
        """End the file behind its last whole entry; what a torn append left there was never acknowledged.

        Left in place it would look like damage, also behind a shorter entry that is written over it. It need not be on
        disk before the next entry is, with which it is synced: if it comes back, it is cut off again.
        """
        size = self._disk.size(self._fd)
        if size <= self._end:
            return
        kept = self._root / "damaged" / f"{self._path.name}.torn"
        self._disk.make_folder(kept.parent)
        self._disk.publish(kept, self._disk.read(self._fd, size - self._end, self._end))
        self._disk.shorten(self._fd, self._end)
        logger.warning("%s ends in a torn write of %d bytes, kept in %s", self._path, size - self._end, kept)

    def _rewrite(self) -> None:
        """Put a file in place that holds what is valid and nothing else."""
        assert self._header is not None
        entries: list[Entry] = []
        for each in self._sessions.values():
            entries.append(Entry(OPENED, each.key, each.incarnation, each.opened_us, each.data, each.stream_prefix))
            if each.released or each.changed_us != each.opened_us:
                kind = RELEASED if each.released else OWNED
                entries.append(Entry(kind, each.key, each.incarnation, each.changed_us, b""))
        self._disk.publish(self._path, encode_registry(self._header.store_id, entries))
        self._reopen()

    def _locked(self) -> Lock:
        """Keep other writers out; before the mutex is taken: who only reads must not wait for another process."""
        lock = self._disk.lock(self._root / "registry.lock", wait=True)
        assert lock is not None
        return lock

    def _reopen(self) -> None:
        """Read the file that is in place now from its beginning."""
        fd = self._disk.open(self._path, write=True)
        try:
            header = decode_header(self._disk.read(fd, HEADER_BYTES, 0), self._path, KIND_REGISTRY)
        except BaseException:
            self._disk.close(fd)
            raise
        if self._fd >= 0:
            self._disk.close(self._fd)
        self._fd, self._header, self._end = fd, header, HEADER_BYTES
        self._failed = False
        self._entries = 0
        self._sessions.clear()
        self._read_on()

    def _catch_up(self) -> None:
        """Read what other processes appended, or the file that one of them put in place."""
        if self._replaced():
            self._reopen()
        else:
            self._read_on()

    def _replaced(self) -> bool:
        try:
            return self._path.stat().st_ino != self._disk.inode(self._fd)
        except FileNotFoundError:
            raise DamageError(self._path, 0, 0, "the registry is gone from under an open store") from None

    def _read_on(self) -> None:
        assert self._header is not None
        size = self._disk.size(self._fd)
        if size <= self._end:
            return
        data = self._disk.read(self._fd, size - self._end, self._end)
        base = self._end
        for found in _salvage(data, _seed(self._header)):
            if base + found.offset > self._end:
                bad = base + len(data) - self._end
                raise DamageError(self._path, self._end, bad, "an entry that was on disk does not match its checksum")
            self._apply(found.entry)
            self._end = base + found.end

    def _apply(self, entry: Entry) -> None:
        self._entries += 1
        if entry.kind == OPENED:
            session = Session(
                entry.key, entry.incarnation, entry.time_us, entry.data, entry.stream_prefix, entry.time_us
            )
        else:
            found = self._sessions.get(entry.key)
            if found is None:
                return
            session = found._replace(
                incarnation=entry.incarnation, changed_us=entry.time_us, released=entry.kind == RELEASED
            )
        ended = entry.time_us if entry.kind == ENDED else None
        if ended is None:
            self._sessions[entry.key] = session
        else:
            del self._sessions[entry.key]
        self._changed[entry.key] = SessionChange(
            entry.key, session.incarnation, session.opened_us, ended, session.stream_prefix
        )

    def all_changed(self) -> None:
        """Let the next call of `changes` return every session that has not ended."""
        with self._mutex:
            for session in self._sessions.values():
                change = SessionChange(session.key, session.incarnation, session.opened_us, None, session.stream_prefix)
                self._changed.setdefault(session.key, change)

    def changes(self) -> list[SessionChange]:
        """Return, once, the sessions that changed since the last call."""
        with self._mutex:
            self._catch_up()
            changed, self._changed = self._changed, {}
            return list(changed.values())


class FoundEntry(NamedTuple):
    """A whole entry, and where it lies."""

    offset: int
    end: int
    entry: Entry


def salvage_entries(data: bytes, salt: int) -> Iterator[FoundEntry]:
    """Yield the whole entries of a registry's bytes, wherever damage lies between them.

    Args:
        data: The whole file.
        salt: Of the file.
    """
    return _salvage(data, int(google_crc32c.value(salt.to_bytes(8, "little"))), HEADER_BYTES)


def _salvage(data: bytes, seed: int, offset: int = 0) -> Iterator[FoundEntry]:
    checksums = PartChecksums(lambda start, end: data[start:end], len(data))
    view = memoryview(data)
    while (place := _BODY_START.search(data, offset + _FRAME.size)) is not None:
        start = place.start()
        offset = start - _FRAME.size
        length, checksum = _FRAME.unpack_from(data, offset)
        end = start + length
        entry = None
        if 0 < length <= _MAX_ENTRY_BYTES and end <= len(data) and checksums.extend(seed, start, end) == checksum:
            entry = _decoded(view[start:end])
        if entry is None:
            offset += 1
        else:
            yield FoundEntry(offset, end, entry)
            offset = end


def _decoded(body: memoryview) -> Entry | None:
    """Return the entry that a body holds; None when it holds none, though its checksum matches."""
    try:
        return _decoder.decode(body)
    except (ValueError, msgspec.MsgspecError):
        return None


def encode_registry(store_id: int, entries: Iterable[Entry]) -> bytes:
    """Return a whole registry file with the given entries."""
    header = FileHeader(kind=KIND_REGISTRY, store_id=store_id, salt=new_salt())
    return header.encode() + b"".join(_encode(entry, _seed(header)) for entry in entries)
