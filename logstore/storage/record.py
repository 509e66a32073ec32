"""One event as bytes: the record, and the frame around it.

The frame is the same in a journal and in a segment, so that an event is encoded once and only copied after that:

| offset | size | field |
| --- | --- | --- |
| 0 | 4 | length of the body in bytes, u32 little endian, 1 to `MAX_BODY_BYTES` |
| 4 | 4 | CRC-32C of the body, started from the store's seed |
| 8 | length | body: msgpack array `[event_id, prev, time_us, stream, flags, payload]` |

The checksum starts from the store's seed, so a frame of another store does not pass; it names its stream and id, so
that a segment alone says whose events it holds. The place in a journal is bound by the batch around it.
"""

from __future__ import annotations

import contextlib
import struct
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Annotated, Final

import google_crc32c
import msgspec

from logstore.errors import InvalidMessageError, InvalidStreamError
from logstore.storage.checksums import PartChecksums

FLAG_PRIMING: Final = 1
"""An event without a message: stored so that its id can be resumed from, never replayed."""
FLAG_MODEL: Final = 2
"""The payload is the wire JSON of an SDK model; without it, of a plain dict."""
FLAG_FINAL: Final = 4
"""The response that ends a request's stream."""
FLAG_REQUEST: Final = 8
"""The stream is that of a request: it ends with a response, and retention by size waits for that."""
FLAG_IMPORTED: Final = 16
"""The payload begins with a msgpack array `[source, source_id]`: where the event was imported from."""

FRAME_HEADER: Final = struct.Struct("<II")
_BODY_START: Final = b"\x96"
"""First byte of every body: a msgpack array of six."""
MAX_BODY_BYTES: Final = 64 << 20
"""Bound on a length field that is to be believed; also the largest event."""


_UNSHOWABLE: Final = frozenset({"Cc", "Zl", "Zp"})
"""Unicode categories that would break a line of a table or a log: control characters and line separators."""
MAX_STREAM_BYTES: Final = 512
"""Bound on the name of a stream."""
MAX_TIME_US: Final = 253_402_300_799_999_999
"""The last moment of the year 9999, the latest that has an ISO form."""

# What SQLite can hold: a checksum that matches is no proof that this package wrote the bytes.
_Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_TimeUs = Annotated[int, msgspec.Meta(ge=0, le=MAX_TIME_US)]
_Flags = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]


