"""The log engine: streams of bytes with ids, durable, shared by processes. It knows nothing of MCP, JSON or HTTP."""

from logstore.storage.catalogue import StreamSummary
from logstore.storage.figures import Health, LogStats
from logstore.storage.log import Log
from logstore.storage.options import Durability, LogOptions, Retention, WriteFailurePolicy
from logstore.storage.record import (
    FIRST_PAGE_EVENTS,
    FLAG_FINAL,
    FLAG_MODEL,
    FLAG_PRIMING,
    FLAG_REQUEST,
    Event,
)
from logstore.storage.registry import Session
from logstore.storage.sessions import Sessions

__all__ = [
    "FIRST_PAGE_EVENTS",
    "FLAG_FINAL",
    "FLAG_MODEL",
    "FLAG_PRIMING",
    "FLAG_REQUEST",
    "Durability",
    "Event",
    "Health",
    "Log",
    "LogOptions",
    "LogStats",
    "Retention",
    "Session",
    "Sessions",
    "StreamSummary",
    "WriteFailurePolicy",
]
