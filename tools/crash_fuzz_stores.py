"""Whole stores with forged files: opened, read, verified, repaired, backed up, restored, exported and imported."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from crash_fuzz_files import FIRST_ID, STORE_ID, JournalTarget, SegmentTarget
from crash_fuzz_inputs import Input, Target, altered_json
from crash_fuzz_lanes import LaneTarget, RegistryTarget
from crash_fuzz_records import sealed
from crash_kill import BrokenPromiseError
from logstore.errors import GapError, LogstoreError
from logstore.ops.access import StoreView, open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.backup.restore import restore
from logstore.ops.compaction.compact import compact_at
from logstore.ops.statistics import store_statistics
from logstore.ops.transfer.export import export_events
from logstore.ops.transfer.importing import import_events
from logstore.ops.verify.repair import repair
from logstore.ops.verify.store import verify
from logstore.storage import Log, LogOptions
from logstore.storage.files import Disk
from logstore.storage.lane import Reservation, first_reservation
from logstore.storage.options import Retention
from logstore.storage.registry import Registry

_OPTIONS: Final = LogOptions(checkpoint_interval_s=0.01)
_OWN: Final = 8


async def _write(path: Path) -> None:
    async with Log(path, _OPTIONS) as log:
        await log.sessions.open("key", b"data", "own/")
        for number in range(_OWN):
            await log.append("own", b"%d" % number)
        while log.stats().unsegmented_bytes:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def _use(path: Path) -> None:
    """Open a store, read everything, and write to it."""
    async with Log(path, _OPTIONS) as log:
        for summary in log.stream_summaries():
            after: str | None = None
            with contextlib.suppress(GapError):
                while events := await log.read(summary.stream, after):
                    if any(event.stream != summary.stream for event in events):
                        raise BrokenPromiseError(f"stream {summary.stream!r} shows another one's events")
                    after = events[-1].event_id
        event_id = await log.append("new", b"new")
        found = await log.read("new", str(int(event_id) - 1))
        if [event.payload for event in found] != [b"new"]:
            raise BrokenPromiseError(f"what was appended is not read: {found}")


class StoreTarget(Target):
    """A store with one forged file in it."""

    name = "store"
    share = 0.02
    cpu_s = 20.0

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="logstore-fuzz-"))
        root = self._home / "template" / "events-log"
        root.mkdir(parents=True)
        with contextlib.closing(Registry(Disk(), root)) as registry:
            registry.open(STORE_ID)
        path = self._home / "template" / "events.db"
        asyncio.run(_write(path))
        lane = root / "lanes" / "0001"
        lane.mkdir()
        (lane / "lock").touch()
        first_reservation(Disk(), lane, Reservation(FIRST_ID + (1 << 30), 64))
        self._sources: dict[str, Target] = {
            "lanes/0001/0000000001.journal": JournalTarget(),
            "segments/7.segment": SegmentTarget(),
            "registry.log": RegistryTarget(),
            "lanes/0001/state": LaneTarget(),
        }

    def draw(self, rng: random.Random) -> Input:
        name = rng.choice([*self._sources, "lanes/0001/0000000001.journal", "segments/7.segment"])
        given = self._sources[name].draw(rng)
        marks = name == "lanes/0001/state" and given.numbers[0] == 0
        return Input(given.data, given.forged, (list(self._sources).index(name), marks, rng.getrandbits(32)))

    def feed(self, given: Input) -> bool:
        rng = random.Random(given.numbers[2])
        folder = self._home / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._home / "template", folder)
        path = folder / "events.db"
        name = "lanes/0001/marks" if given.numbers[1] else list(self._sources)[given.numbers[0]]
        place = folder / "events-log" / name
        place.write_bytes(given.data)
        if rng.random() < 0.2:
            path.unlink()
        self._look(path)
        opened = True
        try:
            asyncio.run(_use(path))
        except LogstoreError:
            opened = False
        self._work(path, folder, rng)
        return opened

    def _look(self, path: Path) -> None:
        """Look at a store without opening it."""
        with contextlib.suppress(LogstoreError):
            verify(path)
        with contextlib.suppress(LogstoreError):
            msgspec.json.encode(store_statistics(path))
        with contextlib.suppress(LogstoreError), StoreView(path) as view:
            for summary in view.summaries():
                with contextlib.suppress(GapError):
                    list(view.events(summary.stream))

    def _work(self, path: Path, folder: Path, rng: random.Random) -> None:
        """Do to a store what operators do."""
        with contextlib.suppress(LogstoreError):
            repair(path)
        with contextlib.suppress(LogstoreError):
            out = io.BytesIO()
            export_events(path, out, form=rng.choice(("json", "ndjson")))
            out.seek(0)
            import_events(folder / "other.db", out)
        with contextlib.suppress(LogstoreError):
            compact_at(path, Retention(max_age_s=1, max_events=2, resume_window_s=0))
        with contextlib.suppress(LogstoreError):
            target = FolderTarget(default_backups(path))
            store = open_existing(path)
            try:
                create_backup(store, target)
            finally:
                store.close(empty=True)
            restore(target.folder, folder / "restored" / "events.db")

    def close(self) -> None:
        for source in self._sources.values():
            source.close()
        shutil.rmtree(self._home)


class RestoreTarget(Target):
    """Backups that somebody made up: manifests whose checksum matches, and objects named by theirs."""

    name = "restore"
    share = 0.05
    cpu_s = 20.0

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="logstore-fuzz-"))
        path = self._home / "events.db"
        # The first run of two is dropped, and its file stays: one more stream is in it.
        asyncio.run(_write(path))
        asyncio.run(_write(path))
        compact_at(path, Retention(max_events=2, resume_window_s=0))
        self._target = FolderTarget(default_backups(path))
        store = open_existing(path)
        try:
            create_backup(store, self._target)
        finally:
            store.close(empty=True)
        (self._key,) = self._target.manifests()
        self._manifest = json.loads((self._target.folder / self._key).read_bytes())["backup"]

    def draw(self, rng: random.Random) -> Input:
        return Input(altered_json(self._manifest, rng), True, (rng.getrandbits(32),))

    def feed(self, given: Input) -> bool:
        rng = random.Random(given.numbers[0])
        backup = given.data
        dropped = next(each for each in self._manifest["files"] if each["kind"] == "dropped")
        if rng.random() < 0.3:
            # Another object in its place, under its own name.
            rows = [["own", rng.choice((5, "5", -1, 1 << 70, None)), "2026-01-31 12:00:00"], ["x", 7, None]]
            data = b"\n".join(
                altered_json(row, rng) if rng.random() < 0.5 else json.dumps(row).encode() for row in rows
            )
            digest = hashlib.sha256(data).hexdigest()
            self._target.put(f"objects/{digest[:2]}/{digest}", [data])
            other = {**dropped, "sha256": digest, "bytes": len(data)}
            backup = json.dumps(self._manifest).replace(json.dumps(dropped), json.dumps(other)).encode()
        (self._target.folder / self._key).write_bytes(sealed(backup))
        place = self._home / "restored" / "events.db"
        shutil.rmtree(place.parent, ignore_errors=True)
        restore(self._target.folder / self._key, place)
        outside = [each for each in place.parent.iterdir() if each.name not in ("events.db", "events-log")]
        if outside:
            raise BrokenPromiseError(f"a restore leaves {outside}")
        self._check(place)
        return True

    def _check(self, place: Path) -> None:
        """Check that what was restored is a store that works."""
        asyncio.run(_use(place))
        msgspec.json.encode(store_statistics(place))

    def close(self) -> None:
        shutil.rmtree(self._home)


STORE_TARGETS: Final[tuple[type[Target], ...]] = (StoreTarget, RestoreTarget)
