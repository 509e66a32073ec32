"""What there is in a pool of backups: listed, verified, and removed when it is old."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from logstore.errors import DamageError, FormatVersionError
from logstore.ops.backup.manifest import Manifest, StoredFile, missing_objects, read_manifest, time_of
from logstore.ops.backup.pool import OtherBytesError, Target, verified
from logstore.ops.progress import Progress, silent

logger = logging.getLogger("logstore")


class BackupInfo(NamedTuple):
    """A backup as it is listed.

    Attributes:
        key: Key of its manifest.
        path: Where that is.
        begun: ISO time; the backup holds what was acknowledged then.
        events: Events that it holds.
        bytes: Length of all its files, which it may share with other backups.
        damaged: How many files were damaged when they were copied.
        problem: Why it cannot be restored; None for one that is whole, as far as names and lengths tell.
    """

    key: str
    path: str
    begun: str
    events: int
    bytes: int
    damaged: int
    problem: str | None


def list_backups(target: Target) -> list[BackupInfo]:
    """Return all backups, oldest first; no object is read."""
    return [_info(target, key) for key in target.manifests()]


def _info(target: Target, key: str) -> BackupInfo:
    path = target.locate(key)
    try:
        manifest = read_manifest(target, key)
    except (DamageError, FormatVersionError, OSError) as error:
        begun = time_of(key)
        return BackupInfo(key, path, begun.isoformat() if begun else "", 0, 0, 0, str(error))
    missing = missing_objects(target, manifest)
    problem = f"{len(missing)} files are missing, such as {missing[0]}" if missing else None
    return BackupInfo(key, path, manifest.begun, manifest.events, manifest.bytes, len(manifest.damaged), problem)


def check_backup(target: Target, key: str, *, progress: Progress = silent) -> list[str]:
    """Read every byte of a backup and return what is wrong with it, none when it can be restored whole.

    Args:
        target: The pool.
        key: Key of the manifest.
        progress: Told of the bytes.
    """
    with target.reading():
        try:
            manifest = read_manifest(target, key)
        except (DamageError, FormatVersionError, OSError) as error:
            return [str(error)]
        problems: list[str] = []
        done = 0
        for file in manifest.files:
            problems += _check_object(target, file)
            done += file.bytes
            progress("verifying the backup", done, manifest.bytes)
    return problems


def _check_object(target: Target, file: StoredFile) -> list[str]:
    place = target.locate(file.key)
    try:
        for _ in verified(target.read(file.key), file.sha256, place):
            pass
    except FileNotFoundError:
        return [f"{file.path}: {place} is missing"]
    except (OtherBytesError, OSError) as error:
        return [f"{file.path}: {error}"]
    return []


def delete_old(target: Target, max_age_days: float) -> int:
    """Remove backups that are older than `max_age_days`, then the objects that none names any more.

    The newest whole backup of a store, in which nothing was damaged, stays, however old it is. A crash in between
    leaves objects without a manifest, which the next call removes.

    Returns:
        How many backups were removed.

    Raises:
        StoreLockedError: A backup or a restore is under way.
        OSError: The place refuses.
    """
    if not target.manifests():
        # Without a single manifest nothing says what the objects are for.
        return 0
    oldest = datetime.now(UTC) - timedelta(days=max_age_days)
    with target.removing():
        kept, old = _divide(target, oldest)
        for key in old:
            target.delete(key)
        # An object must not go before every manifest that names it is gone, whatever a power cut takes back.
        target.sync()
        if None in kept.values():
            logger.warning("a manifest in %s cannot be read: no objects are removed", target.locate(""))
        else:
            _sweep(target, [manifest for manifest in kept.values() if manifest is not None])
    return len(old)


def _divide(target: Target, oldest: datetime) -> tuple[dict[str, Manifest | None], list[str]]:
    """Return the manifests to keep, those that cannot be read as None, and the keys of those to remove."""
    kept: dict[str, Manifest | None] = {}
    old: list[str] = []
    # Stores of which a newer backup has all its objects; and of those, in which nothing was damaged when it was made.
    there: set[int] = set()
    whole: set[int] = set()
    for key in reversed(target.manifests()):
        begun = time_of(key)
        is_old = begun is not None and begun < oldest
        try:
            manifest = read_manifest(target, key)
        except DamageError:
            if is_old:
                old.append(key)
            else:
                kept[key] = None
            continue
        except FormatVersionError:
            kept[key] = None
            continue
        if is_old and manifest.store_id in (there if manifest.damaged else whole):
            old.append(key)
        else:
            kept[key] = manifest
            if not missing_objects(target, manifest):
                there.add(manifest.store_id)
                if not manifest.damaged:
                    whole.add(manifest.store_id)
    return kept, old


def _sweep(target: Target, manifests: list[Manifest]) -> None:
    named = {file.key for manifest in manifests for file in manifest.files}
    target.remove_unfinished()
    for key in target.objects():
        if key not in named:
            target.delete(key)
