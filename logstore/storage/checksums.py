"""CRC-32C of many parts of the same bytes, without reading each of them.

A search among damage asks for a checksum wherever a frame might begin, and what looks like one may claim to reach
far: a file full of such claims would be read to its end from each of them. CRC-32C is linear, so that of a part follows
from those of all that lies before its beginning and of all that lies before its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import google_crc32c

_BLOCK_BYTES: Final = 4096
_DIGIT_BITS: Final = 4
_DIGITS: Final = 32 // _DIGIT_BITS
_extend = google_crc32c.extend


class PartChecksums:
    """Checksums of parts of some bytes, which do not change meanwhile.

    As long as all parts together are no longer than the whole twice, each is read, which is faster.

    Args:
        read: Returns the bytes from a place up to another one.
        size: How many there are.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self._to_read = 2 * size
        # Of everything up to each block.
        self._before = [0]

    def extend(self, seed: int, start: int, end: int) -> int:
        """Return the CRC-32C of a part, started from `seed`."""
        size = end - start
        if size <= max(_BLOCK_BYTES, self._to_read):
            self._to_read -= size
            return int(_extend(seed, self._read(start, end)))
        return _behind(seed ^ self._up_to(start), size) ^ self._up_to(end)

    def _up_to(self, end: int) -> int:
        """Return the CRC-32C of all bytes up to a place."""
        block = end // _BLOCK_BYTES
        while len(self._before) <= block:
            start = _BLOCK_BYTES * (len(self._before) - 1)
            self._before.append(_extend(self._before[-1], self._read(start, start + _BLOCK_BYTES)))
        return int(_extend(self._before[block], self._read(_BLOCK_BYTES * block, end)))


def _behind(checksum: int, size: int) -> int:
    """Return what a checksum contributes to the one that takes in so many more bytes.

    Source: `crc32_combine` of zlib, which multiplies by x to the power of eight times the size; here a table for each
    power of two.
    """
    power = 0
    while size:
        if size & 1:
            checksum = _times(_table(power), checksum)
        size >>= 1
        power += 1
    return checksum


def _times(table: list[list[int]], checksum: int) -> int:
    moved = 0
    for row in table:
        moved ^= row[checksum & 15]
        checksum >>= _DIGIT_BITS
    return moved


@functools.cache
def _table(power: int) -> list[list[int]]:
    """Return where each digit of a checksum is moved by two to the power of `power` bytes."""

    def moved(checksum: int) -> int:
        if power == 0:
            return int(_extend(checksum, b"\0") ^ _extend(0, b"\0"))
        half = _table(power - 1)
        return _times(half, _times(half, checksum))

    return [[moved(digit << _DIGIT_BITS * place) for digit in range(1 << _DIGIT_BITS)] for place in range(_DIGITS)]
