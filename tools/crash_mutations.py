"""What the mutation campaign takes out of the durability code, and which proof must fail for each."""

from __future__ import annotations

from typing import Final

from crash_mutations_syncs import SYNCS
from crash_mutations_type import DAMAGE, POWER, PROCESSES, Mutation, tests

_ORDERS: Final = [
    Mutation(
        "order: an event is shown after its sync",
        "storage/commit.py",
        "        if sync:\n            lane.sync()\n        lane.show()",
        "        lane.show()\n        if sync:\n            lane.sync()",
        (tests("test_acknowledgement"),),
    ),
    Mutation(
        "order: an event that the loop has written is shown after its sync",
        "storage/commit.py",
        "            if sync:\n                self._work.sync(written)",
        "            self._lane.show()\n            if sync:\n                self._work.sync(written)",
        (tests("test_acknowledgement"),),
    ),
    Mutation(
        "order: nothing is written beside a sync",
        "storage/commit.py",
        "        return self._work.is_free and not self._pending.ids and self._lane",
        "        return not self._pending.ids and self._lane",
        (tests("storage/test_kernel_sync"),),
    ),
    Mutation(
        "order: after a sync a batch begins on a page of its own",
        "storage/journal.py",
        "        self._fresh_page = True",
        "        self._fresh_page = False",
        (tests("storage/test_journal"), POWER),
    ),
    Mutation(
        "order: a journal is sealed before the next one begins",
        "storage/lane.py",
        "            self.journal.seal()\n",
        "            self.journal.close()\n",
        (tests("storage/test_lane", "test_acknowledgement"), POWER),
    ),
    Mutation(
        "order: the index waits for the sync of the segments that it names",
        "storage/checkpoint.py",
        "                synced.result()\n",
        "                pass\n",
        (tests("test_disk_failure", "storage/test_recovery"), POWER),
    ),
    Mutation(
        "order: journals go after the commit that has their events",
        "storage/checkpoint.py",
        "        self._done += journals\n        try:",
        "        try:",
        (tests("storage/test_recovery", "test_log", "test_disk_failure"),),
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
        (tests("test_handover"), PROCESSES),
    ),
    Mutation(
        "order: what a failed journal may not hold is written again",
        "storage/commit.py",
        '            self._timers.start("rewrite", self._retry_s, self._start_rewrite)\n        self.room_changed()',
        "        self.room_changed()",
        (tests("test_disk_failure"),),
    ),
    Mutation(
        "order: recovery forgets the cache before it reads",
        "storage/scan.py",
        "        disk.forget_cache(fd)\n",
        "",
        (tests("test_acknowledgement", "storage/test_recovery"),),
    ),
    Mutation(
        "order: a file ends where its successor says",
        "storage/recovery.py",
        "        scan = scan_journal(data, path, witness, end)",
        "        scan = scan_journal(data, path, witness, None)",
        (tests("test_disk_failure", "storage/test_recovery"),),
    ),
    Mutation(
        "order: a session is released when its events are in segments",
        "storage/sessions.py",
        "            await checkpointer.empty(session.stream_prefix)\n",
        "            pass\n",
        (tests("mcp/test_layer_faults", "test_processes", "test_acknowledgement", "test_log"),),
    ),
    Mutation(
        "order: what a session has queued is written before it is released",
        "storage/checkpointer.py",
        "        await self._commit.flush(prefix)\n",
        "",
        (tests("mcp/test_outbox"),),
    ),
    Mutation(
        "order: a response leaves when its events are stored",
        "mcp/outbox.py",
        "        return self._storing is None or self._storing.is_stored(event_id)\n",
        "        return True\n",
        (tests("mcp/test_outbox"),),
    ),
    Mutation(
        "order: nothing of a response leaves before what waits",
        "mcp/outbox.py",
        "        event_id = max(self._session.newest if body else 0, self._parts[-1].event_id if self._parts else 0)\n",
        "        event_id = self._session.newest if body else 0\n",
        (tests("mcp/test_outbox"),),
    ),
    Mutation(
        "order: the length is told of what is whole only",
        "mcp/outbox.py",
        "            messages.append(self._head if more else _with_length(self._head, len(body)))\n",
        "            messages.append(_with_length(self._head, len(body)))\n",
        (tests("mcp/test_outbox"),),
    ),
    Mutation(
        "order: what nobody waits for is committed in the end",
        "storage/commit.py",
        '                self._timers.start("linger", _LINGER_S, self._want_pending)\n',
        "                pass\n",
        (tests("mcp/test_outbox"),),
    ),
    Mutation(
        "order: what somebody waits for does not linger",
        "storage/commit.py",
        "            self._pending.want()\n            if self._sync_each or self._is_turn_due():\n",
        "            if self._sync_each or self._is_turn_due():\n",
        (tests("mcp/test_outbox"),),
    ),
    Mutation(
        "order: a backup holds the segments before it asks which there are",
        "ops/backup/create.py",
        '            held.enter_context(wait_for_lock(store.disk, store.root / "removal.lock", shared=True))\n'
        "            store.adopt_dead_lanes()\n"
        "            return _Copy(store, target, progress).run(take_cut(store, held))",
        "            store.adopt_dead_lanes()\n"
        "            cut = take_cut(store, held)\n"
        '            held.enter_context(wait_for_lock(store.disk, store.root / "removal.lock", shared=True))\n'
        "            return _Copy(store, target, progress).run(cut)",
        (tests("ops/test_backup", "ops/test_pace"), ("crash", "backup", "--runs", "3")),
    ),
]

