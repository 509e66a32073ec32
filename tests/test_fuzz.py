"""A slice of the fuzz campaign, and that it sees what it is to see: a crash, a hang, a memory bomb, something wrong."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crash
from crash_fuzz import TARGETS, FuzzCampaign
from crash_fuzz_feeding import draw
from crash_fuzz_inputs import Target
from logstore.errors import LogstoreError

IN_PROCESS = ["header", "frames", "journal", "segment", "export", "names", "messages", "session-data"]
"""Parsers that touch nothing but what they are given."""


@functools.cache
def made(name: str) -> Target:
    return TARGETS[name]()


@pytest.mark.parametrize("name", IN_PROCESS)
@settings(derandomize=True, max_examples=25, database=None)
@given(st.integers(0, (1 << 32) - 1))
def test_a_parser_takes_an_input_or_refuses_it(name: str, number: int) -> None:
    target = made(name)
    try:
        target.feed(draw(target, 1, number))
    except LogstoreError as error:
        str(error).encode()


@pytest.mark.parametrize("name", IN_PROCESS)
def test_an_input_is_drawn_from_seed_and_number_alone(name: str) -> None:
    target = made(name)
    again = TARGETS[name]()
    inputs = [draw(target, 7, number) for number in (3, 1, 2, 3)]
    assert inputs == [draw(again, 7, number) for number in (3, 1, 2, 3)]
    assert inputs[0] == inputs[3]
    assert draw(target, 8, 3) != inputs[0]
    again.close()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_every_parser_is_fed_a_few_inputs_by_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    done = run(crash.__file__, "fuzz", "--seed", "5", "--inputs", "20", "--folder", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    # Those of which an input takes a second are left out of so short a campaign.
    left_out = [name for name in TARGETS if f"  {name}: refused" not in done.stdout]
    assert left_out == ["large-files", "long-json", "store"]
    assert not folder.exists()


def test_a_parser_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="frames, journal"):
        FuzzCampaign(tmp_path, 1, target="nothing")


FAULTY = """
import ctypes, sys, time
sys.path.insert(0, {tools!r})
import crash_fuzz_feeding
from crash_fuzz_inputs import MIB, Input, Target
from crash_kill import BrokenPromiseError
from logstore.errors import DamageError

class Faulty(Target):
    name = "faulty"
    cpu_s = 0.3
    memory_bytes = 64 * MIB

    def draw(self, rng):
        return Input(rng.randbytes(4))

    def feed(self, given):
        number, self.number = self.number, self.number + 1
        if number == 1:
            raise DamageError(None, 0, 0, "refused, as it should be")
        if number == 2:
            [][1]
        if number == 3:
            while True:
                pass
        if number == 4:
            bytes(1 << 32)
        if number == 5:
            raise BrokenPromiseError("something wrong was taken")
        if number == 6:
            deep = lambda: deep()
            deep()
        if number == 7:
            ctypes.string_at(0)
        return True

    number = 0

# Another process goes on behind the one that died, from the beginning: it meets all of it again but that.
found = crash_fuzz_feeding.feed(Faulty, 1, 0, 9)
print(found.taken, found.refused)
for failure in found.failures:
    print(failure.number, failure.kind.partition(" at ")[0])
"""


def test_it_sees_each_way_to_fail_and_goes_on() -> None:
    done = run("-c", FAULTY.format(tools=str(Path(crash.__file__).parent)))
    said = done.stdout.splitlines()
    assert said[1:] == [
        "2 IndexError",
        "3 TooSlowError",
        *(["4 MemoryError"] if sys.platform == "linux" else []),
        "5 BrokenPromiseError",
        "6 RecursionError",
        "7 was killed by SIGSEGV",
    ], done.stdout + done.stderr
    # One more was fed to the second process.
    assert said[0] == "2 1"
