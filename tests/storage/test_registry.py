"""The registry tells every process the same about every session, and loses nothing that it said."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import msgspec
import pytest

from logstore.errors import DamageError, FormatVersionError
from logstore.ops.verify.registry import check_registry
from logstore.storage import registry as registry_module
from logstore.storage.files import Disk
from logstore.storage.header import HEADER_BYTES
from logstore.storage.registry import Registry, Session, SessionChange, salvage_entries
from tests.storage.disks import Fault, FaultyDisk, open_descriptors

STORE_ID = 99
NOW_US = 1_790_000_000_000_000
DEADLINE_S = 30

Opener = Callable[..., Registry]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    registries: list[Registry] = []

    def opener(disk: Disk | None = None, store_id: int = STORE_ID) -> Registry:
        registry = Registry(disk or Disk(), tmp_path)
        registries.append(registry)
        registry.open(store_id)
        return registry

    yield opener
    for registry in registries:
        registry.close()


def forged(body: bytes, path: Path) -> bytes:
    """Return an entry of a registry file, whatever its body is."""
    checksum = int(google_crc32c.extend(google_crc32c.value(path.read_bytes()[24:32]), body))
    return len(body).to_bytes(4, "little") + checksum.to_bytes(4, "little") + body


def log_of(folder: Path) -> Path:
    return folder / "registry.log"


def bounds_of_entries(path: Path) -> list[tuple[int, int]]:
    """Return where each entry begins and ends."""
    data = path.read_bytes()
    bounds = []
    offset = HEADER_BYTES
    while offset < len(data):
        end = offset + 8 + int.from_bytes(data[offset : offset + 4], "little")
        bounds.append((offset, end))
        offset = end
    return bounds


def test_a_session_is_found_until_it_ends(opened: Opener) -> None:
    registry = opened()
    assert registry.find("key") is None
    session = registry.open_session("key", 7, NOW_US, b"data")
    assert session == Session("key", 7, NOW_US, b"data", changed_us=NOW_US)
    assert registry.find("key") == session
    registry.end_session("key", 7, NOW_US + 1)
    assert registry.find("key") is None
    assert registry.sessions() == []


def test_two_processes_see_what_the_other_wrote(opened: Opener) -> None:
    one, two = opened(), opened()
    one.open_session("a", 1, NOW_US, b"")
    two.open_session("b", 2, NOW_US + 1, b"")
    one.open_session("c", 1, NOW_US + 2, b"")
    assert [each.key for each in one.sessions()] == [each.key for each in two.sessions()] == ["a", "b", "c"]
    two.end_session("a", 2, NOW_US + 3)
    assert one.find("a") is None


def test_everything_is_there_after_reopening(opened: Opener) -> None:
    registry = opened()
    for number in range(20):
        registry.open_session(f"key-{number}", number, NOW_US + number, bytes(number))
    registry.end_session("key-3", 3, NOW_US + 30)
    registry.take_over("key-4", 4, 77, NOW_US + 31)
    known = registry.sessions()
    registry.close()
    assert opened().sessions() == known
    assert len(known) == 19


def test_an_existing_store_keeps_its_id(tmp_path: Path) -> None:
    for store_id in (5, 6):
        registry = Registry(Disk(), tmp_path)
        assert registry.open(store_id) == 5
        registry.close()


def test_sessions_come_oldest_first_whoever_owns_them_now(opened: Opener) -> None:
    registry = opened()
    for number, key in enumerate("abc"):
        registry.open_session(key, 1, NOW_US + number, b"")
    registry.take_over("a", 1, 2, NOW_US + 9)
    assert [each.key for each in registry.sessions()] == ["a", "b", "c"]


# Taking over.


def test_a_session_taken_over_keeps_its_age_and_data(opened: Opener) -> None:
    registry, other = opened(), opened()
    registry.open_session("key", 1, NOW_US, b"data")
    assert other.take_over("key", 1, 2, NOW_US + 5) == Session("key", 2, NOW_US, b"data", changed_us=NOW_US + 5)
    assert registry.find("key") == Session("key", 2, NOW_US, b"data", changed_us=NOW_US + 5)


def test_of_two_that_take_a_session_over_one_wins_and_the_other_is_told(opened: Opener) -> None:
    one, two = opened(), opened()
    one.open_session("key", 1, NOW_US, b"")
    winner = one.take_over("key", 1, 2, NOW_US + 1)
    loser = two.take_over("key", 1, 3, NOW_US + 1)
    assert winner == loser == Session("key", 2, NOW_US, b"", changed_us=NOW_US + 1)


TAKER = """
import sys
from pathlib import Path
from logstore.storage.files import Disk
from logstore.storage.registry import Registry
registry = Registry(Disk(), Path(sys.argv[1]))
registry.open(0)
print(flush=True)
sys.stdin.readline()
for number in range(50):
    print(registry.take_over(f"key-{number}", 1, int(sys.argv[2]), 5).incarnation)
