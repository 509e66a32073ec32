"""The parsers of what lies beside the log as JSON: figures, manifests of backups, what is on record as lost."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import msgspec

from crash_fuzz_inputs import Input, Target, altered_json, damaged
from crash_kill import BrokenPromiseError
from logstore.ops.access import open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.manifest import read_manifest
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.backup.rotation import check_backup, list_backups
from logstore.ops.statistics import store_statistics
from logstore.ops.verify.losses import Known, Losses, LostRun, iso_moment, record_losses, recorded_losses
from logstore.storage import Log
from logstore.storage.figures import read_figures
from logstore.storage.files import Disk

_DISK: Final = Disk()
_KEY: Final = "20261123T101530.123456Z.backup.json"


@contextlib.contextmanager
def _folder() -> Generator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="logstore-fuzz-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def sealed(backup: bytes) -> bytes:
    """Return a manifest whose checksum matches, whatever is in it."""
    return b'{"sha256":"%b","backup":%b}' % (hashlib.sha256(backup).hexdigest().encode(), backup)


async def _write_store(path: Path) -> bytes:
    """Write a small store, and return what its process published of itself."""
    async with Log(path) as log:
        await log.append_many([("one", b"1", 0), ("two", b"2", 2)])
        figures = path.with_name(f"{path.stem}-log") / "lanes" / "0000" / "figures.json"
        while not figures.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return figures.read_bytes()


class FiguresTarget(Target):
    """What processes publish of themselves."""

    name = "figures"
    share = 0.1

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self._path = self._undo.enter_context(_folder()) / "events.db"
        self._sample = asyncio.run(_write_store(self._path))

    def draw(self, rng: random.Random) -> Input:
        if rng.random() < 0.6:
            return Input(altered_json(json.loads(self._sample), rng), True)
        return Input(damaged(self._sample, rng))

    def feed(self, given: Input) -> bool:
        lane = self._path.with_name("events-log") / "lanes" / "0000"
        (lane / "figures.json").write_bytes(given.data)
        found = read_figures(_DISK, lane)
        msgspec.json.encode(store_statistics(self._path, per_stream=False))
        return found is not None

    def close(self) -> None:
        self._undo.close()


class ManifestTarget(Target):
    """Manifests of backups."""

    name = "manifest"

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        folder = self._undo.enter_context(_folder())
        asyncio.run(_write_store(folder / "events.db"))
        self._target = FolderTarget(default_backups(folder / "events.db"))
        store = open_existing(folder / "events.db")
        try:
            create_backup(store, self._target)
        finally:
            store.close(empty=True)
        (key,) = self._target.manifests()
        self._sample = (self._target.folder / key).read_bytes()
        self._known = read_manifest(self._target, key)
        (self._target.folder / key).unlink()

    def draw(self, rng: random.Random) -> Input:
        if rng.random() < 0.6:
            backup = altered_json(json.loads(self._sample)["backup"], rng)
            return Input(sealed(backup), True)
        return Input(damaged(self._sample, rng))

    def feed(self, given: Input) -> bool:
        (self._target.folder / _KEY).write_bytes(given.data)
        (info,) = list_backups(self._target)
        manifest = read_manifest(self._target, _KEY)
        if not given.forged and manifest != self._known:
            raise BrokenPromiseError("a manifest was taken that was never written")
        if info.problem is None:
            check_backup(self._target, _KEY)
        for file in manifest.files:
            if (
                ".." in file.path
                or file.path.startswith("/")
                or not file.key.isprintable()
                or not file.path.isprintable()
            ):
                raise BrokenPromiseError(f"a manifest names a place outside: {file.path!r}, {file.key!r}")
        return True

    def close(self) -> None:
        self._undo.close()


class LostTarget(Target):
    """What is on record as lost."""

    name = "lost"

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self._root = self._undo.enter_context(_folder())
        losses = Losses(
            file="segments/5.segment",
            reason="damaged",
            kept_in="damaged/5",
            found_at=iso_moment(),
            lost=[LostRun("one", "3770000000000000000", "3770000000000000009", 4), LostRun("two", "5", "5", 1)],
        )
        self._place = record_losses(_DISK, self._root, "5", losses)
        self._sample = self._place.read_bytes()

    def draw(self, rng: random.Random) -> Input:
        if rng.random() < 0.6:
            return Input(altered_json(json.loads(self._sample), rng), True)
        return Input(damaged(self._sample, rng))

    def feed(self, given: Input) -> bool:
        self._place.write_bytes(given.data)
        found = recorded_losses(_DISK, self._root)
        rows: list[tuple[Any, ...]] = [(each.file, 1, 2, None, each.reason, "", each.found_at) for each in found]
        known = Known(found, rows, self._root)
        known.explains(3770000000000000000, "one")
        msgspec.json.encode(known.findings)
        return bool(found)

    def close(self) -> None:
        self._undo.close()


RECORD_TARGETS: Final[tuple[type[Target], ...]] = (FiguresTarget, ManifestTarget, LostTarget)
