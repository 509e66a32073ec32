"""The campaigns that kill at every change of the disk and fail every call: a slice of each, and that they would see."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import crash
from crash_calls import DiskCall, is_supported
from crash_errors import Failing, Fault
from crash_kill import BrokenPromiseError
from crash_told import Told, payload_of
from crash_writer import Call, Mark

TOOLS = Path(crash.__file__).parent
stops_calls = pytest.mark.skipif(not is_supported(), reason="only Linux can stop the system calls of a process")


def run(tmp_path: Path, *arguments: str, sabotage: str = "") -> subprocess.CompletedProcess[str]:
    """Run a campaign in a process without threads, that can be forked, and that breaks a promise first."""
    script = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r})\n{sabotage}\nimport crash; sys.exit(crash.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, *arguments, "--folder", str(tmp_path / "stores")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@stops_calls
@pytest.mark.parametrize(("campaign", "scenario"), [("points", "adoption"), ("errors", "checkpoint")])
def test_a_slice_of_it_finds_nothing(tmp_path: Path, campaign: str, scenario: str) -> None:
    done = run(tmp_path, campaign, "--only", scenario, "--runs", "4", "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 runs" in done.stdout
    assert f"in {scenario}" in done.stdout


JOURNALS_GO_FIRST = """
from logstore.storage.checkpoint import SegmentStore
store = SegmentStore._store

def store_last(self, runs, journals, now_us):
    self._done += journals
    self._remove_done()
    store(self, runs, journals, now_us)

SegmentStore._store = store_last
"""
ERRORS_ARE_SWALLOWED = """
import contextlib
from logstore.storage.files import Disk
write = Disk.write

def hope(self, fd, data, offset):
    with contextlib.suppress(OSError):
        write(self, fd, data, offset)

Disk.write = hope
"""
KERNEL_ERRORS_ARE_SWALLOWED = """
from logstore.storage.kernel_sync import KernelSync
start = KernelSync.start

def hope(self, fd, path, done):
    try:
        return start(self, fd, path, done)
    except OSError:
        self._loop.call_soon(done, None)
        return True

