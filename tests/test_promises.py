"""Promises, their proofs and the pages that speak of them are in step, both ways."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import crash
from tests.promises import TESTS, Manifest, Proof, page, proofs_in, read_manifest, read_proofs

DOCS = TESTS.parent / "logstore" / "docs"
MOST_UNPROVED = 5
"""More than this is no exception any more."""


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return read_manifest()


@pytest.fixture(scope="module")
def proofs() -> list[Proof]:
    return read_proofs()


def test_every_promise_has_an_id_of_its_own_a_sentence_and_a_source(manifest: Manifest) -> None:
    ids = [promise.id for promise in manifest.promises]
    assert [each for each, count in Counter(ids).items() if count > 1] == []
    for promise in manifest.promises:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", promise.id)
        assert promise.says.endswith("."), promise.id
        assert promise.source, promise.id


def test_every_promise_is_proved_by_a_test_or_says_why_not(manifest: Manifest, proofs: list[Proof]) -> None:
    proved = {each for proof in proofs for each in proof.promises}
    silent = [each.id for each in manifest.promises if each.id not in proved and not each.unproved]
    assert silent == [], f"no test is marked with {silent}: write one, or say in promises.toml why there is none"
    stale = [each.id for each in manifest.promises if each.id in proved and each.unproved is not None]
    assert stale == [], f"{stale} are proved now: take `unproved` out of promises.toml"


def test_every_proof_names_promises(manifest: Manifest, proofs: list[Proof]) -> None:
    known = {promise.id for promise in manifest.promises}
    strange = {f"{proof.file.name}::{proof.name}": set(proof.promises) - known for proof in proofs}
    assert {test: ids for test, ids in strange.items() if ids} == {}


def test_few_promises_are_without_a_proof(manifest: Manifest) -> None:
    unproved = [promise for promise in manifest.promises if promise.unproved is not None]
    assert len(unproved) <= MOST_UNPROVED
    assert all(promise.unproved for promise in unproved)


def test_every_campaign_says_which_promises_it_tests(manifest: Manifest) -> None:
    assert set(manifest.campaigns) == set(crash._KINDS), "name it, and what it proves, under [campaigns]"
    known = {promise.id for promise in manifest.promises}
    for name, ids in manifest.campaigns.items():
        assert ids, name
        assert set(ids) <= known, name


def test_pytest_sees_the_proofs_that_are_read_from_the_sources(
    request: pytest.FixtureRequest, proofs: list[Proof]
) -> None:
    """Of the tests of this run; with the whole suite, all of them."""
    read = {(proof.file, proof.name): set(proof.promises) for proof in proofs}
    collected = [item for item in request.session.items if isinstance(item, pytest.Function)]
    marked = {
        (item.path, item.originalname): {each for mark in item.iter_markers("promise") for each in mark.args}
        for item in collected
    }
    for test, ids in marked.items():
        assert read.get(test, set()) == ids
    whole_files = {item.path for item in collected} if _nothing_deselected(request.config) else set()
    assert {test for test in read if test[0] in whole_files} <= set(marked)


def _nothing_deselected(config: pytest.Config) -> bool:
    options = ("-k", "-m", "deselect", "lf")
    by_name = any("::" in argument for argument in config.args)
    return not (by_name or any(config.getoption(each, None) for each in options))


def test_the_page_of_the_promises_is_what_they_say(manifest: Manifest, proofs: list[Proof]) -> None:
    written = DOCS / "promises.md"
    expected = page(manifest, proofs)
    assert written.read_text() == expected, f"write it anew: python -m tests.promises > {written}"


# Pages that name promises by their ids: `(`one`, `another`)`.

NAMED = re.compile(r"\((`[a-z0-9-]+`(?:, `[a-z0-9-]+`)*)\)")


def ids_named(text: str) -> list[str]:
    return [name for names in NAMED.findall(text) for name in re.findall(r"`([^`]+)`", names)]


def test_a_page_and_its_promises_name_each_other(manifest: Manifest) -> None:
    pages = {area.page for area in manifest.area if area.page is not None}
    assert "durability.md" in pages
    for name in pages:
        expected = {promise.id for area in manifest.area if area.page == name for promise in area.promise}
        assert set(ids_named((DOCS / name).read_text())) == expected


def test_every_point_of_the_page_on_durability_names_its_promise() -> None:
    promised, _, rest = (DOCS / "durability.md").read_text().partition("## What is not promised")
    assert rest
    # Wrapped lines belong to the point that they go on.
    points = re.findall(r"^(?:- .*(?:\n  .*)*|\| [^-].*)$", promised, re.MULTILINE)
    tables = re.findall(r"^\| .*\n(?=\| ---)", promised, re.MULTILINE)
    heads = {table.strip() for table in tables}
    assert len(points) > 15
    assert [point for point in points if point not in heads and not ids_named(point)] == []


# That a proof which is none is seen.


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ('@pytest.mark.promise("a")\nclass TestIt:\n    pass\n', "something else than a test"),
        ('@pytest.mark.promise("a")\ndef fixture():\n    pass\n', "something else than a test"),
        ('def test_it():\n    @pytest.mark.promise("a")\n    def test_inner():\n        pass\n', "something else"),
        ('pytestmark = pytest.mark.promise("a")\n', "something else than a test"),
        ('@pytest.mark.skip\n@pytest.mark.promise("a")\ndef test_it():\n    pass\n', "it is marked skip"),
        (
            '@pytest.mark.promise("a")\n@pytest.mark.xfail(strict=True)\ndef test_it():\n    pass\n',
            "it is marked xfail",
        ),
        ("@pytest.mark.promise(A)\ndef test_it():\n    pass\n", "by its id, as text"),
        ("@pytest.mark.promise()\ndef test_it():\n    pass\n", "names no promise"),
        ("@pytest.mark.promise\ndef test_it():\n    pass\n", "names no promise"),
    ],
)
def test_a_mark_that_proves_nothing_is_refused(source: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        list(proofs_in(Path("test_it.py"), source))


def test_the_marks_of_a_test_are_taken_together() -> None:
    source = '@pytest.mark.promise("a", "b")\n@pytest.mark.slow\n@pytest.mark.promise("c")\nasync def test_it(): ...\n'
    (proof,) = proofs_in(Path("test_it.py"), source)
    assert proof == (Path("test_it.py"), "test_it", ("a", "b", "c"))
