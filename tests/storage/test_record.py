"""A frame brings its event back unchanged, or not at all."""

from __future__ import annotations

import random
import struct
from itertools import accumulate

import google_crc32c
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logstore.storage import record
from logstore.storage.header import frame_seed
from logstore.storage.ids import MAX_ID
from logstore.storage.record import (
    FRAME_HEADER,
    MAX_BODY_BYTES,
    MAX_TIME_US,
    Event,
    decode_events,
    decode_frame,
    encode_frame,
    frame_at,
    iter_frames,
    next_page_events,
    salvage_frames,
)

SEED = frame_seed(11)

ids = st.integers(0, MAX_ID)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
times = st.integers(0, MAX_TIME_US)
events = st.builds(
    Event, id=ids, prev=ids, time_us=times, stream=names, flags=st.integers(0, 7), payload=st.binary(max_size=200)
)


def event(number: int, payload: bytes = b"payload") -> Event:
    return Event(number, number - 1, 1_790_000_000_000_000, "stream", 0, payload)


@given(events)
def test_an_event_comes_back_as_it_was_stored(stored: Event) -> None:
    frame = encode_frame(stored, SEED)
    assert frame_at(frame, 0, SEED) == frame
    assert decode_frame(frame) == stored
    assert decode_frame(frame).event_id == str(stored.id)


@pytest.mark.promise("nothing-wrong-is-served")
@given(events)
def test_a_frame_of_another_store_is_refused(stored: Event) -> None:
    frame = encode_frame(stored, frame_seed(12))
    assert frame_at(frame, 0, SEED) is None
    assert list(salvage_frames(frame, SEED)) == []


@pytest.mark.promise("nothing-wrong-is-served")
def test_every_flipped_bit_of_a_frame_is_noticed() -> None:
    frame = encode_frame(event(7), SEED)
    for bit in range(len(frame) * 8):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        assert frame_at(bytes(damaged), 0, SEED) is None


@given(events, st.data())
def test_a_frame_that_is_cut_short_is_refused(stored: Event, data: st.DataObject) -> None:
    frame = encode_frame(stored, SEED)
    cut = data.draw(st.integers(0, len(frame) - 1))
    assert frame_at(frame[:cut], 0, SEED) is None
    assert list(iter_frames(frame + frame[:cut], SEED)) == [(0, frame)]


@pytest.mark.promise("largest-event")
def test_the_largest_event_is_stored_and_a_larger_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_BODY_BYTES", 1000)
    overhead = len(encode_frame(event(7, bytes(900)), SEED)) - FRAME_HEADER.size - 900
    largest = encode_frame(event(7, bytes(1000 - overhead)), SEED)
    assert frame_at(largest, 0, SEED) == largest
    with pytest.raises(ValueError, match="larger than the largest, 1000"):
        encode_frame(event(7, bytes(1001 - overhead)), SEED)


@pytest.mark.parametrize("length", [0, MAX_BODY_BYTES + 1, 0xFFFFFFFF])
def test_a_length_out_of_bounds_is_not_believed(length: int) -> None:
    assert frame_at(struct.pack("<II", length, 0) + bytes(100), 0, SEED) is None


FIELDS = [7, 6, 1_790_000_000_000_000, "stream", 0, b"payload"]


def forged(body: bytes) -> bytes:
    return FRAME_HEADER.pack(len(body), google_crc32c.extend(SEED, body)) + body


@pytest.mark.parametrize(
    "body",
    [
        msgspec.msgpack.encode(FIELDS)[:-1],
        msgspec.msgpack.encode(FIELDS) + b"\0",
        msgspec.msgpack.encode(FIELDS[:5]),
        msgspec.msgpack.encode([*FIELDS, 1]),
        msgspec.msgpack.encode([MAX_ID + 1, *FIELDS[1:]]),
        msgspec.msgpack.encode([-1, *FIELDS[1:]]),
        msgspec.msgpack.encode([7, MAX_ID + 1, *FIELDS[2:]]),
        msgspec.msgpack.encode([7, 6, MAX_TIME_US + 1, *FIELDS[3:]]),
        msgspec.msgpack.encode([7, 6, -1, *FIELDS[3:]]),
        msgspec.msgpack.encode([*FIELDS[:4], 1 << 31, b""]),
        msgspec.msgpack.encode([*FIELDS[:5], "text"]),
        b"\x96\x07\x06\x05\xa1\xff\0\xc4\0",
        b"\x96" + b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdc\0\x06" + msgspec.msgpack.encode(FIELDS)[1:],
    ],
)
def test_what_is_no_event_is_no_frame_though_its_checksum_matches(body: bytes) -> None:
    data = forged(body)
    assert frame_at(data, 0, SEED) is None
    good = encode_frame(event(8), SEED)
    assert list(salvage_frames(data + good, SEED)) == [(len(data), good)]


