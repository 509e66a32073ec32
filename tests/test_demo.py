"""The demonstration as a user runs it, what it does when something goes wrong, and its account of events."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from logstore.cli.demo.account import Entry, problems_in

DEADLINE_S = 60.0
TEXTS = ["step 1", "step 2", "step 3", "counted 3 steps"]
EVENTS = [Entry(str(10 + place), text) for place, text in enumerate(TEXTS)]


@contextlib.contextmanager
def demo(tmp_path: Path, *arguments: str) -> Generator[subprocess.Popen[str]]:
    """Run the demonstration, with its temporary folders in a folder of ours."""
    with subprocess.Popen(
        [sys.executable, "-m", "logstore", "demo", *arguments],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def output_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert "Traceback" not in output
    return output


def server_of(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Wait for the server to be up; return its process id and port."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"process (\d+), port (\d+)", line):
            return int(found[1]), int(found[2])
    raise AssertionError("the server never came up")


def ends(port: int) -> bool:
    """Whether nobody listens on a port any more, soon."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_it_loses_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        output = output_of(process)
    assert process.returncode == 0, output
    assert "20 progress reports and a result were stored, received and read back" in output
    assert "nothing lost, nothing doubled" in output
    assert "resets the client's" in output
    assert "goes on and stores steps 7 to 13; the client still knows 6" in output
    assert re.search(r"GET with Last-Event-ID \d+, which is step 6\n", output)
    assert "receives steps 14 to 20 and the result, live again" in output
    assert "arrives at the other server" in output
    assert "and receives step 1 and the result, without initializing again" in output
    assert max(len(line) for line in output.splitlines() if str(tmp_path) not in line) <= 80
    assert list(tmp_path.iterdir()) == []


def test_a_kept_store_can_be_looked_at_with_the_commands_it_printed(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with demo(tmp_path, "--events", "3", "--dir", str(folder)) as process:
        output = output_of(process)
    assert process.returncode == 0, output
    commands = re.findall(r"^ +\$ (\S*sqlite-utils rows .*?[^\\])$", output, re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    for command in commands:
        words = command.partition(" ")[2]
        shown = subprocess.check_output(f"{sys.executable} -m sqlite_utils {words}", shell=True, text=True)
        assert len(shown.splitlines()) >= 3
        assert all(line.rstrip() in output for line in shown.splitlines())
    assert (folder / "server.log").exists()


def test_two_demonstrations_may_use_one_folder(tmp_path: Path) -> None:
    for _ in range(2):
        with demo(tmp_path, "--events", "3", "--dir", str(tmp_path / "kept")) as process:
            output = output_of(process)
        assert process.returncode == 0, output


def test_a_server_that_dies_in_the_middle_is_a_failure_and_its_files_stay(tmp_path: Path) -> None:
    with demo(tmp_path, "--events", "50000") as process:
        pid, _ = server_of(process)
        os.kill(pid, signal.SIGKILL)
        output = output_of(process)
    assert process.returncode == 1, output
    assert "To look into it" in output
    (folder,) = tmp_path.iterdir()
    assert {"client.log", "events.db", "server.log"} <= {path.name for path in folder.iterdir()}


def test_an_interrupt_ends_the_server_and_removes_the_folder(tmp_path: Path) -> None:
    with demo(tmp_path, "--events", "50000") as process:
        _, port = server_of(process)
        process.send_signal(signal.SIGINT)
        output = output_of(process)
    assert process.returncode == 1
    assert "Aborted!" in output
    assert ends(port)
    assert list(tmp_path.iterdir()) == []


def test_the_server_ends_when_the_demonstration_is_killed(tmp_path: Path) -> None:
    with demo(tmp_path, "--events", "50000") as process:
        _, port = server_of(process)
        process.kill()
        assert ends(port)


def test_a_folder_that_cannot_hold_a_store_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "events.db").mkdir()
    with demo(tmp_path, "--dir", str(tmp_path)) as process:
        output = output_of(process)
    assert process.returncode == 1
    assert f"{tmp_path / 'events.db'} is a folder" in output


def problems(*, server: list[Entry] = EVENTS, client: list[Entry] = EVENTS, disk: list[Entry] = EVENTS) -> list[str]:
    return problems_in(TEXTS, {"server": server, "client": client, "disk": disk})


def test_the_account_finds_nothing_where_all_agree() -> None:
    assert problems() == []


@pytest.mark.parametrize("place", range(len(EVENTS)))
def test_the_account_finds_a_lost_event(place: int) -> None:
    found = problems(client=EVENTS[:place] + EVENTS[place + 1 :])
    assert found == [f"client: 1 lost: {TEXTS[place]!r}"]


@pytest.mark.parametrize("place", range(len(EVENTS)))
def test_the_account_finds_a_doubled_event(place: int) -> None:
    found = problems(disk=[*EVENTS[: place + 1], *EVENTS[place:]])
    assert found == [f"disk: 1 doubled: {TEXTS[place]!r}"]


def test_the_account_finds_events_out_of_order() -> None:
    found = problems(client=[EVENTS[1], EVENTS[0], *EVENTS[2:]])
    assert found == ["client: out of order: 'step 2' came where 'step 1' belongs"]


def test_the_account_finds_an_event_that_nobody_sent() -> None:
    assert problems(disk=[*EVENTS, Entry("99", "step 99")]) == ["disk: 1 that nobody sent: 'step 99'"]


def test_the_account_finds_an_event_under_another_id() -> None:
    found = problems(client=[EVENTS[0], Entry("99", TEXTS[1]), *EVENTS[2:]])
    assert found == ["client: 1 under another event id: 'step 2' as 99, for server it is 11"]


def test_the_account_finds_an_id_given_to_two_events() -> None:
    twice = [EVENTS[0], Entry(EVENTS[0].event_id, TEXTS[1]), *EVENTS[2:]]
    assert problems(server=twice, client=twice, disk=twice) == ["server: one event id stands for several events"]


def test_the_account_names_all_witnesses_of_a_loss_and_a_few_of_the_lost() -> None:
    assert problems(client=[], disk=EVENTS[:3]) == [
        "client: 4 lost: 'step 1', 'step 2', 'step 3' and 1 more",
        "disk: 1 lost: 'counted 3 steps'",
    ]