_COMPARISONS: Final = [
    Mutation(
        "comparison: the body of a batch",
        "storage/journal.py",
        "            if self._checksum(data, start - base, stop - base) != header.checksum:",
        "            if stop - start != header.length:",
        (tests("storage/test_journal"), DAMAGE),
    ),
    Mutation(
        "comparison: the header of a batch",
        "storage/journal.py",
        "    if _CRC.unpack_from(data, offset + _FIELDS.size)[0] != chain:\n        return None\n",
        "",
        (tests("storage/test_journal"), DAMAGE),
    ),
    Mutation(
        "comparison: the chain of batches",
        "storage/journal.py",
        " or self._chain not in (None, header.previous)",
        "",
        (tests("storage/test_journal"),),
    ),
    Mutation(
        "comparison: a file's header",
        "storage/header.py",
        "    if _CRC.unpack_from(data, _FIELDS.size)[0] != google_crc32c.value(data[: _FIELDS.size]):",
        "    if len(data) < _FIELDS.size:",
        (tests("storage/test_header"),),
    ),
    Mutation(
        "comparison: an entry of the registry",
        "storage/registry.py",
        " and checksums.extend(seed, start, end) == checksum:",
        ":",
        (tests("storage/test_registry"), DAMAGE),
    ),
    Mutation(
        "comparison: a reservation",
        "storage/lane.py",
        "    if checksum != _CRC.pack(google_crc32c.value(fields)):",
        "    if len(checksum) != _CRC.size:",
        (tests("storage/test_lane"), DAMAGE),
    ),
    Mutation(
        "comparison: a frame among many",
        "storage/record.py",
        "or not 0 < length <= MAX_BODY_BYTES or _extend(seed, body) != checksum:",
        "or not 0 < length <= MAX_BODY_BYTES:",
        (tests("storage/test_record"), DAMAGE),
    ),
    Mutation(
        "comparison: a frame",
        "storage/record.py",
        "    if _extend(seed, body) != checksum or not is_event(body):",
        "    if not is_event(body):",
        (tests("storage/test_record"), DAMAGE),
    ),
    Mutation(
        "comparison: a frame among damage",
        "storage/record.py",
        "            and checksums.extend(seed, start, end) == FRAME_HEADER.unpack_from(data, offset)[1]\n",
        "",
        (tests("storage/test_record"), DAMAGE),
    ),
    Mutation(
        "comparison: a frame that is verified",
        "ops/verify/frames.py",
        " or extend(seed, body) != checksum or not",
        " or not",
        (tests("ops/test_verify"), DAMAGE),
    ),
    Mutation(
        "comparison: the digest of a segment",
        "ops/verify/segments.py",
        "            self._altered = hashlib.sha256(memoryview(self._data)[:known]).hexdigest() != self._row.sha256",
        "            self._altered = not hashlib.sha256(memoryview(self._data)[:known]).hexdigest()",
        (tests("ops/test_verify"), DAMAGE),
    ),
    Mutation(
        "comparison: an object of a backup",
        "ops/backup/pool.py",
        "    if found.hexdigest() != digest:",
        "    if not found.hexdigest():",
        (tests("ops/test_backup", "ops/test_restore"), DAMAGE),
    ),
    Mutation(
        "comparison: a manifest",
        "ops/backup/manifest.py",
        "        if hashlib.sha256(backup).hexdigest() != sealed.sha256:",
        "        if not sealed.sha256:",
        (tests("ops/test_backup"), DAMAGE),
    ),
    Mutation(
        "comparison: a frame that is shown",
        "ops/verify/dump.py",
        "        if self._checksums.extend(self._seed, body - self._start, end - self._start) != checksum:\n"
        "            return None\n",
        "",
        (tests("ops/test_dump"),),
    ),
]

