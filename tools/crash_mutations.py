"""What the mutation campaign takes out of the durability code, and which proof must fail for each."""

from __future__ import annotations

from typing import Final, NamedTuple

Proof = tuple[str, ...]
"""A campaign, `("crash", name, …options)`, or what pytest is to run."""


class Mutation(NamedTuple):
    """One thing that is taken out.

    Attributes:
        name: What is missing then.
        file: Below `logstore/`.
        old: Text that stands there once.
        new: What takes its place.
        proofs: One of them must fail; the likeliest first.
    """

    name: str
    file: str
    old: str
    new: str
    proofs: tuple[Proof, ...]


_POWER: Final[Proof] = ("crash", "power", "--runs", "60")
_DAMAGE: Final[Proof] = ("crash", "damage", "--runs", "40")
_PROCESSES: Final[Proof] = ("crash", "processes", "--events", "20000", "--kills", "6")


def _tests(*names: str) -> Proof:
    return tuple(f"tests/{name}.py" for name in names)


_SYNCS: Final = [
    Mutation(
        "sync: of a journal",
        "storage/journal.py",
        "        self._disk.sync(self._fd)\n        self.durable = self.end",
        "        self.durable = self.end",
        (_tests("storage/test_journal"), _POWER),
    ),
    Mutation(
        "sync: of a commit before it is acknowledged",
        "storage/commit.py",
        "        if sync:\n            lane.sync()\n        lane.show()",
        "        lane.show()",
        (_tests("test_acknowledgement"), _POWER),
    ),
    Mutation(
        "sync: of the folder of a new journal",
        "storage/journal.py",
        "            disk.sync_folder(path.parent)\n        except BaseException:",
        "        except BaseException:",
        (_tests("storage/test_journal", "storage/test_lane"), _POWER),
    ),
    Mutation(
        "sync: of a reservation",
        "storage/lane.py",
        "    disk.write(fd, fields + _CRC.pack(google_crc32c.value(fields)), slot)\n    disk.sync(fd)",
        "    disk.write(fd, fields + _CRC.pack(google_crc32c.value(fields)), slot)",
        (_tests("storage/test_lane"), _POWER),
    ),
    Mutation(
        "sync: of the folder of a first reservation",
        "storage/lane.py",
        "            self._disk.sync_folder(self.folder)\n            self._state_in_folder = True",
        "            self._state_in_folder = True",
        (_tests("storage/test_lane"), _POWER),
    ),
    Mutation(
        "sync: of segments before the index names them",
        "storage/checkpoint.py",
        "            segment.writer.sync()\n",
        "            pass\n",
        (_tests("test_log", "test_acknowledgement"), _POWER),
    ),
    Mutation(
        "sync: of the folder of segments",
        "storage/checkpoint.py",
        '            self._disk.sync_folder(self._root / "segments")\n        finished',
        "            pass\n        finished",
        (_POWER,),
    ),
    Mutation(
        "sync: of the registry",
        "storage/registry.py",
        "        self._disk.sync(self._fd)\n        self._failed = False",
        "        self._failed = False",
        (_tests("storage/test_registry"), _POWER),
    ),
    Mutation(
        "sync: of a file before it is published",
        "storage/files.py",
        "                self.write(fd, data, 0)\n                self.sync(fd)\n",
        "                self.write(fd, data, 0)\n",
        (_tests("storage/test_files"), _POWER),
    ),
    Mutation(
        "sync: of the folder of a published file",
        "storage/files.py",
        "            raise\n        self.sync_folder(path.parent)",
        "            raise",
        (_tests("storage/test_files"), _POWER),
    ),
    Mutation(
        "sync: of the parent of a new folder",
        "storage/files.py",
        "        self.sync_folder(folder.parent)\n",
        "",
        (_tests("storage/test_files"), _POWER),
    ),
    Mutation(
        "sync: of what compaction has written",
        "ops/compaction/rewrite.py",
        "        output.writer.sync()\n",
        "",
        (_tests("ops/test_compaction", "ops/test_operating_faults"), _POWER),
    ),
    Mutation(
        "sync: of the folder of a segment that compaction published",
        "storage/segment.py",
        "        self.path = path\n        self._disk.sync_folder(path.parent)",
        "        self.path = path",
        (_tests("storage/test_segment", "ops/test_compaction"), _POWER),
    ),
    Mutation(
        "sync: of an index that was made again",
        "storage/indexing.py",
        "        # SQLite has synced nothing of it.\n        disk.sync(fd)",
        "        pass",
        (_tests("storage/test_indexing", "ops/test_reindex"), _POWER),
    ),
    Mutation(
        "sync: of an object of a backup",
        "ops/backup/pool.py",
        "                disk.sync(fd)\n",
        "",
        (_tests("ops/test_backup"), _POWER),
    ),
    Mutation(
        "sync: of the folders of a backup's objects",
        "ops/backup/pool.py",
        "        for folder in self._object_folders():\n            self._disk.sync_folder(folder)\n",
        "",
        (_tests("ops/test_backup"), _POWER),
    ),
    Mutation(
        "sync: of the old store's folders before a restore moves the new one in",
        "storage/replacement.py",
        "    for folder in (aside, root, path.parent):\n        disk.sync_folder(folder)\n",
        "",
        (_tests("ops/test_restore"), _POWER),
    ),
]