KernelSync.start = hope
"""


@stops_calls
@pytest.mark.parametrize(
    ("campaign", "scenario", "sabotage"),
    [
        ("points", "adoption", JOURNALS_GO_FIRST),
        ("errors", "append/1", ERRORS_ARE_SWALLOWED),
        ("errors", "append/0", KERNEL_ERRORS_ARE_SWALLOWED),
    ],
)
def test_it_sees_a_broken_promise_and_says_how_to_see_it_again(
    tmp_path: Path, campaign: str, scenario: str, sabotage: str
) -> None:
    done = run(tmp_path, campaign, "--only", scenario, "--runs", "100", "--seed", "7", sabotage=sabotage)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout
    assert f"--seed 7 --only {scenario}" in done.stdout


# What was told, and what is found.

CALL = Call(3, 0, 0, 0)


def marks(number: int, count: int = 1, stream: str = "s") -> list[Mark]:
    return [Mark(stream, CALL._replace(number=number), place, count) for place in range(count)]


def told_of(*calls: Sequence[Mark], what: str = "stored", first_id: int = 100) -> Told:
    told = Told()
    event_id = first_id
    for call in calls:
        told.hear(json.dumps(["begun", call[0].call]))
        ids = [[mark.stream, str(event_id + place)] for place, mark in enumerate(call)]
        told.hear(json.dumps([what, call[0].call, ids]))
        event_id += len(call)
    return told


def found(*events: Mark, first_id: int = 100) -> dict[str, list[tuple[int, bytes]]]:
    return {"s": [(first_id + place, payload_of(mark)) for place, mark in enumerate(events)]}


def test_it_is_content_with_what_was_told_and_a_call_that_was_under_way() -> None:
    told = told_of(marks(0, 2), marks(1))
    told.hear(json.dumps(["begun", marks(2)[0].call]))
    told.check(found(*marks(0, 2), *marks(1)))
    told.check(found(*marks(0, 2), *marks(1), *marks(2, 3)))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (found(*marks(0, 2)), "1 events are gone"),
        (found(*marks(0, 2), *marks(1), *marks(2)), "never begun"),
        (found(*marks(0, 2), *marks(1), *marks(1)), "twice"),
        (found(*marks(1), *marks(0, 2)), "comes after"),
        (found(*marks(0, 2), *marks(1), first_id=101), "are gone"),
        ({"s": [(100, payload_of(marks(0)[0])[:-1] + b"?")]}, "never stored"),
        ({"t": found(*marks(0, 2))["s"]}, "never stored"),
    ],
)
def test_it_sees_what_is_wrong(wrong: dict[str, list[tuple[int, bytes]]], why: str) -> None:
    with pytest.raises(BrokenPromiseError, match=why):
        told_of(marks(0, 2), marks(1)).check(wrong)


def test_it_sees_half_of_a_call_and_what_was_shown_and_is_gone() -> None:
    told = Told()
    told.hear(json.dumps(["begun", CALL]))
    with pytest.raises(BrokenPromiseError, match="all or none"):
        told.check(found(*marks(0, 2)[:1]))
    told = told_of(marks(0), what="kept")
    told.check(found())
    told.check(found(*marks(0)))
    with pytest.raises(BrokenPromiseError, match="1 of them only shown"):
        told.check(found())


def test_what_is_in_memory_only_must_be_there_once_all_is_well_and_what_was_refused_must_not() -> None:
    told = told_of(marks(0), what="kept")
    told.hear(json.dumps(["begun", marks(1)[0].call]))
    told.hear(json.dumps(["refused", marks(1)[0].call]))
    told.copy().check(found())
    told.copy().check(found(*marks(1), first_id=101))
    told.hear('["well"]')
    with pytest.raises(BrokenPromiseError, match="gone"):
        told.copy().check(found())
    with pytest.raises(BrokenPromiseError, match="refused"):
        told.copy().check(found(*marks(0), *marks(1)))


def test_retention_may_drop_the_oldest_that_are_too_many_and_no_others() -> None:
    told = told_of(marks(0), marks(1), marks(2))
    told.most_events = 2
    told.copy().check(found(*marks(1), *marks(2), first_id=101))
    with pytest.raises(BrokenPromiseError, match="gone"):
        told.copy().check(found(*marks(2), first_id=102))
    with pytest.raises(BrokenPromiseError, match="gone"):
        told.copy().check({"s": [found(*marks(0))["s"][0], (102, payload_of(marks(2)[0]))]})


def test_what_is_no_line_of_its_own_is_odd() -> None:
    told = Told()
    told.hear("Traceback (most recent call last):")
    assert told.odd == ["Traceback (most recent call last):"]


# What fails.

WRITE = DiskCall("write", "/a/0000000001.journal", tearable=True)
SYNC = DiskCall("sync", "/a/0000000001.journal")
UNLINK = DiskCall("unlink", "/a/b")
READ = DiskCall("read", "/a/b")


@pytest.mark.parametrize(
    ("fault", "fates"),
    [
        (Fault(2, "EIO", "once"), ["go", errno.EIO, "go", "go", "go"]),
        (Fault(2, "EIO", "mended"), ["go", errno.EIO, errno.EIO, "go", errno.EIO]),
        # On a full disk files can be removed, and synced.
        (Fault(1, "ENOSPC", "closed"), [errno.ENOSPC, "go", "go", "go", errno.ENOSPC]),
        (Fault(1, "short", "closed"), ["short", "go", "go", "go", errno.ENOSPC]),
        # A place that cannot be read is one place.
        (Fault(4, "EIO", "closed"), ["go", "go", "go", errno.EIO, "go"]),
    ],
)
def test_a_fault_lasts_as_long_as_it_is_said_to(fault: Fault, fates: list[int | str]) -> None:
    failing = Failing(fault)
    assert [failing.call(call) for call in (WRITE, SYNC, UNLINK, READ, WRITE)] == fates
    failing.mend()
    assert failing.call(WRITE) == "go"


def test_a_second_sync_of_a_file_whose_sync_failed_is_seen() -> None:
    failing = Failing(Fault(2, "EIO", "once"))
    for call in (DiskCall("create", SYNC.path), SYNC, WRITE):
        failing.call(call)
    assert failing.wrongs == []
    failing.call(SYNC)
    assert failing.wrongs == ["0000000001.journal"]
