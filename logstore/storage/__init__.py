"""The log engine: streams of bytes with ids, durable, shared by processes. It knows nothing of MCP, JSON or HTTP."""

from logstore.storage.catalogue import StreamSummary
from logstore.storage.log import Health, Log, LogStats
from logstore.storage.options import Durability, LogOptions, WriteFailurePolicy
from logstore.storage.record import FIRST_PAGE_EVENTS, FLAG_FINAL, FLAG_MODEL, FLAG_PRIMING, Event, next_page_events
from logstore.storage.registry import Session
from logstore.storage.sessions import Sessions

__all__ = [
    "FIRST_PAGE_EVENTS",
    "FLAG_FINAL",
    "FLAG_MODEL",
    "FLAG_PRIMING",
    "Durability",
    "Event",
    "Health",
    "Log",
    "LogOptions",
    "LogStats",
    "Session",
    "Sessions",
    "StreamSummary",
    "WriteFailurePolicy",
    "next_page_events",
]
