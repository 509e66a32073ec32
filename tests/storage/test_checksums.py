"""The checksum of a part is the same however it is found, and thousands of long parts are not read one by one."""

from __future__ import annotations

import random

import google_crc32c
import pytest

from logstore.storage.checksums import PartChecksums


@pytest.mark.parametrize("seed", range(6))
def test_it_is_that_of_the_bytes(seed: int) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(rng.choice((1, 4096, 50_000)))
    checksums = PartChecksums(lambda start, end: data[start:end], len(data))
    for _ in range(300):
        start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        begun = rng.getrandbits(32)
        assert checksums.extend(begun, start, end) == google_crc32c.extend(begun, data[start:end])


def test_long_parts_are_read_a_few_times_and_not_each() -> None:
    data = random.Random(1).randbytes(1 << 20)
    bytes_read = 0

    def read(start: int, end: int) -> bytes:
        nonlocal bytes_read
        bytes_read += end - start
        return data[start:end]

    checksums = PartChecksums(read, len(data))
    for start in range(2_000):
        checksums.extend(0, start, len(data))
    assert bytes_read < 20 * len(data)
