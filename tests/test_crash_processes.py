"""A slice of the campaign of many processes, and that it sees what it is to see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import crash
from crash_kill import BrokenPromiseError
from crash_ledger import ID_BYTES, RECORD, Ledger, Mark, Track, mark_of, payload_of

SIZES = ("--events", "4000", "--kills", "6", "--processes", "3", "--seed", "3")

CAMPAIGN = """
import sys
import crash
sys.exit(crash.main(sys.argv[1:]))
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(crash.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def play(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run(script, "processes", *SIZES, "--folder", str(folder))


@pytest.mark.slow
def test_many_processes_are_killed_and_nothing_is_lost(tmp_path: Path) -> None:
    done = play(CAMPAIGN, tmp_path / "stores")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 runs" in done.stdout


FORGETFUL = """
from logstore.storage import recovery
scan_journal = recovery.scan_journal

def forgetful(*arguments):
    scan = scan_journal(*arguments)
    for column in (scan.ids, scan.streams, scan.frames):
        del column[len(column) // 2 :]
    return scan

recovery.scan_journal = forgetful
"""


@pytest.mark.slow
def test_the_campaign_sees_that_recovery_forgets_events(tmp_path: Path) -> None:
    done = play(FORGETFUL + CAMPAIGN, tmp_path / "stores")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED in run 0" in done.stdout


# What a reader sees.


def events(*numbers: int, life: int = 1, first_id: int = 101) -> list[tuple[int, bytes]]:
    marks = [Mark(0, life, number, number, 1) for number in numbers]
    return [(first_id + place, payload_of(mark)) for place, mark in enumerate(marks)]


def track(*seen: tuple[int, bytes], whole: bool = True) -> None:
    reader = Track(0, whole=whole)
    for event in seen:
        reader.take(*event)


def test_a_reader_is_content_with_one_life_after_another() -> None:
    track(*events(0, 1), *events(0, 1, life=2, first_id=201))
    track(*events(7, 8), *events(0, 1, life=2, first_id=201), whole=False)


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (events(0, 2), "comes without number 1"),
        (events(1), "comes without number 0"),
        (events(0, 0), "is there twice"),
        ([*events(0, 1), *events(1, life=2, first_id=201)], "comes without number 0"),
        ([*events(0), *events(1, first_id=90)], "comes after event 101"),
        ([*events(0), *events(0, life=2, first_id=201), *events(1, first_id=301)], "comes after those of life 2"),
        ([(101, payload_of(Mark(1, 1, 0, 0, 1)))], "never stored there"),
        ([(101, payload_of(Mark(0, 1, 0, 0, 1))[:-1] + b"?")], "never stored there"),
        ([(101, b"something else")], "never stored there"),
    ],
)
def test_a_reader_sees_what_is_wrong(seen: list[tuple[int, bytes]], why: str) -> None:
    with pytest.raises(BrokenPromiseError, match=why):
        track(*seen)


def test_payloads_say_what_they_are() -> None:
    marks = [Mark(stream, 3, number, number // 2, 2) for stream in (0, 5) for number in range(2_000)]
    assert [mark_of(payload_of(mark)) for mark in marks] == marks
    assert max(len(payload_of(mark)) for mark in marks) > 10_000


# What is compared in the end.


def report(*lines: tuple[int, int], of: int = 1) -> bytes:
    return b"".join(RECORD.pack(0, of, call, event_id) for call, event_id in lines)


@pytest.fixture
def ledger() -> Ledger:
    """Life 1 was killed after two calls, life 2 lives."""
    known = Ledger(slots=1)
    known.learn(1, report((0, 101), (1, 102)))
    known.learn(2, report((0, 201)))
    known.ended.add(1)
    return known


def compare(ledger: Ledger, *stored: tuple[int, bytes]) -> int:
    return ledger.check_task(0, lambda stream: stored if stream == 0 else ())


GOOD = [*events(0, 1), *events(0, life=2, first_id=201)]


def test_the_ledger_is_content_with_what_was_acknowledged_and_more(ledger: Ledger) -> None:
    assert compare(ledger, *GOOD) == 3
    # The call that was under way when its process died; what one that lives has written since, and another.
    later = [*events(0, 1, 2, life=2, first_id=201), *events(0, life=3, first_id=301)]
    assert compare(ledger, *events(0, 1, 2), *later) == 7


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        ([*GOOD[:1], *GOOD[2:]], "1 acknowledged events of slot0/stream0 by life 1 are gone, the last of them 102"),
        (GOOD[:2], "1 acknowledged events of slot0/stream0 by life 2 are gone"),
        ([*events(0, 1, first_id=102), *GOOD[2:]], "was acknowledged as 101"),
        ([*events(0, 1, 2, 3), *GOOD[2:]], "the last call that was reported is 1"),
        ([*GOOD[:2], (103, payload_of(Mark(0, 1, 2, 2, 2))), *GOOD[2:]], "1 of the 2 events"),
        ([*GOOD[:2], (103, payload_of(Mark(0, 1, 2, 3, 1))), *GOOD[2:]], "the last call that was reported is 1"),
    ],
)
def test_the_ledger_sees_what_is_wrong(ledger: Ledger, stored: list[tuple[int, bytes]], why: str) -> None:
    with pytest.raises(BrokenPromiseError, match=why):
        compare(ledger, *stored)


