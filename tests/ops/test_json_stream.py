"""JSON is read the same however its bytes come, and in memory that is bounded."""

from __future__ import annotations

import io
import json
from typing import IO, Any, cast

import pytest

from logstore.ops.transfer import json_stream
from logstore.ops.transfer.json_stream import BrokenJsonError, JsonStream


class Pieces(io.RawIOBase):
    """Gives its bytes a few at a time, as a pipe does; counts how often it is asked."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data = io.BytesIO(data)
        self._size = size
        self.asked = 0

    def read(self, size: int = -1, /) -> bytes:
        self.asked += 1
        return self._data.read(self._size if size < 0 else min(size, self._size))


def read(data: bytes, size: int) -> tuple[list[Any], dict[str, Any]]:
    stream = JsonStream(cast("IO[bytes]", Pieces(data, size)), "the input")
    return [each.value for each in stream.events()], stream.members


TEXTS = [
    b'{"events": [{"a": 1}, {"b": [2]}], "count": 2, "rate": -1.5e+10, "flag": true}',
    b'{"rate": 12.75, "events": []}',
    b"[1.5, -0.25e-3, 1e5, 17, null, true]",
    b'{"a": 1.5}\n{"b": -2e+1}\n{"c": 3}\n',
    b'\xef\xbb\xbf[{"a": "\xc3\xa9\\u00e9"}]',
    b"[] ",
]


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("text", TEXTS)
def test_where_the_bytes_are_cut_makes_no_difference(text: bytes, size: int) -> None:
    assert read(text, size) == read(text, len(text))


def test_what_comes_byte_by_byte_is_not_scanned_again_with_each() -> None:
    value = ["x" * 20_000]
    text = json.dumps([value, value]).encode()
    scans = 0

    class Counting(JsonStream):
        def _fill(self, least: int = 1) -> None:
            nonlocal scans
            scans += 1
            super()._fill(least)

    found = [each.value for each in Counting(cast("IO[bytes]", Pieces(text, 1)), "the input").events()]
    assert found == [value, value]
    assert scans < 200


def test_members_beside_the_events_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_VALUE_CHARACTERS", 10_000)
    many = b"{" + b",".join(b'"%d":0' % number for number in range(5_000)) + b"}"
    with pytest.raises(BrokenJsonError, match="beside events"):
        read(many, len(many))