_ORDERS: Final = [
    Mutation(
        "order: an event is shown after its sync",
        "storage/commit.py",
        "        if sync:\n            lane.sync()\n        lane.show()",
        "        lane.show()\n        if sync:\n            lane.sync()",
        (_tests("test_acknowledgement"),),
    ),
    Mutation(
        "order: after a sync a batch begins on a page of its own",
        "storage/journal.py",
        "        self._fresh_page = True",
        "        self._fresh_page = False",
        (_tests("storage/test_journal"), _POWER),
    ),
    Mutation(
        "order: a journal is sealed before the next one begins",
        "storage/lane.py",
        "            self.journal.seal()\n",
        "            self.journal.close()\n",
        (_tests("storage/test_lane", "test_acknowledgement"), _POWER),
    ),
    Mutation(
        "order: journals go after the commit that has their events",
        "storage/checkpoint.py",
        "        self._done += journals\n        try:",
        "        try:",
        (_tests("storage/test_recovery", "test_log", "test_disk_failure"),),
    ),
    Mutation(
        "order: a reader pins journals before it asks the index",
        "storage/reader.py",
        "        self._foreign.read_on()\n"
        "        elsewhere = self._foreign.frames(stream, after, limit)\n"
        "        events = {event.id: event for frames in (own, elsewhere) for event in map(decode_frame, frames)}\n"
        "        found = self._in_segments(stream, after, limit)\n",
        "        found = self._in_segments(stream, after, limit)\n"
        "        self._foreign.read_on()\n"
        "        elsewhere = self._foreign.frames(stream, after, limit)\n"
        "        events = {event.id: event for frames in (own, elsewhere) for event in map(decode_frame, frames)}\n",
        (_tests("test_handover"), _PROCESSES),
    ),
    Mutation(
        "order: what a failed journal may not hold is written again",
        "storage/commit.py",
        '            self._timers.start("rewrite", self._retry_s, self._start_rewrite)\n        self.room_changed()',
        "        self.room_changed()",
        (_tests("test_disk_failure"),),
    ),
    Mutation(
        "order: recovery forgets the cache before it reads",
        "storage/scan.py",
        "        disk.forget_cache(fd)\n",
        "",
        (_tests("test_acknowledgement", "storage/test_recovery"),),
    ),
    Mutation(
        "order: a file ends where its successor says",
        "storage/recovery.py",
        "        scan = scan_journal(data, path, witness, end)",
        "        scan = scan_journal(data, path, witness, None)",
        (_tests("test_disk_failure", "storage/test_recovery"),),
    ),
    Mutation(
        "order: a session is released when its events are in segments",
        "storage/sessions.py",
        "            await checkpointer.empty(session.stream_prefix)\n",
        "            pass\n",
        (_tests("mcp/test_layer_faults", "test_processes", "test_acknowledgement", "test_log"),),
    ),
]

