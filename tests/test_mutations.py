"""The list of what the mutation campaign takes out: it fits the code, and leaves out no sync."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import logstore
from crash_kill import BrokenPromiseError
from crash_mutation import MutationCampaign
from crash_mutations import MUTATIONS
from crash_mutations_type import Mutation

ROOT = Path(logstore.__file__).parent
DOOR = {
    ("storage/files.py", "sync"),
    ("storage/segment.py", "sync"),
    ("storage/lane.py", "sync"),
    ("storage/lane.py", "begin_sync"),
}
"""Methods that only pass a sync on: it is taken out where they are called."""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits_the_code_and_leaves_code(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    ast.parse(text.replace(mutation.old, mutation.new))
    assert mutation.proofs
    for proof in mutation.proofs:
        assert proof[0] == "crash" or all((ROOT.parent / file).is_file() for file in proof)


def test_names_are_unique() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def _is_sync(called: ast.expr) -> bool:
    return isinstance(called, ast.Attribute) and called.attr in {"sync", "sync_folder", "begin_sync"}


def syncs(file: str, tree: ast.AST, function: str = "") -> Iterator[int]:
    """Yield the lines that sync a file or a folder, but for those of methods that pass it on."""
    for node in ast.iter_child_nodes(tree):
        name = node.name if isinstance(node, ast.FunctionDef) else function
        if isinstance(node, ast.Call) and _is_sync(node.func) and (file, name) not in DOOR:
            yield node.lineno
        yield from syncs(file, node, name)


def test_every_sync_is_taken_out() -> None:
    left: list[str] = []
    for path in sorted(ROOT.rglob("*.py")):
        file, text = str(path.relative_to(ROOT)), path.read_text()
        taken: set[int] = set()
        for mutation in MUTATIONS:
            if mutation.file == file:
                first = text[: text.index(mutation.old)].count("\n") + 1
                taken.update(range(first, first + mutation.old.count("\n") + 1))
        left += [f"{file}:{line}" for line in syncs(file, ast.parse(text)) if line not in taken]
    assert left == []


# The campaign.


def test_it_says_that_a_mutation_is_noticed(tmp_path: Path) -> None:
    campaign = MutationCampaign(tmp_path, 1, only="comparison: a file's header")
    campaign.run(0)
    assert campaign.figures["mutations caught"] == 1


def test_it_says_that_nobody_notices_one_that_breaks_nothing(tmp_path: Path) -> None:
    proof = ("tests/storage/test_header.py",)
    harmless = Mutation("nothing", "storage/header.py", "that every file", "that each file", (proof,))
    campaign = MutationCampaign(tmp_path, 1)
    campaign._mutations = [harmless]
    with pytest.raises(BrokenPromiseError, match="nobody noticed"):
        campaign.run(0)
