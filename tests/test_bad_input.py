"""What must be refused: with an error that names the cause, before anything is written, without harm."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import sqlite3
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from logstore.errors import (
    FormatVersionError,
    InvalidMessageError,
    InvalidStreamError,
    LogstoreError,
    NotAStoreError,
    StoreLockedError,
    UnknownEventError,
    WriteFailedError,
)
from logstore.storage import Log, files, opening
from logstore.storage.files import Disk
from logstore.storage.schema import SCHEMA_VERSION
from tests.engine import deadline, eventually, payloads, read_all, small

BAD_STREAMS = [
    pytest.param("", "1 to 512 bytes", id="empty"),
    pytest.param("x" * 513, "1 to 512 bytes", id="too long"),
    pytest.param("é" * 300, "1 to 512 bytes", id="too many bytes"),
    pytest.param("x" * 10_000_000, "1 to 512 bytes", id="huge"),
    pytest.param("a\x00b", "control character", id="nul"),
    pytest.param("a\nb", "control character", id="newline"),
    pytest.param("\x1b[31m", "control character", id="escape"),
    pytest.param("\x7f", "control character", id="delete"),
    pytest.param("\x85", "control character", id="next line"),
    pytest.param("\ud800", "surrogate", id="surrogate"),
    pytest.param("a\udcffb", "surrogate", id="surrogate escape"),
]
GOOD_STREAMS = [
    "x" * 512,
    "é" * 256,
    " ",
    "../../etc/passwd",
    "a/b",
    "'; drop table streams; --",
    "日本語",
    "👩‍🚀",
    "%",
    "_",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Return every file under a folder with its mode and digest."""
    return {
        str(each.relative_to(folder)): (
            each.lstat().st_mode,
            hashlib.sha256(each.read_bytes()).hexdigest() if each.is_file() else "",
        )
        for each in sorted(folder.rglob("*"))
    }


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def put(path: Path, text: str) -> None:
    path.write_text(text)


# Streams, payloads, ids.


@pytest.mark.promise("bad-names-refused")
@pytest.mark.parametrize(("stream", "why"), BAD_STREAMS)
async def test_a_bad_stream_name_is_refused_and_nothing_else(path: Path, stream: str, why: str) -> None:
    async with Log(path, small()) as log, deadline():
        await log.append("good", b"1")
        with pytest.raises(InvalidStreamError, match=why) as caught:
            await log.append(stream, b"2")
        assert len(str(caught.value)) < 1000
        str(caught.value).encode()
        with pytest.raises(InvalidStreamError, match=why):
            await log.append_many([("good", b"2", 0), (stream, b"3", 0)])
        with contextlib.suppress(InvalidStreamError):
            assert await log.read(stream) == []
        assert await payloads(log, "good") == [b"1"]
        assert [summary.stream for summary in log.stream_summaries()] == ["good"]
        await log.append("good", b"4")
    async with Log(path) as log:
        assert await payloads(log, "good") == [b"1", b"4"]


@pytest.mark.promise("names-are-no-paths")
async def test_a_stream_name_is_never_a_path_nor_a_query(path: Path, tmp_path: Path) -> None:
    async with Log(path, small()) as log, deadline():
        for stream in GOOD_STREAMS:
            await log.append(stream, stream.encode())
    async with Log(path) as log:
        for stream in GOOD_STREAMS:
            assert await payloads(log, stream) == [stream.encode()]
    assert names(tmp_path) <= {"events.db", "events.db-wal", "events.db-shm", "events-log"}


@pytest.mark.promise("largest-event")
async def test_an_event_too_large_is_refused_and_nothing_else(path: Path) -> None:
    async with Log(path) as log, deadline():
        with pytest.raises(InvalidMessageError, match="larger than the largest"):
            await log.append("one", bytes((64 << 20) + 1))
        with pytest.raises(InvalidMessageError):
            await log.append_many([("one", b"1", 0), ("one", bytes((64 << 20) + 1), 0)])
        await log.append("one", b"1")
        assert await payloads(log, "one") == [b"1"]


@pytest.mark.promise("unknown-id-is-none")
async def test_event_ids_that_are_not_ours(path: Path) -> None:
    strange = [
        "",
        " ",
        "abc",
        "-5",
        "+5",
        "0",
        "007",
        "1e3",
        "1_000",
        "5.0",
        "٣",
        "²",
        "9" * 19,
        "9" * 400,
        "1\n",
        "\x00",
        "\ud800",
    ]
    async with Log(path, small()) as log, deadline():
        await log.append("one", b"1")
        for text in strange:
            assert await log.stream_of(text) is None
            with pytest.raises(UnknownEventError) as caught:
                await log.read("one", text)
            assert len(str(caught.value)) < 200
            str(caught.value).encode()
        # Well formed, and never given out.
        for number in (1, 2**62, 2**63 - 1):
            assert await log.stream_of(str(number)) is None
        assert await log.read("one", str(2**63 - 1)) == []


