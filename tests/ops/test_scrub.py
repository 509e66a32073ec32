"""The scrub reads a bounded number of bytes a step, goes on where it was, and tells what it finds once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from logstore.ops.access import open_existing
from logstore.ops.verify import scrub as scrub_module
from logstore.ops.verify.scrub import Scrub
from logstore.storage.opening import OpenStore
from tests.ops.damaged import ask, change, copied, log_of, make, segments


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "events.db"
    make(path)
    return path


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Iterator[OpenStore]:
    opened = open_existing(copied(original, tmp_path / "store"))
    yield opened
    opened.close(empty=True)


def state(store: OpenStore) -> str:
    ((summary,),) = ask(store.catalogue.path, "select summary from maintenance where task = 'scrub'")
    return str(summary)


@pytest.mark.promise("damage-found-unasked")
def test_a_step_reads_no_more_than_it_may_and_a_restart_goes_on(store: OpenStore) -> None:
    sizes = [size for (size,) in ask(store.catalogue.path, "select bytes from segments order by segment_id")]
    scrub = Scrub(store)
    # A segment is read whole.
    assert scrub.step(1) == []
    assert f'"bytes":{sizes[0]},' in state(store)
    scrub.close()
    scrub = Scrub(store)
    scrub.step(sizes[1])
    assert f'"bytes":{sizes[0] + sizes[1]},' in state(store)
    scrub.step(sum(sizes))
    assert '"after":0' in state(store)
    assert '"rounds":1' in state(store)
    finished = state(store)
    # The next round has time until tomorrow.
    scrub.step(1)
    assert state(store) == finished
    scrub.close()


@pytest.mark.promise("damage-found-unasked")
def test_damage_is_told_once_and_is_on_record(
    store: OpenStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub_module, "_REST_S", 0.0)
    path = segments(store.catalogue.path)[0]
    change(path, 3000, b"\xff\xff")
    scrub = Scrub(store)
    (found,) = scrub.step(1 << 30)
    assert found.kind == "damage"
    assert [record for record in caplog.records if str(path) in record.getMessage()]
    rows = ask(store.catalogue.path, "select file, offset, lost_events from damage")
    assert rows == [(f"segments/{path.name}", found.offset, 1)]
    caplog.clear()
    assert scrub.step(1 << 30) == []
    assert not caplog.records
    scrub.close()


def test_the_registry_is_read_too(store: OpenStore) -> None:
    change(log_of(store.catalogue.path) / "registry.log", 90, b"\xff\xff")
    scrub = Scrub(store)
    assert [each.kind for each in scrub.step(1 << 30)] == ["registry"]
    scrub.close()


def test_a_store_that_is_to_be_closed_is_left_at_once(store: OpenStore) -> None:
    store.stopping.set()
    scrub = Scrub(store)
    assert scrub.step(1 << 30) == []
    assert ask(store.catalogue.path, "select * from maintenance") == []
    scrub.close()
