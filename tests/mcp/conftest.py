"""The stores that the contract holds for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Literal, cast

import pytest

from logstore.mcp import InMemoryEventStore, PersistentEventStore
from logstore.mcp.base import LogEventStore

StoreKind = Literal["memory", "always", "interval", "os"]
KINDS = ("memory", "always", "interval", "os")


@pytest.fixture(params=KINDS)
def store_kind(request: pytest.FixtureRequest) -> StoreKind:
    """Each kind of store; the persistent ones by their durability."""
    return cast("StoreKind", request.param)


@pytest.fixture
def make_store(store_kind: StoreKind, tmp_path: Path) -> Callable[[], LogEventStore]:
    """Make a store of one kind; of a persistent kind, each is over the same files."""

    def make() -> LogEventStore:
        if store_kind == "memory":
            return InMemoryEventStore()
        return PersistentEventStore(tmp_path / "store" / "events.db", durability=store_kind)

    return make


@pytest.fixture
async def store(make_store: Callable[[], LogEventStore]) -> AsyncIterator[LogEventStore]:
    """An open store of each kind."""
    async with make_store() as opened:
        yield opened