class Event(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One stored event.

    Attributes:
        id: Position in the total order; see `ids`.
        prev: Id of the stream's previous event as far as its writer remembered, else 0.
        time_us: Wall clock when it was appended, microseconds since 1970.
        stream: Name of the stream.
        flags: `FLAG_…` bits.
        payload: What was stored, unchanged.
    """

    id: _Id
    prev: _Id
    time_us: _TimeUs
    stream: str
    flags: _Flags
    payload: bytes

    @property
    def event_id(self) -> str:
        """The id as clients see it."""
        return str(self.id)


def check_stream_name(name: str) -> None:
    """Refuse a name that could not be stored, or not be shown.

    Raises:
        InvalidStreamError: It is empty, long, or holds control characters.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidStreamError(f"the stream name {name[:80]!r} holds half of a surrogate pair") from None
    if not 0 < size <= MAX_STREAM_BYTES:
        raise InvalidStreamError(f"a stream name has 1 to {MAX_STREAM_BYTES} bytes, this one {size}: {name[:40]!r}")
    if not name.isprintable() and any(unicodedata.category(character) in _UNSHOWABLE for character in name):
        raise InvalidStreamError(f"the stream name {name[:80]!r} holds a control character")


FIRST_PAGE_EVENTS: Final = 16
"""Events to read at once as long as their size is not known."""
CHUNK_EVENTS: Final = 100
"""Events to decode at once where there are many: five times as many leave the processor's cache, 5 to 8 % slower."""
_PAGE_EVENTS: Final = 1_000
_PAGE_BYTES: Final = 1 << 20


def next_page_events(page: Sequence[Event]) -> int:
    """Return how many events to read after a page of them: about a mebibyte, so that a slow reader holds no more."""
    size = sum(len(event.payload) for event in page)
    return max(1, min(_PAGE_EVENTS, _PAGE_BYTES * len(page) // max(1, size)))


class Stamp(msgspec.Struct, array_like=True, gc=False):
    """An event without its payload, which the decoder skips; the fields are those of `Event`."""

    id: _Id
    prev: _Id
    time_us: _TimeUs
    stream: str
    flags: _Flags


class _Body(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """All of an event and nothing else; its payload is not copied."""

    id: _Id
    prev: _Id
    time_us: _TimeUs
    stream: str
    flags: _Flags
    payload: memoryview


_encoder = msgspec.msgpack.Encoder()
_decode_event = msgspec.msgpack.Decoder(Event).decode
_stamp_decoder = msgspec.msgpack.Decoder(Stamp)
_decode_body = msgspec.msgpack.Decoder(_Body).decode

_pack_header = FRAME_HEADER.pack
_unpack_header = FRAME_HEADER.unpack_from
_extend = google_crc32c.extend


def encode_frame(event: Event, seed: int) -> bytes:
    """Return the frame of one event.

    Raises:
        InvalidMessageError: The event is larger than `MAX_BODY_BYTES`.
    """
    body = _encoder.encode(event)
    if len(body) > MAX_BODY_BYTES:
        raise InvalidMessageError("$", f"an event of {len(body)} bytes is larger than the largest, {MAX_BODY_BYTES}")
    return _pack_header(len(body), _extend(seed, body)) + body


def decode_frame(frame: bytes) -> Event:
    """Return the event of a frame whose checksum was verified when it was read."""
    # A copy of some hundred bytes takes less than a view of them.
    return _decode_event(frame[FRAME_HEADER.size :])


def decode_stamp(frame: bytes) -> Stamp:
    """Return the event of a verified frame without its payload."""
    return _stamp_decoder.decode(memoryview(frame)[FRAME_HEADER.size :])


def decode_events(data: bytes, seed: int, most: int, offset: int = 0) -> tuple[list[Event], list[int]]:
    """Return the events of the valid frames that stand one behind another from an offset on, and where each ends.

    Args:
        data: Where the frames are.
        seed: Start value of their checksums.
        most: How many events to return at most.
        offset: Where the first frame begins.
    """
    # What `frame_at` and `decode_frame` do, written out: the calls and their copies take longer than the rest.
    events: list[Event] = []
    ends: list[int] = []
    head, last = FRAME_HEADER.size, len(data) - FRAME_HEADER.size
    # That an event can be decoded is also the check that the body is one, see `is_event`.
    with contextlib.suppress(ValueError, msgspec.MsgspecError):
        for _ in repeat(None, most):
            if offset > last:
                break
            length, checksum = _unpack_header(data, offset)
            start = offset + head
            offset = start + length
            body = data[start:offset]
            if len(body) != length or not 0 < length <= MAX_BODY_BYTES or _extend(seed, body) != checksum:
                break
            event = _decode_event(body)
            if body[0] != _BODY_START[0]:
                break
            events.append(event)
            ends.append(offset)
    return events, ends


def is_event(body: bytes | memoryview) -> bool:
    """Whether the body of a frame is that of an event; the checksum of one that somebody forged matches, too."""
    try:
        _decode_body(body)
    except (ValueError, msgspec.MsgspecError):
        return False
    # There are longer ways to write an array of six, by which no search finds it.
    return body[0] == _BODY_START[0]


def frame_at(data: bytes, offset: int, seed: int) -> bytes | None:
    """Return the frame that begins at `offset`, or None when no valid one does."""
    start = offset + FRAME_HEADER.size
    if start > len(data):
        return None
    length, checksum = _unpack_header(data, offset)
    end = start + length
    if not 0 < length <= MAX_BODY_BYTES or end > len(data):
        return None
    body = data[start:end]
    if _extend(seed, body) != checksum or not is_event(body):
        return None
    return data[offset:end]


def frame_end(data: bytes, offset: int) -> int | None:
    """Return where a frame at `offset` would end; None when it would not end in `data`, or is none by its length."""
    start = offset + FRAME_HEADER.size
    if start > len(data):
        return None
    end = start + int(FRAME_HEADER.unpack_from(data, offset)[0])
    return end if start < end <= min(len(data), start + MAX_BODY_BYTES) else None


def iter_frames(data: bytes, seed: int, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield `(offset, frame)` of the valid frames from `offset` on, up to the first invalid one."""
    while (frame := frame_at(data, offset, seed)) is not None:
        yield offset, frame
        offset += len(frame)


def salvage_frames(data: bytes, seed: int, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield `(offset, frame)` of the frames that are whole in a run of bytes, wherever damage lies between them.

    Takes a time that grows with the length of `data`, whatever frames it claims to hold.
    """
    checksums = PartChecksums(lambda start, end: data[start:end], len(data))
    view = memoryview(data)
    while (start := data.find(_BODY_START, offset + FRAME_HEADER.size)) >= 0:
        offset = start - FRAME_HEADER.size
        end = frame_end(data, offset)
        if (
            end is not None
            and checksums.extend(seed, start, end) == FRAME_HEADER.unpack_from(data, offset)[1]
            and is_event(view[start:end])
        ):
            yield offset, data[offset:end]
            offset = end
        else:
            offset += 1
