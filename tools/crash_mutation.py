"""The mutation campaign: what the durability code does is taken out, one thing at a time, and something must fail.

A campaign that passes on broken code proves nothing. So each sync, order, comparison and lock is broken in a copy of
the package, and the proofs that are named for it are run on that copy: one must fail. Each proof is first run on a copy
in which nothing is broken: it must pass.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

from crash_kill import BrokenPromiseError
from crash_mutations import MUTATIONS
from crash_mutations_type import Mutation, Proof

_ROOT: Final = Path(__file__).resolve().parent.parent
_COPIED: Final = ("logstore", "tests", "tools", "bench", "pyproject.toml", "README.md")
_DEADLINE_S: Final = 300.0
"""A proof that takes longer has been hung by the mutation, which it has noticed then."""


class MutationCampaign:
    """Breaks the code, and looks whether that is noticed.

    Args:
        folder: Where the copy of the code goes.
        seed: Of the campaigns among the proofs.
        only: Part of the names of the mutations to try; empty for all.

    Attributes:
        figures: Counts for the report.
    """

    def __init__(self, folder: Path, seed: int, only: str = "") -> None:
        self.figures: Counter[str] = Counter()
        self._folder = folder / "code"
        self._seed = seed
        self._mutations = [each for each in MUTATIONS if only in each.name]
        if not self._mutations:
            raise BrokenPromiseError(f"no mutation has {only!r} in its name")
        self._whole: set[Proof] = set()

    def run(self, number: int) -> None:
        """Take one thing out.

        Raises:
            BrokenPromiseError: Nothing failed; or the code has changed, so that there is nothing to take out.
        """
        if number >= len(self._mutations):
            return
        mutation = self._mutations[number]
        copy = self._copied()
        for proof in mutation.proofs:
            if proof not in self._whole:
                if self._fails(copy, proof):
                    raise BrokenPromiseError(f"{' '.join(proof)} fails though nothing is broken")
                self._whole.add(proof)
        mutate(copy, mutation)
        seen = next((proof for proof in mutation.proofs if self._fails(copy, proof)), None)
        if seen is None:
            raise BrokenPromiseError(f"{mutation.name}: nobody noticed, not {mutation.proofs}")
        self.figures["mutations caught"] += 1
        self.figures[f"caught by {Path(seen[0]).name if seen[0] != 'crash' else f'tools/crash.py {seen[1]}'}"] += 1

    def finish(self) -> None:
        """Remove the copy."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _copied(self) -> Path:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for name in _COPIED:
            source = _ROOT / name
            if source.is_dir():
                shutil.copytree(source, self._folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, self._folder / name)
        return self._folder

    def _fails(self, copy: Path, proof: Proof) -> bool:
        """Run a proof on a copy of the code; return whether it found something wrong.

        Raises:
            BrokenPromiseError: It could not be run at all.
        """
        if proof[0] == "crash":
            place = self._folder / "stores"
            shutil.rmtree(place, ignore_errors=True)
            command = ["tools/crash.py", *proof[1:], "--seed", str(self._seed), "--folder", str(place)]
        else:
            command = ["-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *proof]
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_DEADLINE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return True
        if done.returncode not in (0, 1):
            raise BrokenPromiseError(f"{' '.join(proof)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.returncode == 1


def mutate(copy: Path, mutation: Mutation) -> None:
    """Break the copy.

    Raises:
        BrokenPromiseError: The text to be replaced is not there once.
    """
    path = copy / "logstore" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise BrokenPromiseError(
            f"{mutation.name}: {mutation.file} has {text.count(mutation.old)} times {mutation.old!r}; "
            "the code has changed, so change tools/crash_mutations.py"
        )
    path.write_text(text.replace(mutation.old, mutation.new))
