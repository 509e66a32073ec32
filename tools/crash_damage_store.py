"""The store that the damage campaign damages: sealed and growing segments, journals of dead processes, a backup."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from crash_kill import BrokenPromiseError
from logstore.ops.access import open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.pool import FolderTarget, default_backups
from logstore.ops.compaction.compact import compact
from logstore.storage import Log, LogOptions
from logstore.storage.files import Disk
from logstore.storage.options import Retention

_SMALL: Final = LogOptions(
    journal_file_bytes=64 << 10, journal_bytes=1 << 20, checkpoint_interval_s=0.01, segment_bytes=64 << 10
)
_WRITER: Final = """
import asyncio, os, sys
from pathlib import Path
from logstore.storage import Log, LogOptions

async def main(path, name, unsealed):
    options = LogOptions(
        journal_file_bytes=64 << 10, journal_bytes=1 << 20, checkpoint_interval_s=0.01, segment_bytes=64 << 20
    )
    async with Log(path, options) as log:
        await log.sessions.open(f'session-of-{name}', b'state', name)
        # With the next checkpoint the index has the session, too.
        await log.append(f'{name}/first', b'first', 1)
        while log.stats().unsegmented_bytes:
            await asyncio.sleep(0.01)
        print('open', flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        if unsealed:
            await log.append_many([(f'{name}/grown', os.urandom(4000), 0) for _ in range(30)])
            while log.stats().unsegmented_bytes:
                await asyncio.sleep(0.01)
        else:
            for number in range(24):
                await log.append(f'{name}/{number % 3}', os.urandom(5000), 2)
                await log.append_many([(f'shared {name}', os.urandom(90), 0) for _ in range(3)])
        print('ready', flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == 'unsealed'))
"""


def make_store(path: Path) -> None:
    """Make the store; nobody has it open on return, and journals are left."""
    asyncio.run(_write_sealed(path))
    store = open_existing(path)
    try:
        compact(store, Retention(max_events=45, resume_window_s=0), segment_bytes=64 << 10)
    finally:
        store.close(empty=True)
    store = open_existing(path)
    try:
        create_backup(store, FolderTarget(default_backups(path)))
    finally:
        store.close(empty=True)
    _leave_dead(path, "u", ["unsealed"])
    _leave_dead(path, "j", ["journals", "journals", "journals"])


def _leave_dead(path: Path, prefix: str, kinds: list[str]) -> None:
    """Let processes write, each in its lane, and kill them; those of kind `journals` leave full ones too."""
    writers = []
    for number, kind in enumerate(kinds):
        command = [sys.executable, "-c", _WRITER, str(path), f"{prefix}{number}", kind]
        writers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    _expect(writers, "open")
    with contextlib.ExitStack() as held:
        if "journals" in kinds:
            # While this is held no journal goes.
            lock = Disk().lock(path.with_name("events-log") / "checkpoint.lock", wait=True)
            assert lock is not None
            held.enter_context(lock)
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("write\n")
            writer.stdin.flush()
        _expect(writers, "ready")
        for writer in writers:
            writer.kill()
    for writer in writers:
        writer.wait()
        for pipe in (writer.stdin, writer.stdout):
            assert pipe is not None
            pipe.close()


def _expect(writers: list[subprocess.Popen[str]], word: str) -> None:
    for writer in writers:
        assert writer.stdout is not None
        said = writer.stdout.readline().strip()
        if said != word:
            raise BrokenPromiseError(f"a writer said {said!r} instead of {word!r}")


async def _in_segments(log: Log) -> None:
    # Nothing else runs in this loop that could tell.
    while log.stats().unsegmented_bytes:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def _write_sealed(path: Path) -> None:
    async with Log(path, _SMALL) as log:
        for number in range(6):
            await log.sessions.open(f"session {number}", b"state" * number, f"tiny {number}")
        for turn in range(3):
            # Streams of their own, large enough for a file of their own.
            for stream in ("large", "larger"):
                await log.append_many([(stream, os.urandom(3000), 1) for _ in range(30)])
            for number in range(8):
                await log.append_many([(f"tiny {number}", os.urandom(50 + turn), 2)] * 2)
            await _in_segments(log)
        await log.sessions.end("session 5")