# The path.


async def refused(path: Path, error: type[LogstoreError], *words: str) -> None:
    """Check that a store cannot be opened at a path, that the error says why, and that nothing has changed."""
    folder = path
    while not folder.is_dir():
        folder = folder.parent
    before = await asyncio.to_thread(tree, folder)
    for _ in range(2):
        log = Log(path, small())
        with pytest.raises(error) as caught:
            async with deadline():
                await log.append("one", b"1")
        for word in words:
            assert word in str(caught.value)
        await log.close()
    assert await asyncio.to_thread(tree, folder) == before


@pytest.mark.promise("foreign-file-untouched")
async def test_a_folder_is_no_store(tmp_path: Path) -> None:
    await refused(tmp_path, NotAStoreError, str(tmp_path), "is a folder", "events.db")


async def test_a_path_under_a_file_is_no_store(tmp_path: Path) -> None:
    put(tmp_path / "file", "text")
    await refused(tmp_path / "file" / "events.db", LogstoreError, str(tmp_path / "file"), "Not a directory")
    await refused(tmp_path / "file" / "deeper" / "events.db", LogstoreError, str(tmp_path / "file"), "Not a directory")


async def test_a_file_where_the_log_should_be_is_no_store(tmp_path: Path) -> None:
    put(tmp_path / "events-log", "text")
    await refused(tmp_path / "events.db", LogstoreError, str(tmp_path / "events-log"), "Not a directory")


@pytest.mark.promise("foreign-file-untouched")
async def test_a_text_file_is_no_store(path: Path) -> None:
    put(path, "Dear diary,\n" * 500)
    await refused(path, NotAStoreError, str(path), "not a SQLite database")


async def test_a_short_text_file_is_no_store(path: Path) -> None:
    put(path, "hello")
    await refused(path, NotAStoreError, str(path), "not a SQLite database")


