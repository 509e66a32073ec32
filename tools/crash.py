#!/usr/bin/env python3
"""Break a store on purpose and look whether it keeps its promises: `python tools/crash.py kill --runs 200 --seed 1`.

Each campaign draws everything from its seed. A replay repeats every choice; at which instruction a process dies when
the clock decides it, not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol

try:
    from crash_backup import BackupCampaign
    from crash_damage import DamageCampaign
    from crash_errors import ErrorsCampaign
    from crash_fuzz import TARGETS, FuzzCampaign
    from crash_kill import BrokenPromiseError, KillCampaign
    from crash_mutation import MutationCampaign
    from crash_mutations import MUTATIONS
    from crash_points import PointsCampaign
    from crash_power import PowerCampaign
    from crash_processes import ProcessesCampaign
    from crash_resume import ResumeCampaign
    from crash_sdk_client import SdkCampaign
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}. Run  python3 tools/check.py --fast  once, then this with .venv/bin/python") from None


class _Campaign(Protocol):
    """What breaks a store and looks."""

    figures: Counter[str]

    def run(self, number: int) -> None:
        """Do one run."""
        ...

    def finish(self) -> None:
        """Look once more, after the last run."""
        ...


class _Kind(NamedTuple):
    """A campaign as the command line offers it.

    Attributes:
        campaign: Makes one of a folder and a seed.
        counted: Which figure tells how far it is.
        promise: What is said when it was kept.
        summary: One line of help.
        description: More of it.
        runs: How many, when nothing is said.
        sizes: What else can be chosen, each with its default; keyword arguments of `campaign`.
    """

    campaign: Callable[..., _Campaign]
    counted: str
    promise: str
    summary: str
    description: str
    runs: int = 200
    sizes: Mapping[str, int | str] = MappingProxyType({})


_KINDS: Final = {
    "kill": _Kind(
        KillCampaign,
        "events acknowledged",
        "every acknowledged event was there, once, in order, with its payload; no id was given out twice",
        "writing processes killed at random moments",
        "Kill writing processes at random moments, open the store again, and look for what was lost.",
    ),
    "backup": _Kind(
        BackupCampaign,
        "events compared",
        "every backup held all that was acknowledged when it was begun, nothing else, of each stream a prefix",
        "backups while more than a hundred writers append in several processes",
        "Back up a store under load over and over, restore each backup elsewhere, and compare event by event.",
    ),
    "damage": _Kind(
        DamageCampaign,
        "damages",
        "all damage to content was reported, nothing was served that had not been stored, no command broke",
        "random places of files damaged, and everything asked of the store",
        "Damage a copy of a store over and over, in one place or several; verify it, read it, open it, repair it.",
    ),
    "processes": _Kind(
        ProcessesCampaign,
        "events acknowledged",
        "every acknowledged event was there, once, in order, with its payload, and so was every event that a follower "
        "was shown; followers missed none; no id was given out twice; no process ended but by its kill, or as told",
        "many processes on one store, killed at random over and over",
        "Have processes write, read and follow on one store, kill them at random over and over, compact, back up, "
        "verify and index it again meanwhile, and compare with what was acknowledged.",
        runs=1,
        sizes={"events": 300_000, "kills": 60, "processes": 8},
    ),
    "mutation": _Kind(
        MutationCampaign,
        "mutations caught",
        "whatever was taken out of the code, something failed",
        "each sync, order, comparison and lock taken out of the code in turn, which something must notice",
        "Break a copy of the durability code, one thing at a time, and look whether the proof named for it fails.",
        runs=len(MUTATIONS),
        sizes={"only": ""},
    ),
    "points": _Kind(
        PointsCampaign,
        "kills",
        "every acknowledged event was there, once, in order, with its payload; nothing that was shown was gone; every "
        "store opened by itself and verified well; of backups and restores the old or the new was whole",
        "a process killed at every change of its disk, in eight kinds of work",
        "Kill a process at the n-th system call that changes its disk, SQLite's included, for every n.",
        runs=4000,
        sizes={"only": ""},
    ),
    "errors": _Kind(
        ErrorsCampaign,
        "faults",
        "no process broke; each error was clear, and work went on once the disk was well again; nothing that was "
        "acknowledged as durable was lost",
        "every system call on the store's files made to fail, in eight kinds of work",
        "Have the n-th system call on the store's files fail, SQLite's included: EIO, ENOSPC, a short write; once, "
        "until the disk is mended, or to the end.",
        runs=4000,
        sizes={"only": ""},
    ),
    "power": _Kind(
        PowerCampaign,
        "power cuts",
        "whatever a power cut left, every event that was on disk was there, once, in order, and so were sessions and "
        "backups; no lane had a hole, no id was given out twice, nothing was taken for damage",
        "power cuts at random calls to the disk, of a store in use and of one that is being recovered",
        "Cut the power of a simulated disk over and over, open what it may have left, and look for what was lost. The "
        "files are real and never synced: a folder in memory (/dev/shm) makes it faster.",
    ),
    "resume": _Kind(
        ResumeCampaign,
        "calls",
        "every call ended with its exact result, or the error of a worker that had died, or was cut off before its "
        "first id; every report came once, in order; every session lived on",
        "many clients over many workers; connections cut, workers killed",
        "Cut connections every few hundred milliseconds and kill a worker every few seconds, while clients call.",
        runs=1,
        sizes={"calls": 1000, "clients": 50, "workers": 4},
    ),
    "sdk": _Kind(
        SdkCampaign,
        "calls",
        "every call of the SDK's client ended with its exact result; every report of progress came once, in order",
        "the SDK's own client over many workers; each call cut within its limits, workers restarted",
        "Cut each call of the SDK's client once abruptly or several times cleanly, and restart workers meanwhile.",
        runs=1,
        sizes={"calls": 1000, "clients": 50, "workers": 4},
    ),
    "fuzz": _Kind(
        FuzzCampaign,
        "inputs",
        "every parser took or refused each input with an error of its own, in bounded time and memory, and took "
        "nothing that was not written",
        "damaged and forged bytes for everything that parses",
        "Feed one parser after another, a run each, with damaged and forged bytes, in a process with bounds.",
        runs=len(TARGETS),
        sizes={"inputs": 2_000, "first": 0, "target": "all"},
    ),
}


def run(name: str, runs: int, seed: int, folder: Path, sizes: Mapping[str, int | str]) -> int:
    """Run a campaign, progress on stderr and the report on stdout; return 1 when a promise was broken."""
    kind = _KINDS[name]
    started = time.monotonic()
    campaign = kind.campaign(folder, seed, **sizes)
    done, failure = 0, ""
    try:
        for number in range(runs):
            _progress(f"run {number + 1} of {runs}, {campaign.figures[kind.counted]} {kind.counted}")
            campaign.run(number)
            done += 1
        campaign.finish()
    except BrokenPromiseError as error:
        failure = str(error)
    _progress("\n")
    _say(f"{name} campaign, seed {seed}: {done} of {runs} runs in {time.monotonic() - started:.0f} s")
    for label, figure in campaign.figures.items():
        _say(f"{figure:>14,}  {label}")
    if not failure:
        _say(kind.promise)
        return 0
    _say(f"FAILED in run {done}: {failure}")
    chosen = "".join(f" --{size} {figure}" for size, figure in sizes.items())
    again = f"python tools/crash.py {name} --runs {done + 1} --seed {seed}{chosen}"
    _say(f"the store is kept in {folder}; to repeat:  {again}")
    return 1


def _progress(text: str) -> None:
    ending = "" if text.endswith("\n") else "\r"
    if sys.stderr.isatty() or not ending:
        sys.stderr.write(text + ending)
        sys.stderr.flush()
    elif " 1 of" in text or int(text.split()[1]) % 20 == 0:
        sys.stderr.write(text + "\n")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main(arguments: Iterable[str] | None = None) -> int:
    """Parse, run, return the exit status: 0 fine, 1 a promise was broken, 2 wrong usage."""
    parser = argparse.ArgumentParser(description="Break a store on purpose and look whether it keeps its promises.")
    campaigns = parser.add_subparsers(dest="campaign", required=True, metavar="CAMPAIGN")
    for name, kind in _KINDS.items():
        campaign = campaigns.add_parser(name, help=kind.summary, description=kind.description)
        campaign.add_argument("--runs", type=int, default=kind.runs, help="how many times (default: %(default)s)")
        campaign.add_argument("--seed", type=int, help="what everything is drawn from (default: the clock, printed)")
        for size, figure in kind.sizes.items():
            words = "how many (default: %(default)s)" if isinstance(figure, int) else "which (default: all)"
            campaign.add_argument(f"--{size}", type=type(figure), default=figure, help=words)
        campaign.add_argument("--folder", type=Path, help="where to put the stores (default: a temporary folder)")
    parsed = parser.parse_args(None if arguments is None else list(arguments))
    seed = time.time_ns() % 1_000_000 if parsed.seed is None else parsed.seed
    folder = parsed.folder or Path(tempfile.mkdtemp(prefix="logstore-crash-"))
    sizes = {size: getattr(parsed, size) for size in _KINDS[parsed.campaign].sizes}
    status = run(parsed.campaign, parsed.runs, seed, folder, sizes)
    if status == 0 and parsed.folder is None:
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
