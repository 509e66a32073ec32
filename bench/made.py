"""A large store, made without waiting for the journal's syncs.

Streams with files of their own and tiny streams in packs alternate; the events are up to twenty days old.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from logstore.storage.files import Disk
from logstore.storage.header import frame_seed
from logstore.storage.ids import IdGenerator
from logstore.storage.opening import OpenStore
from logstore.storage.options import MIB, Retention
from logstore.storage.record import Event, encode_frame
from logstore.storage.tail import Unsegmented

PAYLOAD_BYTES: Final = 200
_DAY_S: Final = 86_400
_DAYS: Final = 20
_LARGE: Final = 8
_TINY_EVENTS: Final = 3
_CHECKPOINT_EVENTS: Final = 20_000

OLDER_HALF: Final = Retention(max_age_s=_DAYS / 2 * _DAY_S)
"""Retention that drops half of what `make` makes."""


def make(path: Path, events: int) -> None:
    """Make a store of so many events, 100 at least: three fifths in large streams, the rest in tiny ones."""
    checkpoints = -(-events // _CHECKPOINT_EVENTS)
    large = events // checkpoints * 3 // 5 // _LARGE
    small = (events // checkpoints - large * _LARGE) // _TINY_EVENTS
    total = checkpoints * (large * _LARGE + small * _TINY_EVENTS)
    store = OpenStore(Disk(), path, 8 * MIB)
    seed = frame_seed(store.store_id)
    ids = IdGenerator(1)
    payload = bytes(PAYLOAD_BYTES)
    span_us = _DAYS * _DAY_S * 1_000_000
    start_us = time.time_ns() // 1000 - span_us
    last: dict[str, int] = {}
    done = tiny = 0

    def add(waiting: Unsegmented, stream: str, count: int) -> None:
        nonlocal done
        for _ in range(count):
            time_us = start_us + done * span_us // total
            event_id = ids.next(time_us)
            waiting.ids.append(event_id)
            waiting.streams.append(stream)
            waiting.frames.append(encode_frame(Event(event_id, last.get(stream, 0), time_us, stream, 0, payload), seed))
            last[stream] = event_id
            done += 1

    for _ in range(checkpoints):
        waiting = Unsegmented.none()
        for each in range(_LARGE):
            add(waiting, f"large-{each}", large)
        for _ in range(small):
            tiny += 1
            add(waiting, f"tiny-{tiny}", _TINY_EVENTS)
            del last[f"tiny-{tiny}"]
        with store.checkpoint_lock():
            store.segments.write(waiting, [], time.time_ns() // 1000)
    store.close(empty=True)
