"""What is on record as lost is read, or says nothing: `verify` then finds it again."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from logstore.ops.verify.losses import Known, Losses, LostRun, record_losses, recorded_losses
from logstore.storage.files import Disk

LOSSES = Losses(
    file="segments/5.segment",
    reason="?",
    kept_in="damaged/5",
    found_at="2026",
    lost=[LostRun("s", "7000000", "9000000", 2)],
)


def test_what_was_recorded_explains_what_is_missing(tmp_path: Path) -> None:
    record_losses(Disk(), tmp_path, "5", LOSSES)
    (found,) = recorded_losses(Disk(), tmp_path)
    assert found == LOSSES
    known = Known([found], [], tmp_path)
    assert [known.explains(each, "s") for each in (6_999_999, 7_000_000, 9_000_000, 9_000_001)] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"7000000"', b'"x"'),
        (b'"7000000"', b'"-7"'),
        (b'"7000000"', b'"7\\n"'),
        (b'"7000000"', b'"' + b"7" * 5_000 + b'"'),
        (b'"?"', b'"\xff"'),
        (b'"?"', b'"?", "extra": ' + b"[" * 20_000),
    ],
)
def test_a_record_that_somebody_made_up_says_nothing(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = record_losses(Disk(), tmp_path, "5", LOSSES)
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    assert recorded_losses(Disk(), tmp_path) == []


@pytest.mark.parametrize("lane", ["\u00b2", "9" * 5_000, "", "12345", "0003x"])
def test_a_row_of_damage_in_no_lane_explains_nothing(tmp_path: Path, lane: str) -> None:
    row = (f"lanes/{lane}/0000000001.journal", 0, 1, None, "?", "", "2026-01-31 12:00:00")
    known = Known([], [row], tmp_path)
    assert not known.explains(7_000_000, "s")
    msgspec.json.encode(known.findings)