"""


@pytest.mark.promise("one-owner")
def test_two_processes_that_race_agree_on_every_owner(tmp_path: Path, opened: Opener) -> None:
    registry = opened()
    for number in range(50):
        registry.open_session(f"key-{number}", 1, NOW_US, b"")
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", TAKER, tmp_path, str(incarnation)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for incarnation in (2, 3)
    ]
    for taker in takers:
        assert taker.stdout is not None
        taker.stdout.readline()
    for taker in takers:
        assert taker.stdin is not None
        taker.stdin.write("go\n")
        taker.stdin.flush()
    owners = [taker.communicate(timeout=DEADLINE_S)[0].split() for taker in takers]
    assert owners[0] == owners[1] == [str(session.incarnation) for session in registry.sessions()]
    assert set(owners[0]) <= {"2", "3"}
    assert len(owners[0]) == 50


@pytest.mark.promise("one-owner")
def test_what_two_write_at_once_is_all_there(opened: Opener) -> None:
    writers = [opened(), opened()]

    def write(number: int) -> None:
        for each in range(40):
            writers[number].open_session(f"{number}-{each}", number, NOW_US, b"")

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, range(2)))
    keys = {f"{number}-{each}" for number in range(2) for each in range(40)}
    assert [{session.key for session in writer.sessions()} for writer in writers] == [keys, keys]


def test_a_session_that_ended_or_never_was_cannot_be_taken_over(opened: Opener) -> None:
    registry = opened()
    registry.open_session("key", 1, NOW_US, b"")
    registry.end_session("key", 1, NOW_US)
    size = log_of(registry._root).stat().st_size
    assert registry.take_over("key", 1, 2, NOW_US) is None
    assert registry.take_over("other", 1, 2, NOW_US) is None
    assert log_of(registry._root).stat().st_size == size


def test_ending_a_session_that_nobody_knows_does_nothing(opened: Opener) -> None:
    registry = opened()
    registry.end_session("key", 1, NOW_US)
    assert registry.sessions() == []
    assert registry.changes() == []


# Changes for the catalogue.


def test_changes_are_told_once_and_by_whoever_made_them(opened: Opener) -> None:
    one, two = opened(), opened()
    one.open_session("a", 1, NOW_US, b"")
    two.open_session("b", 2, NOW_US, b"")
    one.end_session("a", 1, NOW_US + 1)
    expected = [SessionChange("a", 1, NOW_US, NOW_US + 1), SessionChange("b", 2, NOW_US, None)]
    assert one.changes() == expected
    assert one.changes() == []
    assert two.changes() == expected


# Torn appends and failing disks.


@pytest.mark.promise("torn-is-no-damage", "sessions-outlive-faults")
@pytest.mark.parametrize("kept", [1, 7, 8, 9, -1])
def test_a_torn_append_is_written_over(tmp_path: Path, opened: Opener, kept: int) -> None:
    registry = opened()
    registry.open_session("a", 1, NOW_US, b"")
    whole = log_of(tmp_path).read_bytes()
    registry.open_session("torn", 1, NOW_US, bytes(100))
    registry.close()
    torn = log_of(tmp_path).read_bytes()[len(whole) :]
    log_of(tmp_path).write_bytes(whole + torn[:kept])
    again, reader = opened(), opened()
    assert [each.key for each in again.sessions()] == ["a"]
    again.open_session("b", 1, NOW_US, b"")
    assert [each.key for each in reader.sessions()] == ["a", "b"]
    assert [each.key for each in opened().sessions()] == ["a", "b"]


def test_a_torn_append_is_kept_aside_and_cut_off_by_the_next_opening(tmp_path: Path, opened: Opener) -> None:
    registry = opened()
    registry.open_session("a", 1, NOW_US, b"")
    registry.close()
    whole = log_of(tmp_path).read_bytes()
    log_of(tmp_path).write_bytes(whole + b"half an entry")
    assert check_registry(Disk(), tmp_path, [], tmp_path / "events.db").findings
    assert [each.key for each in opened().sessions()] == ["a"]
    assert log_of(tmp_path).read_bytes() == whole
    assert (tmp_path / "damaged" / "registry.log.torn").read_bytes() == b"half an entry"
    assert check_registry(Disk(), tmp_path, [], tmp_path / "events.db").findings == []


def test_nothing_of_a_torn_append_is_left_behind_the_next_entry(tmp_path: Path, opened: Opener) -> None:
    registry = opened()
    with log_of(tmp_path).open("ab") as file:
        # By another process, which died over it.
        file.write(bytes(500))
    registry.open_session("a", 1, NOW_US, b"")
    assert bounds_of_entries(log_of(tmp_path))[-1][1] == log_of(tmp_path).stat().st_size
    assert [each.key for each in opened().sessions()] == ["a"]


@pytest.mark.parametrize("written", [0, 5, 30])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_an_append_that_the_disk_refuses_is_raised_and_the_next_one_counts(
    opened: Opener, written: int, error: int
) -> None:
    disk = FaultyDisk()
    registry, reader = opened(disk), opened()
    registry.open_session("a", 1, NOW_US, b"")
    disk.fail(Fault("write", error=error, written=written))
    with pytest.raises(OSError, match=rf"Errno {error}\b"):
        registry.open_session("refused", 1, NOW_US, bytes(100))
    assert registry.find("refused") is None
    registry.open_session("b", 1, NOW_US, b"")
    assert [each.key for each in registry.sessions()] == ["a", "b"]
    assert [each.key for each in reader.sessions()] == ["a", "b"]


@pytest.mark.promise("failed-file-given-up")
def test_nothing_is_appended_to_a_file_whose_sync_failed(tmp_path: Path, opened: Opener) -> None:
    # The kernel marks the pages clean: what was written before the failed sync may be gone after a crash, and a whole
    # entry behind it would be read as damage in the middle.
    disk = FaultyDisk()
    registry, reader = opened(disk), opened()
    registry.open_session("a", 1, NOW_US, b"")
    given_up = log_of(tmp_path).stat().st_ino
    disk.fail(Fault("sync"))
    with pytest.raises(OSError, match=r"Errno 5\b"):
        registry.open_session("refused", 1, NOW_US, bytes(100))
    registry.open_session("b", 1, NOW_US, b"")
    assert log_of(tmp_path).stat().st_ino != given_up
    assert {"a", "b"} <= {each.key for each in reader.sessions()} <= {"a", "b", "refused"}


@pytest.mark.promise("sessions-outlive-faults")
def test_while_the_disk_fails_every_append_is_refused_and_none_is_lost_after(opened: Opener) -> None:
    disk = FaultyDisk()
    registry, reader = opened(disk), opened()
    registry.open_session("a", 1, NOW_US, b"")
    disk.fail(Fault("sync", from_then_on=True))
    for _ in range(5):
        with pytest.raises(OSError, match=r"Errno 5\b"):
            registry.open_session("b", 1, NOW_US, b"")
    assert reader.find("a") is not None
    disk.heal()
    registry.open_session("c", 1, NOW_US, b"")
    for each in (registry, reader, opened()):
        assert {session.key for session in each.sessions()} >= {"a", "c"}


# Damage.


def test_damage_in_the_middle_is_an_error_with_file_and_offset(tmp_path: Path, opened: Opener) -> None:
    registry = opened()
    for number in range(5):
        registry.open_session(f"key-{number}", 1, NOW_US, b"data")
    registry.close()
    whole = log_of(tmp_path).read_bytes()
    bounds = bounds_of_entries(log_of(tmp_path))
    for start, end in bounds[:-1]:
        for place in range(start, end):
            data = bytearray(whole)
            data[place] ^= 0x10
            log_of(tmp_path).write_bytes(data)
            with pytest.raises(DamageError, match=r"registry\.log.*does not match its checksum") as caught:
                opened()
            assert (caught.value.path, caught.value.offset) == (log_of(tmp_path), start)


def test_damage_in_the_last_entry_looks_like_a_torn_append(tmp_path: Path, opened: Opener) -> None:
    # Nothing behind it says that it was on disk.
    registry = opened()
    registry.open_session("a", 1, NOW_US, b"")
    registry.open_session("b", 1, NOW_US, b"")
    registry.close()
    data = bytearray(log_of(tmp_path).read_bytes())
    data[-1] ^= 1
    log_of(tmp_path).write_bytes(data)
    assert [each.key for each in opened().sessions()] == ["a"]


@pytest.mark.parametrize("place", [0, 20, 60])
def test_a_damaged_file_header_is_an_error(tmp_path: Path, opened: Opener, place: int) -> None:
    opened().close()
    data = bytearray(log_of(tmp_path).read_bytes())
    data[place] ^= 1
    log_of(tmp_path).write_bytes(data)
    with pytest.raises(DamageError, match=r"registry\.log"):
        opened()


def test_a_registry_of_a_newer_release_is_refused(tmp_path: Path, opened: Opener) -> None:
    opened().close()
    data = bytearray(log_of(tmp_path).read_bytes())
    data[8] = 200
    log_of(tmp_path).write_bytes(data)
    with pytest.raises(FormatVersionError, match="upgrade mcp-logstore"):
        opened()
    assert log_of(tmp_path).read_bytes() == data


def test_a_registry_that_cannot_be_opened_holds_no_descriptor(tmp_path: Path) -> None:
    registry = Registry(Disk(), tmp_path)
    registry.open(STORE_ID)
    registry.open_session("a", 1, NOW_US, b"")
    registry.open_session("b", 1, NOW_US, b"")
    registry.close()
    data = bytearray(log_of(tmp_path).read_bytes())
    data[HEADER_BYTES] ^= 1
    log_of(tmp_path).write_bytes(data)
    before = open_descriptors()
    with pytest.raises(DamageError):
        Registry(Disk(), tmp_path).open(STORE_ID)
    assert open_descriptors() == before


def test_a_registry_that_is_gone_from_under_an_open_store_is_an_error(tmp_path: Path, opened: Opener) -> None:
    registry = opened()
    log_of(tmp_path).unlink()
    with pytest.raises(DamageError, match="gone from under an open store"):
        registry.open_session("key", 1, NOW_US, b"")


def test_an_entry_too_large_to_be_read_again_is_refused_before_it_is_written(tmp_path: Path, opened: Opener) -> None:
    registry = opened()
    registry.open_session("a", 1, NOW_US, b"")
    size = log_of(tmp_path).stat().st_size
    with pytest.raises(ValueError, match="larger than the largest"):
        registry.open_session("b", 1, NOW_US, bytes(2 << 20))
    assert log_of(tmp_path).stat().st_size == size
    registry.open_session("c", 1, NOW_US, b"")
    assert [each.key for each in opened().sessions()] == ["a", "c"]


def test_an_entry_of_the_largest_size_is_read_again(opened: Opener) -> None:
    registry = opened()
    registry.open_session("a", 1, NOW_US, bytes(1_000_000))
    registry.open_session("b", 1, NOW_US, b"")
    assert [each.key for each in opened().sessions()] == ["a", "b"]


# Rewriting.


@pytest.fixture
def rewritten_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_REWRITE_ENTRIES", 10)


@pytest.mark.usefixtures("rewritten_often")
def test_a_long_file_is_written_anew_and_the_other_reader_follows(tmp_path: Path, opened: Opener) -> None:
    writer, reader = opened(), opened()
    writer.open_session("stays", 1, NOW_US, b"data")
    assert reader.find("stays") is not None
    inodes = set()
    largest = 0
    for number in range(100):
        writer.open_session(f"key-{number}", 1, NOW_US + number, b"")
        writer.end_session(f"key-{number}", 1, NOW_US + number)
        inodes.add(log_of(tmp_path).stat().st_ino)
        largest = max(largest, len(bounds_of_entries(log_of(tmp_path))))
        if number % 7 == 0:
            assert [each.key for each in reader.sessions()] == ["stays"]
    assert len(inodes) > 1
    assert largest < 20
    assert [each.key for each in reader.sessions()] == ["stays"]
    reader.open_session("last", 2, NOW_US, b"")
    assert [each.key for each in writer.sessions()] == ["stays", "last"]
    assert opened().open(0) == STORE_ID


@pytest.mark.usefixtures("rewritten_often")
def test_a_rewrite_keeps_owner_age_and_data(opened: Opener) -> None:
    registry = opened()
    registry.open_session("key", 1, NOW_US, b"data")
    registry.take_over("key", 1, 2, NOW_US + 1)
    for _ in range(50):
        registry.end_session("nobody", 1, NOW_US)
    assert opened().find("key") == Session("key", 2, NOW_US, b"data", changed_us=NOW_US + 1)


@pytest.mark.promise("sessions-outlive-faults")
@pytest.mark.usefixtures("rewritten_often")
@pytest.mark.parametrize("kind", ["create", "write", "sync", "rename", "sync_folder"])
def test_a_rewrite_that_fails_loses_nothing(tmp_path: Path, opened: Opener, kind: str) -> None:
    disk = FaultyDisk()
    registry, reader = opened(disk), opened()
    registry.open_session("key", 1, NOW_US, b"data")
    for _ in range(11):
        registry.end_session("nobody", 1, NOW_US)
    disk.fail(Fault(kind, error=errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        registry.open_session("refused", 1, NOW_US, b"")
    assert reader.find("key") == registry.find("key") == Session("key", 1, NOW_US, b"data", changed_us=NOW_US)
    registry.open_session("next", 1, NOW_US, b"")
    assert [each.key for each in reader.sessions()] == ["key", "next"]
    assert {path.name for path in tmp_path.iterdir()} == {"registry.log", "registry.lock"}


@pytest.mark.usefixtures("rewritten_often")
def test_changes_survive_a_rewrite(opened: Opener) -> None:
    registry = opened()
    registry.open_session("ended", 1, NOW_US, b"")
    registry.end_session("ended", 1, NOW_US + 1)
    for _ in range(20):
        registry.end_session("nobody", 1, NOW_US)
    assert registry.changes() == [SessionChange("ended", 1, NOW_US, NOW_US + 1)]


def test_the_file_is_private(tmp_path: Path, opened: Opener) -> None:
    umask = os.umask(0o022)
    try:
        opened()
    finally:
        os.umask(umask)
    assert log_of(tmp_path).stat().st_mode & 0o777 == 0o600


def test_a_released_session_keeps_its_owner_and_whoever_is_asked_next_takes_it_over(opened: Opener) -> None:
    one, two = opened(), opened()
    one.open_session("key", 1, NOW_US, b"data")
    two.release("key", 2, NOW_US + 1)
    assert one.find("key") == Session("key", 1, NOW_US, b"data", changed_us=NOW_US)
    one.release("key", 1, NOW_US + 2)
    assert two.find("key") == Session("key", 1, NOW_US, b"data", changed_us=NOW_US + 2, released=True)
    two.take_over("key", 1, 2, NOW_US + 3)
    assert one.find("key") == Session("key", 2, NOW_US, b"data", changed_us=NOW_US + 3)


@pytest.mark.usefixtures("rewritten_often")
def test_a_rewrite_keeps_that_a_session_is_released_and_since_when(opened: Opener) -> None:
    registry = opened()
    registry.open_session("key", 1, NOW_US, b"data")
    registry.release("key", 1, NOW_US + 1)
    for _ in range(50):
        registry.end_session("nobody", 1, NOW_US)
    assert opened().find("key") == Session("key", 1, NOW_US, b"data", changed_us=NOW_US + 1, released=True)


@pytest.mark.promise("unused-sessions-end")
def test_a_session_is_ended_for_its_age_only_when_nobody_has_used_it_since(opened: Opener) -> None:
    registry = opened()
    registry.open_session("key", 1, NOW_US, b"")
    registry.take_over("key", 1, 1, NOW_US + 2)
    registry.end_session("key", 2, NOW_US + 3, unchanged_since_us=NOW_US + 1)
    assert registry.find("key") is not None
    registry.end_session("key", 2, NOW_US + 3, unchanged_since_us=NOW_US + 2)
    assert registry.find("key") is None


@pytest.mark.parametrize(
    "body",
    [
        b"\x96\x01",
        msgspec.msgpack.encode([1, "key", 7, NOW_US, "no bytes", ""]),
        msgspec.msgpack.encode([1, "key", 1 << 63, NOW_US, b"", ""]),
        msgspec.msgpack.encode([1, "key", -1, NOW_US, b"", ""]),
        msgspec.msgpack.encode([1, "key", 7, 1 << 62, b"", ""]),
        b"\x96\x01\xa1\xff\x07\x01\xc4\0\xa0",
    ],
)
def test_what_is_no_entry_is_damage_though_its_checksum_matches(opened: Opener, tmp_path: Path, body: bytes) -> None:
    registry = opened()
    path = log_of(tmp_path)
    with path.open("ab") as file:
        file.write(forged(body, path))
    assert registry.find("key") is None
    with path.open("ab") as file:
        file.write(forged(msgspec.msgpack.encode([1, "other", 7, NOW_US, b"", ""]), path))
    with pytest.raises(DamageError, match="does not match"):
        registry.find("other")
    found = list(salvage_entries(path.read_bytes(), int.from_bytes(path.read_bytes()[24:32], "little")))
    assert [each.entry.key for each in found] == ["other"]
