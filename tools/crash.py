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
from collections.abc import Iterable
from pathlib import Path
from typing import Final

try:
    from crash_backup import BackupCampaign, BrokenBackupError
    from crash_kill import BrokenPromiseError, KillCampaign
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}. Run  python3 tools/check.py --fast  once, then this with .venv/bin/python") from None


def kill(runs: int, seed: int, folder: Path) -> int:
    """Run the campaign, progress on stderr and the report on stdout; return 1 when a promise was broken."""
    started = time.monotonic()
    campaign = KillCampaign(folder, seed)
    done, failure = 0, ""
    try:
        for number in range(runs):
            _progress(f"run {number + 1} of {runs}, {campaign.figures['events acknowledged']} events acknowledged")
            campaign.run(number)
            done += 1
        campaign.finish()
    except BrokenPromiseError as error:
        failure = str(error)
    _progress("\n")
    _say(f"kill campaign, seed {seed}: {done} of {runs} runs in {time.monotonic() - started:.0f} s")
    for name, figure in campaign.figures.items():
        _say(f"{figure:>12,}  {name}")
    if not failure:
        _say("every acknowledged event was there, once, in order, with its payload; no id was given out twice")
        return 0
    _say(f"FAILED in run {done}: {failure}")
    _say(f"the store is kept in {folder}; to repeat:  python tools/crash.py kill --runs {done + 1} --seed {seed}")
    return 1


def backup(runs: int, seed: int, folder: Path) -> int:
    """Run the campaign, progress on stderr and the report on stdout; return 1 when a promise was broken."""
    started = time.monotonic()
    campaign = BackupCampaign(folder, seed)
    done, failure = 0, ""
    try:
        for number in range(runs):
            _progress(f"run {number + 1} of {runs}, {campaign.figures['events compared']} events compared")
            campaign.run(number)
            done += 1
        campaign.finish()
    except BrokenBackupError as error:
        failure = str(error)
    _progress("\n")
    _say(f"backup campaign, seed {seed}: {done} of {runs} backups in {time.monotonic() - started:.0f} s")
    for name, figure in campaign.figures.items():
        _say(f"{figure:>14,}  {name}")
    if not failure:
        _say("every backup held all that was acknowledged when it was begun, nothing else, of each stream a prefix")
        return 0
    _say(f"FAILED in run {done}: {failure}")
    _say(f"the store is kept in {folder}; to repeat:  python tools/crash.py backup --runs {done + 1} --seed {seed}")
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
    for name, what, description in (
        (
            "kill",
            "writing processes killed at random moments",
            "Kill writing processes at random moments, open the store again, and look for what was lost.",
        ),
        (
            "backup",
            "backups while more than a hundred writers append in several processes",
            "Back up a store under load over and over, restore each backup elsewhere, and compare event by event.",
        ),
    ):
        campaign = campaigns.add_parser(name, help=what, description=description)
        campaign.add_argument("--runs", type=int, default=200, help="how many times (default: %(default)s)")
        campaign.add_argument("--seed", type=int, help="what everything is drawn from (default: the clock, printed)")
        campaign.add_argument("--folder", type=Path, help="where to put the stores (default: a temporary folder)")
    parsed = parser.parse_args(None if arguments is None else list(arguments))
    seed = time.time_ns() % 1_000_000 if parsed.seed is None else parsed.seed
    folder = parsed.folder or Path(tempfile.mkdtemp(prefix="logstore-crash-"))
    status = _CAMPAIGNS[parsed.campaign](parsed.runs, seed, folder)
    if status == 0 and parsed.folder is None:
        shutil.rmtree(folder)
    return status


_CAMPAIGNS: Final = {"kill": kill, "backup": backup}


if __name__ == "__main__":
    sys.exit(main())
