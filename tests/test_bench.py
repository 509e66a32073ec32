"""Each benchmark runs, at the smallest size and with this store only, and its claims are read off its own figures."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import (
    append,
    beside,
    opening,
    operating,
    payloads,
    reindex,
    replay,
    server,
    streams,
    sustained,
    workers,
)
from bench.__main__ import BENCHMARKS
from bench.benchmark import Benchmark
from bench.claims import Claim, Verdict, claims_table
from bench.command import run
from bench.messages import message_of, wire_bytes
from bench.peers import PEERS, Peer, memory
from bench.turns import Place, Round, Rows, Task, take_turns, typical

OURS = "logstore always"
SMALLEST: dict[str, Callable[[Path], Rows]] = {
    "append": lambda folder: append.append(folder, OURS, 0.01, (1, 16)),
    "append, bare": lambda folder: append.bare(folder, 0.01, (1, 16)),
    "payloads": lambda folder: payloads.append(folder, OURS, 0.01, (100, 10_000)),
    "streams": lambda folder: streams.append(folder, OURS, 384),
    "bursts": lambda folder: sustained.bursts(folder, 1, 256),
    "sustained": lambda folder: sustained.sustained(folder, 768, 3, 10),
    "replay from memory": lambda folder: replay.ours(folder, False, 0.01),
    "replay from disk": lambda folder: replay.ours(folder, True, 0.01),
}


def floats(rows: Rows) -> list[float]:
    return [value for figures in rows.values() for value in figures.values() if not isinstance(value, list)]


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_size_of_a_benchmark_gives_figures(name: str, tmp_path: Path) -> None:
    found = floats(SMALLEST[name](tmp_path))
    assert found
    assert all(math.isfinite(value) and value >= 0 for value in found)


def test_what_needs_processes_runs_in_its_own_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    smallest = {
        "opening": Task(opening.reopen, (1 << 20,)),
        "reindex": Task(reindex.measure, (2_000,)),
        "operating": Task(operating.operate, (1_000,)),
        "beside": Task(beside.appends, (beside.backed_up, 1_000, 0.05)),
        "server": Task(server.calls, (OURS, 16, (1,))),
        "pair": Task(server.pair, (OURS, 1, 16, (1,))),
        "workers": Task(workers.append, (OURS, 0.05, (1, 2))),
    }
    rounds, failed = take_turns(smallest, dict.fromkeys(smallest, 1), tmp_path, "smallest")
    assert not failed, capfd.readouterr().err
    assert {name: bool(floats(rows)) for name, rows in rounds[0].items()} == dict.fromkeys(smallest, True)
    assert not list(tmp_path.iterdir())


def test_every_claim_names_a_figure_that_its_benchmark_measures() -> None:
    for benchmark in BENCHMARKS:
        tasks = benchmark.tasks(True)
        for claim in benchmark.claims:
            assert claim.tasks <= set(tasks), claim.words


@pytest.mark.parametrize("size", [100, 600, 1_000_000])
def test_a_message_has_the_size_that_was_asked_for(size: int) -> None:
    assert len(wire_bytes(message_of(size))) == size


# Claims.

FAST, SLOW = Place("fast", "", "events_s"), Place("slow", "", "events_s")


def rounds_of(*pairs: tuple[float, float]) -> list[Round]:
    return [{"fast": {"": {"events_s": fast}}, "slow": {"": {"events_s": slow}}} for fast, slow in pairs]


def test_a_ratio_is_formed_within_each_round_and_its_median_counts() -> None:
    claim = Claim("rate", of=FAST, relation=">=", must=6, goal=8, to=SLOW)
    # A slow minute of the machine hits both; the ratio of the medians would be 20.
    rounds = rounds_of((70, 10), (2_000, 100), (600, 100))
    assert claim.values(rounds) == [7, 20, 6]
    assert Verdict(claim, claim.values(rounds)).value == 7
    assert typical(rounds, FAST) == 600


@pytest.mark.parametrize(("ratio", "word"), [(5.9, "NO"), (6.0, "yes"), (8.0, "goal")])
def test_a_verdict_tells_must_from_goal(ratio: float, word: str) -> None:
    claim = Claim("rate", of=FAST, relation=">=", must=6, goal=8, to=SLOW)
    verdict = Verdict(claim, [ratio])
    assert verdict.word == word
    assert word in claims_table([verdict])


def test_what_was_not_measured_neither_holds_nor_fails() -> None:
    claim = Claim("memory", of=Place("fast", "", "peak_mb"), relation="<=", must=250)
    assert Verdict(claim, claim.values(rounds_of((1, 1)))).word == "not measured"


# The command line.


def fine(folder: Path) -> Rows:
    return {"": {"events_s": 7.0, "course": [1.0, 2.0]}}


def broken(folder: Path) -> Rows:
    raise OSError("the disk is gone")


def test_what_is_not_installed_is_left_out_and_what_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PEERS, "absent", Peer(memory.dict_store, "memory", "#000000", modules=("not_installed",)))
    monkeypatch.setitem(PEERS, "no server", Peer(memory.dict_store, "memory", "#000000", program="no-such-server"))
    tasks = {
        "fine": Task(fine),
        "broken": Task(broken),
        "absent": Task(fine, (), ("absent",)),
        "no server": Task(fine, (), ("no server",)),
    }
    claim = Claim("rate", of=Place("fine", "", "events_s"), relation=">=", must=5)
    results = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--dir", str(tmp_path), "--json", str(results)])
    with pytest.raises(SystemExit, match="broken"):
        run([Benchmark("small", "something small", lambda full: tasks, (claim,))], "bench")
    told = capsys.readouterr().out
    assert "left out: absent: not_installed is not installed" in told
    assert "left out: no server: there is no no-such-server" in told
    assert "FAILED: broken: OSError: the disk is gone" in told
    written = json.loads(results.read_text())
    assert written["machine"]["python"]
    small = written["benchmarks"]["small"]
    assert small["rounds"] == [{"fine": {"": {"events_s": 7.0, "course": [1.0, 2.0]}}}]
    assert [(each["values"], each["holds"]) for each in small["claims"]] == [([7.0], "yes")]