def test_zeros_are_no_frame() -> None:
    # Without the bound on the length an empty body would pass: the checksum of nothing is the seed itself.
    for seed in (0, SEED):
        assert frame_at(bytes(64), 0, seed) is None
        assert list(salvage_frames(bytes(4096), seed)) == []


@pytest.mark.parametrize("seed", range(40))
def test_every_whole_frame_around_damage_is_found(seed: int) -> None:
    rng = random.Random(seed)
    # Bytes that look like the start of a body, and lengths that look like lengths, are where a search goes astray.
    payloads = (b"\x96" * rng.randrange(60), rng.randbytes(rng.randrange(300)), struct.pack("<II", 20, 0) * 5 + b"\x96")
    frames = [encode_frame(event(number, rng.choice(payloads)), SEED) for number in range(1, 40)]
    data = bytearray(b"".join(frames))
    for _ in range(rng.randrange(1, 6)):
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.choice((1, 20, 512)))
        data[start:end] = rng.choice((bytes(end - start), rng.randbytes(end - start), b"\x96" * (end - start)))
    whole = []
    offset = 0
    for frame in frames:
        if bytes(data[offset : offset + len(frame)]) == frame:
            whole.append((offset, frame))
        offset += len(frame)
    assert list(salvage_frames(bytes(data), SEED)) == whole


@given(st.lists(st.binary(max_size=50), max_size=6), st.integers(0, 7), st.data())
def test_events_are_decoded_up_to_the_first_invalid_frame(
    payloads: list[bytes], most: int, data: st.DataObject
) -> None:
    events = [event(number, payload) for number, payload in enumerate(payloads, 1)]
    whole = b"".join(encode_frame(each, SEED) for each in events)
    cut = data.draw(st.integers(0, len(whole)))
    for torn in (whole[:cut], whole[:cut] + b"\0" * 20, whole[:cut] + b"\xff" * 20):
        # What is put behind may be just what was cut off.
        frames = [frame for _, frame in iter_frames(torn, SEED)][:most]
        ends = list(accumulate(map(len, frames)))
        assert decode_events(torn, SEED, most) == (events[: len(frames)], ends)
        assert decode_events(b"\0" + torn, SEED, most, 1) == (events[: len(frames)], [1 + end for end in ends])


def test_a_search_finds_frames_at_the_very_start_and_end() -> None:
    first, last = encode_frame(event(1), SEED), encode_frame(event(2), SEED)
    data = first + b"torn" + last
    assert list(salvage_frames(data, SEED)) == [(0, first), (len(first) + 4, last)]
    assert list(salvage_frames(data, SEED, len(first))) == [(len(first) + 4, last)]


def test_a_frame_inside_the_payload_of_a_whole_one_is_payload() -> None:
    inner = encode_frame(event(1), SEED)
    outer = encode_frame(event(2, inner), SEED)
    assert list(salvage_frames(outer, SEED)) == [(0, outer)]


def test_pages_hold_about_a_mebibyte_and_at_least_one_event() -> None:
    def page(count: int, size: int) -> list[Event]:
        return [Event(number, 0, 0, "stream", 0, bytes(size)) for number in range(1, count + 1)]

    assert next_page_events(page(16, 700)) == 1000
    assert next_page_events(page(16, 1 << 16)) == 16
    assert next_page_events(page(4, 10 << 20)) == 1
    assert next_page_events(page(3, 0)) == 1000