@pytest.mark.promise("foreign-file-untouched")
@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
async def test_a_database_of_another_program_is_no_store(path: Path, journal_mode: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(f"pragma journal_mode = {journal_mode}")
        other.execute("create table recipes (name text)")
        other.execute("insert into recipes values ('soup')")
        other.commit()
    await refused(path, NotAStoreError, str(path), "another program", "recipes")
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("select * from recipes").fetchall() == [("soup",)]


@pytest.mark.promise("foreign-file-untouched")
async def test_a_database_that_another_program_has_open_is_left_alone(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("pragma journal_mode = wal")
        other.execute("create table recipes (name text)")
        other.commit()
        with pytest.raises(NotAStoreError, match="another program"):
            await Log(path).open()
        other.execute("insert into recipes values ('soup')")
        other.commit()
    assert not (path.parent / "events-log").exists()


async def test_a_database_with_another_application_id_is_no_store(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("pragma application_id = 12345")
        other.execute("create table streams (name text)")
        other.commit()
    await refused(path, NotAStoreError, str(path), "another program")


@pytest.mark.promise("network-refused")
@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
async def test_a_network_file_system_is_no_place_for_a_store(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_file_system_type", lambda folder: kind)
    await refused(path, NotAStoreError, f"network file system ({kind})", "local disk")


@pytest.mark.promise("lock-holder-named")
async def test_who_holds_a_lock_and_does_not_get_on_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await made(path)
    monkeypatch.setattr(opening, "_LOCK_PATIENCE_S", 0.0)
    lock = Disk().lock(path.parent / "events-log" / "checkpoint.lock")
    assert lock is not None
    with lock, pytest.raises(StoreLockedError, match=f"process .{os.getpid()}.*is it stopped") as caught:
        await Log(path).open()
    assert caught.value.pids == (os.getpid(),)
    async with Log(path) as log:
        assert len(await read_all(log, "one")) == 50


async def made(path: Path) -> None:
    async with Log(path, small()) as log:
        for number in range(50):
            await log.append("one", b"%d" % number)
        await log.sessions.open("key", b"data")


@pytest.mark.promise("newer-format-refused")
async def test_a_newer_catalogue_is_refused(path: Path) -> None:
    await made(path)
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(f"pragma user_version = {SCHEMA_VERSION + 1}")
    await refused(path, FormatVersionError, str(path), f"version {SCHEMA_VERSION + 1}", "upgrade")
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(f"pragma user_version = {SCHEMA_VERSION}")
    async with Log(path) as log:
        assert len(await read_all(log, "one")) == 50


def newer(path: Path) -> None:
    """Raise the format version in a file's header."""
    data = bytearray(path.read_bytes())
    data[8:10] = struct.pack("<H", 99)
    path.write_bytes(data)


@pytest.mark.promise("newer-format-refused")
async def test_a_newer_registry_is_refused(path: Path) -> None:
    await made(path)
    newer(path.parent / "events-log" / "registry.log")
    with pytest.raises(FormatVersionError, match=r"registry\.log.*version 99.*upgrade"):
        await Log(path).open()


@pytest.mark.promise("newer-format-refused")
async def test_a_newer_segment_is_refused_when_the_index_is_made_again(path: Path) -> None:
    await made(path)
    segments = path.parent / "events-log" / "segments"
    for name in names(segments):
        newer(segments / name)
    await asyncio.to_thread(path.unlink)
    before = tree(segments)
    for _ in range(2):
        with pytest.raises(FormatVersionError, match=r"segment.*version 99.*upgrade"):
            await Log(path).open()
    assert tree(segments) == before
    assert path.name not in names(path.parent)


@pytest.mark.promise("newer-format-refused")
async def test_a_newer_journal_is_refused_and_kept(path: Path) -> None:
    await made(path)
    lane = path.parent / "events-log" / "lanes" / "0000"
    put(lane / "0000099999.journal", "LOGSTORE" + struct.pack("<H", 99).decode() + "\0" * 5000)
    for _ in range(2):
        with pytest.raises(FormatVersionError, match=r"journal.*version 99.*upgrade"):
            await Log(path).open()
    assert "0000099999.journal" in names(lane)


# A disk that is full, or may not be written.


class FullDisk(Disk):
    """The real disk, without room for anything."""

    def create(self, path: Path) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def write(self, fd: int, data: bytes, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


async def test_a_full_disk_is_named(path: Path, tmp_path: Path) -> None:
    log = Log(path, small(), FullDisk())
    with pytest.raises(WriteFailedError, match="No space left on device"):
        await log.open()
    assert names(tmp_path) == set()
    # The same object, once there is room.
    log._disk = Disk()
    await log.append("one", b"1")
    await log.close()


@pytest.mark.promise("full-or-read-only-named")
async def test_an_existing_store_on_a_full_disk_is_named_and_unharmed(path: Path) -> None:
    await made(path)
    with pytest.raises(WriteFailedError, match="No space left on device"):
        await Log(path, small(), FullDisk()).open()
    async with Log(path) as log:
        assert len(await read_all(log, "one")) == 50


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount small file systems in memory, where this process may."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mount-{len(places)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.promise("degrade-serves-on", "full-or-read-only-named")
async def test_a_really_full_disk_is_named_and_room_mends_it(mounted: Callable[..., Path]) -> None:
    place = mounted("size=4m")
    path = place / "events.db"
    await made(path)
    ballast = place / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(WriteFailedError, match="No space left on device"):
        await Log(path, small()).open()
    ballast.unlink()
    stored = [b"%d" % number for number in range(50)]
    async with Log(path, small()) as log, deadline():
        assert await payloads(log, "one") == stored
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for number in range(50, 450):
            payload = b"%d " % number + bytes(500)
            await log.append("one", payload)
            stored.append(payload)
        assert log.health().status == "degraded"
        assert await payloads(log, "one") == stored
        ballast.unlink()
        await eventually(lambda: log.health().status == "ok")
        assert await payloads(log, "one") == stored
    async with Log(path) as log:
        assert await payloads(log, "one") == stored


@pytest.mark.promise("full-or-read-only-named")
async def test_a_read_only_disk_is_named(mounted: Callable[..., Path]) -> None:
    place = mounted("size=4m")
    path = place / "events.db"
    await made(path)
    before = await asyncio.to_thread(tree, place)
    remount = ["mount", "-o", "remount,ro", str(place)]
    assert (await asyncio.to_thread(subprocess.run, remount, check=False)).returncode == 0
    with pytest.raises(WriteFailedError, match="Read-only file system"):
        await Log(path, small()).open()
    with pytest.raises(WriteFailedError, match="Read-only file system"):
        await Log(place / "new" / "events.db", small()).open()
    assert await asyncio.to_thread(tree, place) == before
