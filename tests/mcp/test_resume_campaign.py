"""The resume campaign: that it runs, finds nothing, and would find what is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import crash
from crash_kill import BrokenPromiseError
from crash_resume import check_notes
from tests.mcp.rig_client import Account, Call

SCRIPT = Path(crash.__file__)


@pytest.mark.promise("resume-exact", "never-sent-twice")
@pytest.mark.slow
def test_clients_over_many_workers_lose_nothing_while_connections_and_workers_break(tmp_path: Path) -> None:
    sizes = ("--calls", "80", "--clients", "8", "--workers", "3")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "resume", *sizes, "--seed", "11", "--folder", str(tmp_path / "stores")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 runs" in done.stdout
    assert "seed 11" in done.stdout


def announced(name: str, to: int, *, died: bool = False) -> Call:
    call = Call(name)
    if died:
        call.error = {"message": "gone"}
    else:
        call.result = {"content": [{"text": f"{name} announced {to}"}]}
    return call


CALLS = [announced("a", 2), announced("b", 3), announced("c", 3, died=True), announced("d", 1)]


@pytest.mark.parametrize("texts", ["", "a1 a2 b1 b2 b3 d1", "a2 b1 b2 b3 c1 c2 d1", "b3 c1 d1", "d1"])
def test_notes_may_begin_late_and_lack_what_a_dead_worker_did_not_say(texts: str) -> None:
    check_notes(notes(texts), CALLS)


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ("a1 b1 b2 b3 d1", "of a came"),
        ("a1 a2 d1", "of b came"),
        ("a1 a2 b1 b3 d1", "of b came"),
        ("a1 a2 b1 b2 b3 c2 d1", "of c came"),
        ("a1 a2 b1 b2 b3", "of d came"),
        ("a1 a2 b1 b2 b3 d1 e1", "nobody of this session"),
        ("a1 a2 a2 b1 b2 b3 d1", "of a came"),
    ],
)
def test_a_note_that_is_missing_or_twice_is_seen(texts: str, why: str) -> None:
    with pytest.raises(BrokenPromiseError, match=why):
        check_notes(notes(texts), CALLS)


def notes(texts: str) -> Account:
    return Account("n", texts=[f"note://{text[0]}/{text[1]}" for text in texts.split()])
