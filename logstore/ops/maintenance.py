"""What a store needs now and then, as one round: retention and compaction, a backup when one is due, rotation."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from logstore.config import EventStoreConfig, config_of
from logstore.errors import LogstoreError, StoreLockedError
from logstore.ops.access import open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.backup.rotation import delete_old, list_backups
from logstore.ops.compaction.compact import compact
from logstore.ops.verify.store import verify
from logstore.storage.catalogue import iso_now
from logstore.storage.opening import OpenStore
from logstore.storage.options import Retention

logger = logging.getLogger("logstore")

_HOUR_S = 3600


@dataclass(frozen=True)
class Tasks:
    """What is to be done to a store.

    Attributes:
        retention: What is kept.
        backups: Where backups go, None for none.
        backup_interval_s: Age of the newest backup at which another is made.
        backup_retention_days: Age at which backups go.
    """

    retention: Retention
    backups: Path | None = None
    backup_interval_s: float = 24 * _HOUR_S
    backup_retention_days: float = 7

    @classmethod
    def of(cls, config: EventStoreConfig, path: Path) -> Tasks:
        """Return what a configuration asks for, for the store at a path."""
        return cls(
            retention=config.retention(),
            backups=default_backups(path) if config.backup_enabled else None,
            backup_interval_s=config.backup_interval_hours * _HOUR_S,
            backup_retention_days=config.backup_retention_days,
        )


def run_round(store: OpenStore, tasks: Tasks) -> dict[str, Any]:
    """Do what is due, and return what each task did; one that fails is logged and does not keep the others from theirs.

    Returns:
        `retention`, `backup` and `rotation`, each with its figures, or with `skipped` or `error` and the reason.
    """
    results = {"retention": _attempt(store, "retention", lambda: _retain(store, tasks))}
    if tasks.backups is not None:
        target = FolderTarget(tasks.backups, store.disk)
        results["backup"] = _attempt(store, "backup", lambda: _back_up(store, target, tasks.backup_interval_s))
        if "path" in results["backup"]:
            results["rotation"] = _attempt(store, "rotation", lambda: _rotate(target, tasks.backup_retention_days))
        else:
            # It keeps everybody else out of the folder.
            results["rotation"] = {"skipped": "after the next backup"}
    return results


def _retain(store: OpenStore, tasks: Tasks) -> dict[str, Any]:
    done = compact(store, tasks.retention)
    figures = done._asdict()
    figures["dropped"] = [each._asdict() for each in done.dropped]
    return figures


def _back_up(store: OpenStore, target: FolderTarget, interval_s: float) -> dict[str, Any]:
    lock = store.disk.lock(store.root / "backup.lock")
    if lock is None:
        return {"skipped": "another process makes one"}
    with lock:
        return _back_up_when_due(store, target, interval_s)


def _back_up_when_due(store: OpenStore, target: FolderTarget, interval_s: float) -> dict[str, Any]:
    whole = [backup for backup in list_backups(target) if backup.problem is None]
    if whole:
        age_s = (datetime.now(UTC) - datetime.fromisoformat(whole[-1].begun)).total_seconds()
        # Also when the clock stepped back: a backup of the future must not keep others from being made.
        if 0 <= age_s < interval_s:
            return {"skipped": f"the newest is {age_s / _HOUR_S:.1f} hours old"}
    return create_backup(store, target)._asdict()


def _rotate(target: FolderTarget, max_age_days: float) -> dict[str, Any]:
    return {"deleted": delete_old(target, max_age_days)}


def _attempt(store: OpenStore, task: str, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started, started_s = iso_now(), time.monotonic()
    try:
        result = job()
    except StoreLockedError as error:
        # Another process is at it, for all.
        return {"skipped": str(error)}
    except (LogstoreError, OSError, sqlite3.Error) as error:
        logger.error("%s of %s failed, the next round tries again: %s", task, store.catalogue.path, error)
        return {"error": str(error)}
    if _did_something(result):
        _note(store, task, started, {**result, "seconds": round(time.monotonic() - started_s, 3)})
    return result


def _did_something(result: Mapping[str, Any]) -> bool:
    return any(value for name, value in result.items() if name not in ("seconds", "skipped"))


def _note(store: OpenStore, task: str, started: str, result: Mapping[str, Any]) -> None:
    """Show in the catalogue what was done last, and by whom."""
    try:
        with store.changing_catalogue(store.catalogue.inode) as catalogue:
            catalogue.connection.execute(
                "INSERT OR REPLACE INTO maintenance VALUES (?, ?, ?, ?, ?)",
                (task, os.getpid(), started, iso_now(), _as_json(result)),
            )
    except (LogstoreError, OSError, sqlite3.Error) as error:
        logger.warning("what %s did cannot be noted in the catalogue: %s", task, error)


def _as_json(result: Mapping[str, Any]) -> str:
    """Return JSON of ASCII alone: paths are in it, which need not be text, and what is none has an escape there."""
    return json.dumps(msgspec.to_builtins(result), separators=(",", ":"))


async def run_maintenance_tasks(
    db_path: str | os.PathLike[str], config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Do everything that a store needs, now, also while other processes have it open.

    Args:
        db_path: The catalogue.
        config: Settings as in `EventStoreConfig.__dict__`; retention and backups are taken from them.

    Returns:
        `retention`, `backup`, `rotation` (these two when backups are enabled) and `validation`, each with its figures,
        or with `skipped` or `error` and the reason.

    Raises:
        NotAStoreError: There is no store at the path.
        ConfigurationError: A setting is unknown or out of range.
        LogstoreError: The store cannot be opened.
    """
    path = Path(db_path)
    tasks = Tasks.of(config_of(dict(config or {})), path)
    return await asyncio.to_thread(_run_all, path, tasks)


def _run_all(path: Path, tasks: Tasks) -> dict[str, Any]:
    store = open_existing(path)
    try:
        results = run_round(store, tasks)
    finally:
        store.close(empty=True)
    results["validation"] = validate(path)
    return results


def validate(path: Path) -> dict[str, Any]:
    """Verify a store and its backups, and return the outcome as the manager shows it: `valid`, `errors`, figures.

    Raises:
        NotAStoreError: There is no store at the path.
        StoreLockedError: A restore is under way.
    """
    report = verify(path)
    errors = [
        f"{each.file}{'' if each.offset is None else f' at offset {each.offset}'}: {each.reason}"
        for each in report.findings
    ]
    return {"valid": report.ok, "errors": errors, **report.as_dict()}