def test_the_ledger_knows_that_a_report_may_end_within_a_call(ledger: Ledger) -> None:
    assert ledger.learn(1, report((2, 103), of=2) + b"half a line") == RECORD.size
    whole = [(101 + number, payload_of(Mark(0, 1, number, min(number, 2), 1 + (number >= 2)))) for number in range(4)]
    assert compare(ledger, *whole, *GOOD[2:]) == 5
    with pytest.raises(BrokenPromiseError, match="1 of the 2 events"):
        compare(ledger, *whole[:3], *GOOD[2:])


@pytest.mark.parametrize(
    ("after", "ids", "why"),
    [
        (0, [101, 102, 201], None),
        (102, [201], None),
        (101, [], None),
        (0, [101, 102, 103], "was shown what is not there"),
        (0, [101, 201], "was shown what is not there"),
        (101, [201], "was not shown event 102"),
        (0, [102], "was not shown event 101"),
        (102, [201, 202], "was shown what is not there"),
    ],
)
def test_the_ledger_sees_what_a_follower_missed_and_what_is_gone(
    ledger: Ledger, after: int, ids: Sequence[int], why: str | None
) -> None:
    shown = b"".join(event_id.to_bytes(ID_BYTES, "little") for event_id in ids)
    assert ledger.learn_shown(0, after, shown + b"\0") == len(ids)
    if why is None:
        compare(ledger, *GOOD)
    else:
        with pytest.raises(BrokenPromiseError, match=why):
            compare(ledger, *GOOD)


def test_the_ledger_sees_an_id_that_was_given_twice(ledger: Ledger) -> None:
    ledger.check_ids()
    ledger.learn(3, report((0, 301), (1, 102)))
    with pytest.raises(BrokenPromiseError, match="id 102 of lane 0 was given out twice"):
        ledger.check_ids()
    other = Ledger(slots=1)
    other.learn(1, report((0, 1), (1, 1 << 11)))
    with pytest.raises(BrokenPromiseError, match="ids of lanes"):
        other.check_ids()


# How processes end.

FORKS = """
import logging, os, sys, time
from pathlib import Path
from crash_forked import Forked
from crash_kill import BrokenPromiseError

works = {
    "works": lambda: None,
    "hangs": lambda: time.sleep(600),
    "raises": lambda: 1 / 0,
    "exits": lambda: os._exit(3),
    "complains": lambda: logging.getLogger("logstore").error("it is damaged"),
}
for name, work in works.items():
    process = Forked(name, Path(sys.argv[1]) / name, work)
    if name == "hangs":
        process.kill()
    process.wait(30)
    try:
        process.check()
    except BrokenPromiseError as error:
        print(*str(error).splitlines())
    else:
        print(name, "well")
"""


def test_a_process_that_ends_by_itself_or_complains_is_seen(tmp_path: Path) -> None:
    works, hangs, raises, exits, complains = run(FORKS, str(tmp_path)).stdout.splitlines()
    assert (works, hangs) == ("works well", "hangs well")
    assert raises.startswith("raises ended with 1:")
    assert raises.endswith("ZeroDivisionError: division by zero")
    assert exits == "exits ended with 3:"
    assert complains == "complains ended with 0: ERROR it is damaged"
