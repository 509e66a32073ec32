"""What logstore promises, and which tests prove it: `python -m tests.promises > logstore/docs/promises.md`.

The words and where they come from are in `promises.toml`; which tests prove a promise is said on the tests alone, by
`@pytest.mark.promise("its-id", …)`, and is read here from their source. `test_promises.py` keeps all of it in step.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

TESTS: Final = Path(__file__).parent
_WIDTH: Final = 120
_NEVER_RUN: Final = frozenset({"skip", "xfail"})

_INTRO = (
    "Each promise has an id, its words, where it comes from, and the tests that inject its fault and see that it is "
    "kept. A source such as `architecture rule 2` is a rule of the project's design. {count} promises, {unproved} of "
    "them without a proof, which say why. A campaign breaks a store on purpose for as long as one likes "
    "(`python tools/crash.py -h`); a slice of each is among the tests.",
    "`python -m tests.promises` writes this page. The words are in `tests/promises.toml`; which test proves a promise "
    "is marked on the test.",
)


class Promise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A promise.

    Attributes:
        id: Its name, lower-case words joined by hyphens.
        says: One sentence that a user can hold us to.
        source: Where it comes from: a rule of the design, a specification, an issue, another system.
        unproved: Why no test proves it; None when one does.
    """

    id: str
    says: str
    source: str
    unproved: str | None = None


class Area(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Promises that belong together.

    Attributes:
        title: What they are about.
        promise: The promises.
        page: The page of the documentation that speaks of each of them by its id, None for none.
    """

    title: str
    promise: list[Promise]
    page: str | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All promises.

    Attributes:
        area: The promises, by area.
        campaigns: Ids of the promises that each campaign of `tools/crash.py` puts to the test.
    """

    area: list[Area]
    campaigns: dict[str, list[str]]

    @property
    def promises(self) -> list[Promise]:
        """Every promise."""
        return [promise for area in self.area for promise in area.promise]


class Proof(NamedTuple):
    """A test that proves promises."""

    file: Path
    name: str
    promises: tuple[str, ...]


def read_manifest() -> Manifest:
    """Return what is promised."""
    return msgspec.toml.decode((TESTS / "promises.toml").read_bytes(), type=Manifest)


def read_proofs() -> list[Proof]:
    """Return the tests that are marked as proofs.

    Raises:
        ValueError: A mark is where pytest does not see it, or is on a test that does not run.
    """
    return [proof for file in sorted(TESTS.rglob("test_*.py")) for proof in proofs_in(file, file.read_text())]


def proofs_in(file: Path, source: str) -> Iterator[Proof]:
    """Yield the proofs in the source of a test module.

    Raises:
        ValueError: As `read_proofs`.
    """
    tree = ast.parse(source)
    seen = 0
    for test in tree.body:
        if not isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef) or not test.name.startswith("test_"):
            continue
        marks = [mark for mark in test.decorator_list if _name_of(mark) == "promise"]
        seen += len(marks)
        if not marks:
            continue
        if never_run := _NEVER_RUN.intersection(map(_name_of, test.decorator_list)):
            raise ValueError(f"{file}: {test.name} proves nothing, it is marked {', '.join(never_run)}")
        yield Proof(file, test.name, tuple(each for mark in marks for each in _ids_in(file, mark)))
    if seen != sum(isinstance(node, ast.Attribute) and _name_of(node) == "promise" for node in ast.walk(tree)):
        raise ValueError(f"{file}: a promise is marked on something else than a test function of the module")


def _name_of(mark: ast.expr) -> str:
    """Return the name of a pytest mark, empty for another expression."""
    attribute = mark.func if isinstance(mark, ast.Call) else mark
    if isinstance(attribute, ast.Attribute) and isinstance(attribute.value, ast.Attribute):
        return attribute.attr if attribute.value.attr == "mark" else ""
    return ""


def _ids_in(file: Path, mark: ast.expr) -> Iterator[str]:
    arguments = mark.args if isinstance(mark, ast.Call) else []
    if not arguments:
        raise ValueError(f"{file}:{mark.lineno}: the mark names no promise")
    for argument in arguments:
        if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
            raise ValueError(f"{file}:{mark.lineno}: a promise is marked by its id, as text")
        yield argument.value


def page(manifest: Manifest, proofs: Iterable[Proof]) -> str:
    """Return the page `logstore/docs/promises.md`."""
    by_id: dict[str, dict[Path, list[str]]] = {}
    for proof in proofs:
        for promise_id in proof.promises:
            by_id.setdefault(promise_id, {}).setdefault(proof.file, []).append(proof.name)
    unproved = sum(promise.unproved is not None for promise in manifest.promises)
    parts = ["# Promises\n"]
    parts += [f"\n{_wrapped(text.format(count=len(manifest.promises), unproved=unproved))}\n" for text in _INTRO]
    for area in manifest.area:
        about = f"\n[{area.page}]({area.page}) explains them.\n" if area.page else ""
        parts.append(f"\n## {area.title}\n{about}")
        for promise in area.promise:
            campaigns = [name for name, ids in manifest.campaigns.items() if promise.id in ids]
            parts.append(_section(promise, by_id.get(promise.id, {}), campaigns))
    return "".join(parts)


def _section(promise: Promise, tests: dict[Path, list[str]], campaigns: list[str]) -> str:
    lines = [f"Source: {promise.source}"]
    lines += [
        f"`{file.relative_to(TESTS.parent).as_posix()}`: {', '.join(f'`{name}`' for name in names)}"
        for file, names in tests.items()
    ]
    lines += [f"Campaign `{name}`" for name in campaigns]
    if promise.unproved is not None:
        lines.append(f"**No proof.** {promise.unproved}")
    listed = "\n".join(_wrapped(f"- {line}", "  ") for line in lines)
    return f"\n### {promise.id}\n\n{_wrapped(promise.says)}\n\n{listed}\n"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.stdout.write(page(read_manifest(), read_proofs()))
