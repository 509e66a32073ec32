"""The settings of the log engine, with their units and bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from logstore.errors import ConfigurationError

Durability = Literal["always", "interval", "os"]
"""What an acknowledgement means: on disk; written, and synced every interval; written."""

WriteFailurePolicy = Literal["degrade", "raise"]
"""What an append does when the disk fails: serve from memory and say so; or raise."""

MIB = 1 << 20


@dataclass(frozen=True)
class Retention:
    """What is kept; None keeps everything.

    Attributes:
        max_age_s: Age at which events go, answered or not.
        max_events: Events of a stream that are kept.
        max_bytes: Bytes of segments that are kept.
        resume_window_s: Younger events stay whatever `max_events` and `max_bytes` say, and so does the stream of a
            request without its answer: a thousand progress notifications must not cost a client its result.
    """

    max_age_s: float | None = None
    max_events: int | None = None
    max_bytes: int | None = None
    resume_window_s: float = 600.0


@dataclass(frozen=True)
class LogOptions:
    """Settings of one open log.

    Attributes:
        durability: What "acknowledged" means, see `docs/durability.md`.
        on_write_failure: `degrade` acknowledges from memory while the disk fails; `raise` raises.
        sync_interval_s: Longest time between a write and its sync in `interval` mode.
        memory_bytes: Budget for the events kept in memory: those not yet in segments, and the cache.
        cached_events_per_stream: Newest events of a stream that stay in memory.
        volatile_bytes: Most bytes of events kept in memory while the disk fails.
        journal_file_bytes: Size at which a journal file is followed by the next.
        journal_bytes: Most journal bytes not yet in segments; past it appends wait.
        checkpoint_interval_s: Age at which journalled events go to segments.
        segment_bytes: Size at which a segment is sealed.
        retention: What is kept. Reads show at once no more than its `max_events`; the disk is another's work.
    """

    durability: Durability = "always"
    on_write_failure: WriteFailurePolicy = "degrade"
    sync_interval_s: float = 0.1
    memory_bytes: int = 100 * MIB
    cached_events_per_stream: int = 100
    volatile_bytes: int = 16 * MIB
    journal_file_bytes: int = 16 * MIB
    journal_bytes: int = 64 * MIB
    checkpoint_interval_s: float = 2.0
    segment_bytes: int = 8 * MIB
    retention: Retention = Retention()

    @property
    def unsegmented_bytes(self) -> int:
        """Memory for events that are in journals only: at most half of the budget, and no more than the journals."""
        return min(self.journal_bytes, self.memory_bytes // 2)

    @property
    def cache_bytes(self) -> int:
        """Memory for events that are in segments too."""
        return self.memory_bytes - self.unsegmented_bytes

    def __post_init__(self) -> None:
        """Refuse what could not work, naming the field and what is allowed."""
        for field, allowed in (("durability", Durability), ("on_write_failure", WriteFailurePolicy)):
            if getattr(self, field) not in get_args(allowed):
                raise ConfigurationError(
                    f"{field} must be one of {', '.join(get_args(allowed))}, not {getattr(self, field)!r}"
                )
        for field, least in (
            ("sync_interval_s", 0.001),
            ("memory_bytes", MIB),
            ("cached_events_per_stream", 0),
            ("volatile_bytes", 0),
            ("journal_file_bytes", 64 << 10),
            ("journal_bytes", 128 << 10),
            ("checkpoint_interval_s", 0.01),
            ("segment_bytes", 64 << 10),
        ):
            if getattr(self, field) < least:
                raise ConfigurationError(f"{field} must be at least {least}, not {getattr(self, field)!r}")
