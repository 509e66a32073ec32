"""The whole frames of a segment's bytes, and what lies between them."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import google_crc32c
import msgspec

from logstore.storage.header import HEADER_BYTES
from logstore.storage.record import FRAME_HEADER, Stamp, decode_stamp, is_event, salvage_frames

_decode: Final = msgspec.msgpack.Decoder(Stamp).decode


class Frames:
    """What was read of a segment; the lists are in step, one item for each whole frame, in the order of the file.

    Attributes:
        stamps: The events, without their payloads.
        offsets: Where their frames begin, in bytes.
        lengths: Bytes of their frames.
        runs: Number of the run that each belongs to: events of one stream, ascending ids, no bytes between.
        gaps: `(offset, length)` of the bytes behind the header that are no whole frame.
    """

    def __init__(self, data: bytes, seed: int) -> None:
        self.stamps: list[Stamp] = []
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self.runs: list[int] = []
        self.gaps: list[tuple[int, int]] = []
        self._starts: list[int] = []
        self._read(data, seed)

    def _read(self, data: bytes, seed: int) -> None:
        unpack, extend, head, size = FRAME_HEADER.unpack_from, google_crc32c.extend, FRAME_HEADER.size, len(data)
        offset, stream, last = HEADER_BYTES, "", 0
        # What `iter_frames` does, written out: ten million calls take longer than the rest of the loop.
        while (start := offset + head) < size:
            length, checksum = unpack(data, offset)
            body = data[start : start + length]
            if not 0 < length == len(body) or extend(seed, body) != checksum or not is_event(body):
                break
            stamp = _decode(body)
            if stamp.stream != stream or stamp.id <= last:
                self._starts.append(len(self.stamps))
            self.stamps.append(stamp)
            self.offsets.append(offset)
            self.lengths.append(head + length)
            self.runs.append(len(self._starts))
            offset, stream, last = start + length, stamp.stream, stamp.id
        if offset < size:
            self._read_damaged(data, seed, offset)

    def _read_damaged(self, data: bytes, seed: int, bad: int) -> None:
        """Read on from a bad place."""
        stream, last = "", 0
        for offset, frame in salvage_frames(data, seed, bad):
            if offset > bad:
                self.gaps.append((bad, offset - bad))
            stamp = decode_stamp(frame)
            if offset > bad or stamp.stream != stream or stamp.id <= last:
                self._starts.append(len(self.stamps))
            self.stamps.append(stamp)
            self.offsets.append(offset)
            self.lengths.append(len(frame))
            self.runs.append(len(self._starts))
            bad, stream, last = offset + len(frame), stamp.stream, stamp.id
        if bad < len(data):
            self.gaps.append((bad, len(data) - bad))

    def __len__(self) -> int:
        """Return the number of whole frames."""
        return len(self.stamps)

    def spans(self) -> dict[str, tuple[int, int]]:
        """Return the lowest and the highest id of each stream."""
        found: dict[str, tuple[int, int]] = {}
        for start, stop in pairwise([*self._starts, len(self.stamps)]):
            first, last = self.stamps[start], self.stamps[stop - 1]
            low, high = found.get(first.stream, (first.id, last.id))
            found[first.stream] = (min(low, first.id), max(high, last.id))
        return found
