"""The crash campaigns: that they run, find nothing, and find what is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import crash
from crash_kill import BrokenPromiseError, Oracle
from crash_writer import Call, Mark, payload_of

SCRIPT = Path(crash.__file__)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.promise("kill-loses-nothing", "crash-opens", "all-or-none", "order")
def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    done = run("kill", "--runs", "16", "--seed", "11", "--folder", str(tmp_path / "stores"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 of 16 runs" in done.stdout
    assert "seed 11" in done.stdout


def test_it_says_how_to_use_it() -> None:
    done = run("kill", "--help")
    assert done.returncode == 0
    assert "--seed" in done.stdout
    assert run("nothing").returncode == 2
    assert run().returncode == 2


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


CALL = Call(0, 0, 0, 0)


def mark(number: int, place: int = 0, of: int = 1) -> Mark:
    return Mark("slot0/stream0", CALL._replace(number=number), place, of)


def events(*marks: Mark) -> list[tuple[int, bytes]]:
    return [(100 + place, payload_of(each)) for place, each in enumerate(marks)]


def found(oracle: Oracle, stored: list[tuple[int, bytes]]) -> int:
    return oracle.check({"slot0/stream0": stored})


def acknowledge(oracle: Oracle, tmp_path: Path, *marks: Mark) -> None:
    lines = [
        f'[{list(each.call)}, [["{each.stream}", "{100 + place}"]]]\n'.replace("'", '"')
        for place, each in enumerate(marks)
    ]
    told = tmp_path / "told"
    told.write_text("ready\n" + "".join(lines))
    oracle.learn(told)


def test_the_oracle_is_content_with_what_was_told(oracle: Oracle, tmp_path: Path) -> None:
    acknowledge(oracle, tmp_path, mark(0), mark(1))
    assert found(oracle, events(mark(0), mark(1))) == 0
    # The call that was under way when the writer died.
    assert found(oracle, events(mark(0), mark(1), mark(2))) == 1


GOOD = events(mark(0), mark(1))


@pytest.mark.promise("all-or-none")
@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (GOOD[:1], "gone"),
        ([*GOOD, (102, GOOD[1][1])], "twice"),
        ([(100, GOOD[1][1]), (101, GOOD[0][1])], "and was"),
        ([GOOD[1], GOOD[0]], "comes after"),
        ([GOOD[0], (101, GOOD[1][1][:-1] + b"?")], "never stored"),
        (events(mark(0), mark(1), mark(3)), "last acknowledged call"),
        (events(mark(0), mark(1), mark(2, 0, 2)), "all or none"),
    ],
)
def test_the_oracle_sees_what_is_wrong(
    oracle: Oracle, tmp_path: Path, wrong: list[tuple[int, bytes]], why: str
) -> None:
    acknowledge(oracle, tmp_path, mark(0), mark(1))
    with pytest.raises(BrokenPromiseError, match=why):
        found(oracle, wrong)


def test_the_oracle_sees_an_event_that_was_shown_and_is_gone(oracle: Oracle, tmp_path: Path) -> None:
    acknowledge(oracle, tmp_path, mark(0))
    found(oracle, events(mark(0), mark(1)))
    with pytest.raises(BrokenPromiseError, match="shown"):
        found(oracle, events(mark(0)))


@pytest.mark.promise("ids-never-twice")
def test_the_oracle_sees_an_id_that_was_given_twice(oracle: Oracle, tmp_path: Path) -> None:
    acknowledge(oracle, tmp_path, mark(0))
    with pytest.raises(BrokenPromiseError, match="was given to"):
        acknowledge(oracle, tmp_path, mark(1))
