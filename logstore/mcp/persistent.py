"""The event store on disk."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, Unpack

import msgspec

from logstore.config import DEFAULT_DB_PATH, MEMORY_DB_PATH, EngineSettings, config_of
from logstore.errors import StoreClosedError
from logstore.mcp.base import EventLog, LogEventStore
from logstore.mcp.private_folder import PrivateFolder
from logstore.mcp.sessions import SessionKeeper
from logstore.ops.schedule import Schedule
from logstore.storage import Health, Log
from logstore.storage.files import Disk

_BYTES_PER_MB = 1 << 20


class PersistentEventStore(LogEventStore):
    """An event store that keeps its events in a write-ahead log and per-stream segments, indexed by SQLite.

    Several processes may have one store open at once.

    Args:
        db_path: The SQLite catalogue; the log stands beside it in `<stem>-log/`. `:memory:` makes a private folder at
            first use and removes it at close or exit.
        disk: The door to the operating system.
        **settings: See `EventStoreConfig`.

    Attributes:
        config: All settings.

    Raises:
        ConfigurationError: A setting is unknown or out of range.
    """

    def __init__(
        self,
        db_path: str | os.PathLike[str] = DEFAULT_DB_PATH,
        *,
        disk: Disk | None = None,
        **settings: Unpack[EngineSettings],
    ) -> None:
        super().__init__()
        self.config = config_of({**settings, "persistent": True, "db_path": db_path})
        self._disk = disk or Disk()
        self._folder: PrivateFolder | None = None
        self._engine: Log | None = None
        self._schedule: Schedule | None = None
        self._opened_last: Log | None = None

    async def _open(self) -> EventLog:
        if self._folder is None and self.config.db_path == MEMORY_DB_PATH:
            self._folder = await asyncio.to_thread(PrivateFolder)
        engine = self._opened_last = Log(self._path(), self.config.log_options(), self._disk)
        await engine.open()
        self._engine = engine
        self._schedule = Schedule.of(self.config, engine)
        self._schedule.start()
        return engine

    async def close(self) -> None:
        """Close the store; what was acknowledged is kept as its durability says. A second call does nothing."""
        if self._schedule is not None:
            await self._schedule.stop()
        await super().close()
        if self._folder is not None:
            await asyncio.to_thread(self._folder.remove)

    @property
    def maintenance_rounds(self) -> int:
        """How often this store has looked for what is to be dropped, compacted and backed up, since it was opened."""
        return 0 if self._schedule is None else self._schedule.rounds

    @property
    def raises_on_write_failure(self) -> bool:
        """Whether `store_event` raises when the disk fails."""
        return self.config.on_write_failure == "raise"

    def health(self) -> Health:
        """Return whether the store keeps its promises, why not, and since when; `closed` before its first use too."""
        if self._engine is None and self._opened_last is not None and not self._closed:
            # Being opened, or it could not be.
            return self._opened_last.health()
        return super().health()

    def get_stream_stats(self) -> dict[str, dict[str, Any]]:
        """Return figures of every stream: events, bytes, first and last event id and time.

        Raises:
            StoreClosedError: There is a store on disk, and it was not opened yet: use it first, or `async with`.
            DamageError: The catalogue cannot be read.
        """
        if self._engine is None:
            self._refuse_unopened()
        return super().get_stream_stats()

    def get_database_info(self) -> dict[str, Any]:
        """Return figures of the store as a whole: where it is, how large, what it holds, how it does.

        `since_open` holds those of `logstore.storage.LogStats`: cache hits and misses, the lag of the checkpoint,
        `latencies` by operation (`append`, `commit`, `read`, `checkpoint`) and more; None if not open.
        Reads the catalogue, so it is for people and monitoring, not for every request.

        Raises:
            StoreClosedError: There is a store on disk, and it was not opened yet: use it first, or `async with`.
            DamageError: The catalogue cannot be read.
        """
        if self._engine is None:
            self._refuse_unopened()
        stats = None if self._engine is None else self._engine.stats()
        summaries = [] if self._engine is None else self._engine.stream_summaries()
        size = 0 if stats is None else stats.database_bytes
        return {
            "database_path": str(self._path()),
            "database_size_bytes": size,
            "database_size_mb": round(size / _BYTES_PER_MB, 3),
            "total_events": sum(summary.events for summary in summaries),
            "total_streams": len(summaries),
            "durability": self.config.durability,
            "health": self.health()._asdict(),
            "since_open": None if stats is None else msgspec.to_builtins(stats),
        }

    async def sessions(self) -> SessionKeeper:
        """Return the store's registry of sessions."""
        await self.log()
        assert self._engine is not None
        return self._engine.sessions

    async def shared_folder(self) -> Path | None:
        """Return the folder of the log."""
        await self.log()
        assert self._engine is not None
        return self._engine.folder

    def _path(self) -> Path:
        return Path(self.config.db_path) if self._folder is None else self._folder.path / "events.db"

    def _refuse_unopened(self) -> None:
        if self._path().exists():
            raise StoreClosedError(f"the store at {self._path()} is not open yet: use it first, or `async with store`")
