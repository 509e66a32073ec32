"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from bench.benchmark import Benchmark
from bench.claims import Verdict, claims_table
from bench.machine import machine
from bench.peers import missing
from bench.tables import results_table
from bench.turns import Round, Task, take_turns


def run(benchmarks: Sequence[Benchmark], program: str) -> None:
    """Run what the command line asks for, print it, and exit with 1 when something could not be measured."""
    arguments = _parser(benchmarks, program).parse_args()
    chosen = [each for each in benchmarks if each.name in (arguments.only or [each.name])]
    report: dict[str, Any] = {"machine": machine(arguments.dir), "full": arguments.full, "benchmarks": {}}
    verdicts: list[Verdict] = []
    failed: list[str] = []
    if not arguments.full:
        print("A quick run. What must hold is meant for --full.")
    for benchmark in chosen:
        tasks, left_out = _choose(benchmark, arguments)
        turns = benchmark.rounds(tasks, arguments.full, arguments.rounds)
        rounds, problems = take_turns(tasks, turns, arguments.dir, benchmark.name)
        failed += problems
        _tell(benchmark, rounds, left_out, problems)
        # Of what was left out on purpose nothing is said.
        of_these = [verdict for verdict in benchmark.verdicts(rounds) if verdict.claim.tasks & set(tasks)]
        verdicts += of_these
        report["benchmarks"][benchmark.name] = {
            "title": benchmark.title,
            "rounds": rounds,
            "left_out": left_out,
            "failed": problems,
            "claims": [{**asdict(each.claim), "values": each.values, "holds": each.word} for each in of_these],
        }
        _draw(benchmark, rounds, arguments.pictures)
        if arguments.json:
            arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if verdicts:
        print(f"\n{claims_table(verdicts)}")
    if failed:
        sys.exit(f"failed, see above: {', '.join(failed)}")


def _choose(benchmark: Benchmark, arguments: argparse.Namespace) -> tuple[dict[str, Task], dict[str, str]]:
    """Return the tasks to perform, and why others are left out."""
    tasks = benchmark.tasks(arguments.full)
    if arguments.case:
        words = [case.casefold() for case in arguments.case]
        tasks = {name: task for name, task in tasks.items() if any(word in name.casefold() for word in words)}
    left_out = {name: why for name, task in tasks.items() if (why := missing(task.peers))}
    return {name: task for name, task in tasks.items() if name not in left_out}, left_out


def _tell(benchmark: Benchmark, rounds: list[Round], left_out: Mapping[str, str], failed: Mapping[str, str]) -> None:
    print(f"\n{benchmark.name}: {benchmark.title}\n")
    print(results_table(rounds))
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    for name, why in failed.items():
        print(f"FAILED: {name}: {why}")
    sys.stdout.flush()


def _draw(benchmark: Benchmark, rounds: list[Round], folder: Path | None) -> None:
    if folder is None or benchmark.draw is None or not any(rounds):
        return
    if importlib.util.find_spec("matplotlib") is None:
        print("left out: the picture: matplotlib is not installed; the extra `bench` has it")
        return
    for path in benchmark.draw(rounds, folder):
        print(f"drawn: {path}")


def _parser(benchmarks: Sequence[Benchmark], program: str) -> argparse.ArgumentParser:
    description = benchmarks[0].title if len(benchmarks) == 1 else "Measure this store beside its peers."
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--full", action="store_true", help="at full size: what must hold is meant for this")
    names = [benchmark.name for benchmark in benchmarks]
    parser.set_defaults(only=None)
    if len(names) > 1:
        parser.add_argument("--only", action="append", choices=names, help="only this benchmark; may be repeated")
    parser.add_argument("--case", action="append", metavar="WORDS", help="only tasks with these words in their name")
    parser.add_argument("--rounds", type=int, metavar="N", help="how many turns each contender has")
    parser.add_argument(
        "--dir", type=Path, default=Path(), help="where stores are written and removed again: on a real disk"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure of every round to FILE")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="also draw the results into FOLDER, as SVG")
    return parser