_LOCKS: Final = [
    Mutation(
        "lock: of a lane",
        "storage/lane.py",
        '            if (lock := disk.lock(folder / "lock")) is not None:',
        '            if (lock := disk.lock(folder / "lock", shared=True)) is not None:',
        (tests("storage/test_lane", "test_processes"), PROCESSES),
    ),
    Mutation(
        "lock: of the registry",
        "storage/registry.py",
        '        lock = self._disk.lock(self._root / "registry.lock", wait=True)',
        '        lock = self._disk.lock(self._root / "registry.lock", wait=True, shared=True)',
        (tests("storage/test_registry", "mcp/test_layer_faults"), PROCESSES),
    ),
    Mutation(
        "lock: of the checkpoint",
        "storage/opening.py",
        "        while (lock := self.disk.lock(path)) is None:",
        "        while (lock := self.disk.lock(path, shared=True)) is None:",
        (tests("test_bad_input", "test_log"), PROCESSES),
    ),
    Mutation(
        "lock: of compaction",
        "storage/opening.py",
        '        return self.disk.lock(self.root / "compaction.lock")',
        '        return self.disk.lock(self.root / "compaction.lock", shared=True)',
        (tests("ops/test_compaction"), PROCESSES),
    ),
    Mutation(
        "lock: of a dead lane that is adopted",
        "storage/opening.py",
        '            lock = self.disk.lock(folder / "lock")\n            if lock is None:',
        '            lock = self.disk.lock(folder / "other", wait=True)\n            if lock is None:',
        (tests("test_processes", "test_log"), PROCESSES),
    ),
    Mutation(
        "lock: of the whole store, against a restore",
        "storage/opening.py",
        "            lock = self.disk.lock(path, shared=not replacing)",
        '            lock = self.disk.lock(path.with_name("other.lock"), shared=not replacing)',
        (tests("ops/test_restore"),),
    ),
    Mutation(
        "lock: of segments, against their removal",
        "storage/opening.py",
        '        return self.disk.lock(self.root / "removal.lock")',
        '        return self.disk.lock(self.root / "removal.lock", shared=True)',
        (tests("ops/test_backup", "ops/test_compaction", "ops/test_pace"),),
    ),
    Mutation(
        "lock: of a pool of backups",
        "ops/backup/pool.py",
        "        with wait_for_lock(self._disk, self.folder / _LOCK, shared=False, patience_s=_SHORT_PATIENCE_S):",
        "        with wait_for_lock(self._disk, self.folder / _LOCK, shared=True, patience_s=_SHORT_PATIENCE_S):",
        (tests("ops/test_backup"),),
    ),
    Mutation(
        "lock: of a store that is restored",
        "storage/replacement.py",
        '    lock = disk.lock(root / "store.lock")',
        '    lock = disk.lock(root / "store.lock", shared=True)',
        (tests("ops/test_restore"),),
    ),
]

MUTATIONS: Final[tuple[Mutation, ...]] = (*SYNCS, *_ORDERS, *_COMPARISONS, *_LOCKS)