_COMPARISONS: Final = [
    Mutation(
        "comparison: the body of a batch",
        "storage/journal.py",
        "            if self._checksum(data, start - base, stop - base) != header.checksum:",
        "            if stop - start != header.length:",
        (_tests("storage/test_journal"), _DAMAGE),
    ),
    Mutation(
        "comparison: the header of a batch",
        "storage/journal.py",
        "    if _CRC.unpack_from(data, offset + _FIELDS.size)[0] != chain:\n        return None\n",
        "",
        (_tests("storage/test_journal"), _DAMAGE),
    ),
    Mutation(
        "comparison: the chain of batches",
        "storage/journal.py",
        " or self._chain not in (None, header.previous)",
        "",
        (_tests("storage/test_journal"),),
    ),
    Mutation(
        "comparison: a file's header",
        "storage/header.py",
        "    if _CRC.unpack_from(data, _FIELDS.size)[0] != google_crc32c.value(data[: _FIELDS.size]):",
        "    if len(data) < _FIELDS.size:",
        (_tests("storage/test_header"),),
    ),
    Mutation(
        "comparison: an entry of the registry",
        "storage/registry.py",
        " and checksums.extend(seed, start, end) == checksum:",
        ":",
        (_tests("storage/test_registry"), _DAMAGE),
    ),
    Mutation(
        "comparison: a reservation",
        "storage/lane.py",
        "    if checksum != _CRC.pack(google_crc32c.value(fields)):",
        "    if len(checksum) != _CRC.size:",
        (_tests("storage/test_lane"), _DAMAGE),
    ),
]

_LOCKS: Final = [
    Mutation(
        "lock: of a lane",
        "storage/lane.py",
        '            if (lock := disk.lock(folder / "lock")) is not None:',
        '            if (lock := disk.lock(folder / "lock", shared=True)) is not None:',
        (_tests("storage/test_lane", "test_processes"), _PROCESSES),
    ),
    Mutation(
        "lock: of the registry",
        "storage/registry.py",
        '        lock = self._disk.lock(self._root / "registry.lock", wait=True)',
        '        lock = self._disk.lock(self._root / "registry.lock", wait=True, shared=True)',
        (_tests("storage/test_registry", "mcp/test_layer_faults"), _PROCESSES),
    ),
    Mutation(
        "lock: of the checkpoint",
        "storage/opening.py",
        "        while (lock := self.disk.lock(path)) is None:",
        "        while (lock := self.disk.lock(path, shared=True)) is None:",
        (_tests("test_bad_input", "test_log"), _PROCESSES),
    ),
    Mutation(
        "lock: of compaction",
        "storage/opening.py",
        '        return self.disk.lock(self.root / "compaction.lock")',
        '        return self.disk.lock(self.root / "compaction.lock", shared=True)',
        (_tests("ops/test_compaction"), _PROCESSES),
    ),
    Mutation(
        "lock: of a dead lane that is adopted",
        "storage/opening.py",
        '            lock = self.disk.lock(folder / "lock")\n            if lock is None:',
        '            lock = self.disk.lock(folder / "other", wait=True)\n            if lock is None:',
        (_tests("test_processes", "test_log"), _PROCESSES),
    ),
    Mutation(
        "lock: of the whole store, against a restore",
        "storage/opening.py",
        "            lock = self.disk.lock(path, shared=not replacing)",
        '            lock = self.disk.lock(path.with_name("other.lock"), shared=not replacing)',
        (_tests("ops/test_restore"),),
    ),
]

MUTATIONS: Final[tuple[Mutation, ...]] = (*_SYNCS, *_ORDERS, *_COMPARISONS, *_LOCKS)
