"""Stores with events of any age, for the tests of what is done to stores."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Sequence
from itertools import chain
from pathlib import Path

from logstore.errors import GapError
from logstore.ops.access import StoreView
from logstore.storage.files import Disk
from logstore.storage.header import frame_seed
from logstore.storage.opening import OpenStore
from logstore.storage.record import Event, encode_frame
from logstore.storage.tail import Unsegmented

HOUR_US = 3_600_000_000
SEGMENT_BYTES = 64 << 10


@contextlib.contextmanager
def opened(path: Path, disk: Disk | None = None, segment_bytes: int = SEGMENT_BYTES) -> Generator[OpenStore]:
    """Open a store, made when there is none, as long as the block lasts."""
    store = OpenStore(disk or Disk(), path, segment_bytes)
    try:
        yield store
    finally:
        store.close(empty=True)


class Writer:
    """Writes events of any age straight to segments, as a checkpoint does.

    Attributes:
        ids: Ids of the events of each stream, in order.
    """

    def __init__(self, store: OpenStore) -> None:
        self.store = store
        self.ids: dict[str, list[int]] = {}
        self._seed = frame_seed(store.store_id)

    def events(
        self, stream: str, count: int, *, age_h: float = 0.0, flags: int = 0, payload_bytes: int = 100
    ) -> list[Event]:
        """Make events of a stream that follow those before."""
        known = self.ids.setdefault(stream, [])
        time_us = time.time_ns() // 1000 - int(age_h * HOUR_US)
        made: list[Event] = []
        for _ in range(count):
            event_id = self.store.lane.ids.next(time.time_ns() // 1000)
            payload = f"{stream} {len(known)} ".encode().ljust(payload_bytes, b".")
            made.append(Event(event_id, known[-1] if known else 0, time_us, stream, flags, payload))
            known.append(event_id)
        return made

    def checkpoint(self, *runs: Sequence[Event]) -> None:
        """Write runs of events to segments, one checkpoint."""
        with self.store.checkpoint_lock():
            self.store.segments.write(self.unsegmented(runs), [], time.time_ns() // 1000)

    def write(self, streams: Iterable[str], count: int, **how: float) -> None:
        """Write as many events to each stream, one checkpoint."""
        self.checkpoint(*(self.events(stream, count, **how) for stream in streams))  # type: ignore[arg-type]

    def unsegmented(self, runs: Iterable[Sequence[Event]]) -> Unsegmented:
        """Return runs of events as a checkpoint takes them."""
        events = list(chain.from_iterable(runs))
        return Unsegmented(
            [each.id for each in events],
            [each.stream for each in events],
            [encode_frame(each, self._seed) for each in events],
        )


def read_ids(path: Path, stream: str, after: int = 0) -> list[int]:
    """Return the ids of what a stream shows."""
    with StoreView(path) as view:
        return [event.id for event in view.events(stream, after)]


def has_gap(path: Path, stream: str, after: int) -> bool:
    """Whether a resume is told of a gap."""
    try:
        read_ids(path, stream, after)
    except GapError:
        return True
    return False


def segment_files(path: Path) -> list[str]:
    """Return the names of a store's segment files."""
    return sorted(each.name for each in path.with_name(f"{path.stem}-log").joinpath("segments").iterdir())
