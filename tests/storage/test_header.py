"""A file header is believed whole or not at all, and a newer format is refused."""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logstore.errors import DamageError, FormatVersionError
from logstore.storage.header import (
    FORMAT_VERSION,
    HEADER_BYTES,
    KIND_JOURNAL,
    KIND_REGISTRY,
    KIND_SEGMENT,
    FileHeader,
    decode_header,
    frame_seed,
    new_salt,
)

PATH = Path("some.journal")
words = st.integers(0, 2**64 - 1)
HEADER = FileHeader(
    kind=KIND_JOURNAL, store_id=2**63 + 1, salt=5, number=7, incarnation=2**62, follows=6, follows_end=8192
)


def with_checksum(fields: bytes) -> bytes:
    checksum: int = google_crc32c.value(fields)
    return fields + checksum.to_bytes(4, "little")


@given(
    st.builds(
        FileHeader,
        kind=st.sampled_from([KIND_JOURNAL, KIND_SEGMENT, KIND_REGISTRY]),
        store_id=words,
        salt=words,
        number=words,
        incarnation=words,
        follows=words,
        follows_end=words,
    )
)
def test_a_header_comes_back_as_it_was_written(header: FileHeader) -> None:
    data = header.encode()
    assert len(data) == HEADER_BYTES
    assert decode_header(data + b"what follows", PATH, header.kind) == header


def test_every_flipped_bit_is_noticed() -> None:
    data = HEADER.encode()
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        # In the version's bytes it cannot be told from a newer release, whose header may look different behind them.
        with pytest.raises((DamageError, FormatVersionError), match=r"some\.journal"):
            decode_header(bytes(flipped), PATH, KIND_JOURNAL)


def test_a_file_of_a_newer_format_is_refused_with_what_to_do() -> None:
    fields = bytearray(HEADER.encode()[:-4])
    fields[8:10] = (FORMAT_VERSION + 1).to_bytes(2, "little")
    with pytest.raises(FormatVersionError, match=rf"format version {FORMAT_VERSION + 1}.*upgrade mcp-logstore"):
        decode_header(with_checksum(bytes(fields)), PATH, KIND_JOURNAL)


@pytest.mark.promise("newer-format-refused")
def test_a_file_of_a_newer_format_is_refused_also_when_its_checksum_is_of_another_kind() -> None:
    data = bytearray(HEADER.encode())
    data[8:10] = (FORMAT_VERSION + 1).to_bytes(2, "little")
    with pytest.raises(FormatVersionError):
        decode_header(bytes(data), PATH, KIND_JOURNAL)


@pytest.mark.parametrize("kind", [KIND_SEGMENT, KIND_REGISTRY])
def test_a_file_of_another_kind_is_refused(kind: int) -> None:
    with pytest.raises(DamageError, match=f"kind {KIND_JOURNAL}.*{kind} was meant"):
        decode_header(HEADER.encode(), PATH, kind)


def test_an_unknown_checksum_is_refused() -> None:
    fields = bytearray(HEADER.encode()[:-4])
    fields[11] = 2
    with pytest.raises(DamageError, match="checksum 2"):
        decode_header(with_checksum(bytes(fields)), PATH, KIND_JOURNAL)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1])
def test_a_file_shorter_than_its_header_is_damaged(length: int) -> None:
    with pytest.raises(DamageError, match="shorter than its header") as caught:
        decode_header(HEADER.encode()[:length], PATH, KIND_JOURNAL)
    assert (caught.value.path, caught.value.offset, caught.value.length) == (PATH, 0, length)


@pytest.mark.parametrize("data", [bytes(HEADER_BYTES), b"SQLite format 3\0".ljust(HEADER_BYTES)])
def test_what_does_not_begin_as_ours_is_damaged(data: bytes) -> None:
    with pytest.raises(DamageError, match="does not begin as a logstore file"):
        decode_header(data, PATH, KIND_JOURNAL)


def test_a_salt_is_never_zero_and_never_the_same() -> None:
    salts = {new_salt() for _ in range(1000)}
    assert len(salts) == 1000
    assert 0 not in salts


def test_stores_have_seeds_of_their_own() -> None:
    assert len({frame_seed(store_id) for store_id in range(1000)}) == 1000
    assert HEADER.seed == frame_seed(HEADER.store_id)
