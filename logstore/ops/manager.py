"""What an operator does to a store, as plain calls; each is a function of this package, with a path for its store.

They work while other processes, or this one, have the store open, and may be called from any thread. Each waits for the
locks that it needs and gives up with `StoreLockedError` when their holder does not get on. From code that runs on an
event loop call them with `asyncio.to_thread`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from logstore.config import DEFAULT_DB_PATH
from logstore.ops.access import open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.backup.restore import restore
from logstore.ops.backup.rotation import delete_old
from logstore.ops.maintenance import validate
from logstore.ops.statistics import store_statistics
from logstore.ops.transfer.export import export_events
from logstore.ops.transfer.importing import import_events
from logstore.storage.opening import OpenStore

logger = logging.getLogger("logstore")


class EventStoreManager:
    """Operates the store at a path.

    Args:
        db_path: The SQLite catalogue of the store.
        backup_folder: Where backups are; `<stem>-backups/` beside the catalogue when not given.
    """

    def __init__(
        self, db_path: str | os.PathLike[str] = DEFAULT_DB_PATH, backup_folder: str | os.PathLike[str] | None = None
    ) -> None:
        self._path = Path(db_path)
        self._backups = FolderTarget(default_backups(self._path) if backup_folder is None else Path(backup_folder))

    @contextlib.contextmanager
    def _opened(self) -> Generator[OpenStore]:
        store = open_existing(self._path)
        try:
            yield store
        finally:
            store.close(empty=True)

    def create_backup(self) -> str:
        """Back the store up as it is now, and return the path of the backup, for `restore_from_backup`.

        On return the backup is on disk, and what it copied is verified. It copies only what earlier backups do not
        have; `validate_database` reads all of them.

        Raises:
            NotAStoreError: There is no store.
            LogstoreError: It cannot be opened or read, or a lock is not given up.
            OSError: The backup folder refuses.
        """
        with self._opened() as store:
            return create_backup(store, self._backups).path

    def restore_from_backup(self, backup_path: str | os.PathLike[str], *, until: datetime | None = None) -> None:
        """Put the store back as a backup has it; the present one goes once the new one has verified.

        Args:
            backup_path: From `create_backup`.
            until: Leave out events that were recorded later.

        Raises:
            StoreLockedError: The store is open, with the pids that have it.
            DamageError: The backup is damaged or not complete; the store is untouched.
            NotAStoreError: There is no backup at the path.
        """
        restore(Path(backup_path), self._path, until=until)

    def cleanup_old_backups(self, retention_days: float = 7) -> int:
        """Remove backups that are older, and return how many; the newest whole one stays."""
        return delete_old(self._backups, retention_days)

    def get_database_stats(self) -> dict[str, Any]:
        """Return figures of the store and of each process that has it open, with their age.

        Raises:
            NotAStoreError: There is no store.
        """
        figures: dict[str, Any] = msgspec.to_builtins(store_statistics(self._path))
        return figures

    def validate_database(self) -> dict[str, Any]:
        """Read every byte of log, catalogue and backups, and check them against each other. Changes nothing.

        Returns:
            `valid`; `errors`, a line for each thing that was found; `advice`, what to do; and what was read.

        Raises:
            NotAStoreError: There is no store.
        """
        return validate(self._path)

    def export_events(
        self,
        path: str | os.PathLike[str],
        *,
        stream_id: str | None = None,
        start_date: str | datetime | None = None,
        end_date: str | datetime | None = None,
    ) -> int:
        """Write events to a JSON file and return how many.

        Args:
            path: The file.
            stream_id: Only this stream.
            start_date: Only events recorded then or later; text in ISO 8601, UTC when it names no zone.
            end_date: Only events recorded then or earlier.

        Raises:
            NotAStoreError: There is no store.
            OSError: The file cannot be written; nothing is left of it.
        """
        return export_events(self._path, Path(path), stream=stream_id, start=start_date, end=end_date)

    def import_events(self, path: str | os.PathLike[str]) -> int:
        """Add the events of a file that are not in the store yet, and return how many; durable on return.

        What is left out is logged: another event under the same id, and what is no event.

        Args:
            path: An export of this or another store, or a SQLite database of the original store or of mcp-persist.

        Raises:
            LogstoreError: The file cannot be understood, or the store not be opened.
        """
        result = import_events(self._path, Path(path))
        for each in [*result.conflicts, *result.invalid]:
            logger.error("not imported from %s: %s", path, each)
        if result.ended is not None:
            logger.error("the import from %s ended early: %s", path, result.ended)
        return result.added
