"""The damage campaign: random places of files of a store are damaged, and then the store is asked everything.

What must hold, each time: `verify` names each file of which content was changed; no event is served that is not the
original one; no command ends in a traceback, or not at all. What content is, is decided here, by the bytes that held
some before the damage, by the rows of the index, and by what is served. Many copies have one damage, which nothing can
hide behind; most have several, each in a file of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Final, NamedTuple

from click.testing import CliRunner

from crash_kill import BrokenPromiseError
from logstore.cli import main as cli
from logstore.errors import DamageError, GapError, LogstoreError
from logstore.ops.access import StoreView, open_existing
from logstore.ops.backup.create import create_backup
from logstore.ops.backup.manifest import read_manifest
from logstore.ops.backup.pool import MANIFEST_SUFFIX, FolderTarget, default_backups
from logstore.ops.compaction.compact import compact
from logstore.ops.verify.dump import dump
from logstore.ops.verify.repair import repair
from logstore.ops.verify.store import verify
from logstore.storage import Log, LogOptions
from logstore.storage.files import Disk
from logstore.storage.foreign import Foreign
from logstore.storage.header import frame_seed
from logstore.storage.options import Retention
from logstore.storage.reader import Reader, contiguous
from logstore.storage.registry import salvage_entries

RUN_S = 60
"""A run that takes longer hangs."""
_SECTOR: Final = 512
_PAGE: Final = 4096
_SMALL: Final = LogOptions(
    journal_file_bytes=64 << 10, journal_bytes=1 << 20, checkpoint_interval_s=0.01, segment_bytes=64 << 10
)
_BY_COMMAND: Final = 0.03
_REPAIRED: Final = 0.1
_SINGLE: Final = 0.25
"""Of the copies so many get one damage."""
_MOST_DAMAGES: Final = 16
_SHARES: Final = {"journal": 30, "segment": 30, "registry": 8, "catalogue": 20, "backup": 8, "lane": 4}
_INDEPENDENT: Final = ("journal", "segment", "segment", "backup", "lane")
"""What is damaged in copies that get several: the index and the registry say what is wrong with others."""
_INDEX: Final = "events.db"

Events = dict[str, list[tuple[int, int, bytes]]]
"""Of each stream `(id, flags, payload)`, in order."""


class Damage(NamedTuple):
    """What was done to which file, and with which other one, if it took two."""

    kind: str
    file: str
    words: str
    other: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are not what they were."""
        return (self.file,) if self.other is None else (self.file, self.other)


class _Part(NamedTuple):
    """Bytes of a file that hold content."""

    start: int
    end: int


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


class DamageCampaign:
    """Damages copies of one store.

    Args:
        folder: Where the store and its copies are put.
        seed: What everything is drawn from, but for the bytes of the events and the ids.

    Attributes:
        figures: Counts for the report.
        events: What the store holds.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.figures: Counter[str] = Counter()
        self.events: Events = {}
        self._seed = seed
        self._home = folder / "original"
        self._copy = folder / "copy"
        logging.getLogger("logstore").setLevel(logging.CRITICAL)
        if self._home.exists():
            shutil.rmtree(self._home)
        self._home.mkdir(parents=True)
        self._make_store()
        self._parts = self._content()
        self._rows = _logical_rows(self._copied() / "events.db")
        report = verify(self._copied() / "events.db")
        if not report.ok:
            raise BrokenPromiseError(f"the store is found damaged before it is: {report.findings[:3]}")
        self.events = self._read_opened(self._copied() / "events.db")
        self._files = self._choices()
        self.figures["events in the store"] = sum(map(len, self.events.values()))

    # The store.

    def _make_store(self) -> None:
        path = self._home / "events.db"
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
        self._leave_dead("u", ["unsealed"])
        self._leave_dead("j", ["journals", "journals", "journals"])

    def _leave_dead(self, prefix: str, kinds: list[str]) -> None:
        """Let processes write, each in its lane, and kill them; those of kind `journals` leave full ones too."""
        path = self._home / "events.db"
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

    def _content(self) -> dict[str, list[_Part]]:
        """Return, file by file, the parts that hold content."""
        parts: dict[str, list[_Part]] = {}
        log = self._home / "events-log"
        with contextlib.closing(sqlite3.connect(f"file:{self._copied() / 'events.db'}?mode=ro", uri=True)) as rows:
            for name, size in rows.execute("SELECT file, bytes FROM segments WHERE dropped = 0"):
                parts[f"events-log/{name}"] = [_Part(0, size)]
            done = set(rows.execute("SELECT lane, ordinal FROM journals"))
        for journal in log.glob("lanes/*/*.journal"):
            if (int(journal.parent.name), int(journal.stem)) not in done:
                records = [each for each in dump(journal) if each.what in ("header", "batch")]
                parts[_name(self._home, journal)] = [_Part(each.offset, each.offset + each.size) for each in records]
        data = (log / "registry.log").read_bytes()
        entries = list(salvage_entries(data, int.from_bytes(data[24:32], "little")))
        parts["events-log/registry.log"] = [_Part(0, entries[-1].end)]
        backups = default_backups(self._home / "events.db")
        target = FolderTarget(backups)
        for key in target.manifests():
            parts[_name(self._home, backups / key)] = [_Part(0, (backups / key).stat().st_size)]
            for file in read_manifest(target, key).files:
                parts[_name(self._home, backups / file.key)] = [_Part(0, file.bytes)]
        return parts

    def _choices(self) -> dict[str, list[str]]:
        files: dict[str, list[str]] = {name: [] for name in ("journal", "segment", "registry", "catalogue", "backup")}
        files["lane"] = []
        for path in sorted(each for each in self._home.rglob("*") if each.is_file() and each.stat().st_size):
            name = _name(self._home, path)
            if path.suffix in (".journal", ".segment"):
                files[path.suffix[1:]].append(name)
            elif name.startswith("events-backups/") and path.name != "pool.lock":
                files["backup"].append(name)
            elif path.name in ("state", "marks"):
                files["lane"].append(name)
            elif path.name == "registry.log":
                files["registry"].append(name)
            elif path.name in ("events.db", "events.db-wal"):
                files["catalogue"].append(name)
        return files

    # One run.

    def run(self, number: int) -> None:
        """Damage a copy and ask it everything.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        rng = random.Random(f"{self._seed} {number}")
        copy = self._copied()
        damages = self._damages(copy, rng)
        self.figures["damages"] += len(damages)
        for damage in damages:
            self.figures[f"damages: {damage.kind}"] += 1
        with _deadline(damages):
            try:
                self._ask(copy, damages, rng)
            except BrokenPromiseError as error:
                raise BrokenPromiseError(f"{error}; damaged was {_words(damages)}") from error
            except Exception as error:
                raise BrokenPromiseError(f"{type(error).__name__}: {error}; damaged was {_words(damages)}") from error

    def finish(self) -> None:
        """Remove the last copy."""
        shutil.rmtree(self._copy, ignore_errors=True)

    def _copied(self) -> Path:
        """Put a fresh copy of the store beside it; its files are the original's until they are changed."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._home, self._copy)
        return self._copy

    def _damages(self, copy: Path, rng: random.Random) -> list[Damage]:
        """Damage one file, or several of which none is needed to see what is wrong with another."""
        if rng.random() < _SINGLE:
            return [self._damage(copy, rng, rng.choices(list(_SHARES), list(_SHARES.values()))[0], set())]
        damages: list[Damage] = []
        touched = {name for name in self._files["backup"] if name.endswith(MANIFEST_SUFFIX)}
        for _ in range(rng.randint(2, _MOST_DAMAGES)):
            group = rng.choice(_INDEPENDENT)
            if any(_holder(each) not in touched for each in self._files[group]):
                damages.append(self._damage(copy, rng, group, touched))
                touched.update(map(_holder, damages[-1].files))
        return damages

    def _damage(self, copy: Path, rng: random.Random, group: str, touched: set[str]) -> Damage:
        free = [each for each in self._files[group] if _holder(each) not in touched]
        name = rng.choice(free)
        path = copy / name
        data = bytearray(path.read_bytes())
        kind = rng.choice(("flip", "zeros", "page", "truncation", "swap", "duplicate", "garbage"))
        place = self._place(name, len(data), rng)
        words = f"at {place} of {len(data)}"
        other = None
        if kind == "flip":
            data[place] ^= 1 << rng.randrange(8)
        elif kind == "zeros":
            start = place // _SECTOR * _SECTOR
            data[start : start + _SECTOR] = bytes(len(data[start : start + _SECTOR]))
        elif kind == "page":
            start = place // _PAGE * _PAGE
            data[start : start + _PAGE] = rng.randbytes(len(data[start : start + _PAGE]))
        elif kind == "truncation":
            del data[place:]
        elif kind == "duplicate":
            size = min(rng.choice((64, _SECTOR, _PAGE)), len(data) - place)
            source = rng.randrange(len(data) - size + 1)
            data[place : place + size] = data[source : source + size]
            words += f", {size} bytes from {source}"
        elif kind == "garbage":
            data += rng.randbytes(rng.choice((1, 100, 5000)))
        else:
            others = [each for each in free if each != name and Path(each).suffix == Path(name).suffix]
            if others:
                other = rng.choice(others)
                words = f"with {other}"
                data, rest = bytearray((copy / other).read_bytes()), data
                (copy / other).write_bytes(rest)
        path.write_bytes(data)
        return Damage(kind, name, words, other)

    def _place(self, name: str, size: int, rng: random.Random) -> int:
        """Return a place in a file, mostly where it holds something."""
        parts = self._parts.get(name)
        if parts and rng.random() < 0.8:
            part = rng.choice(parts)
            return min(size - 1, rng.randrange(part.start, part.end))
        if rng.random() < 0.1:
            return rng.randrange(min(size, 100))
        return rng.randrange(size)

    def _ask(self, copy: Path, damages: list[Damage], rng: random.Random) -> None:
        path = copy / "events.db"
        changed = self._changed(copy, damages)
        by_command = rng.random() < _BY_COMMAND
        findings, refusal = self._verify(path, by_command=by_command)
        for name in sorted({name for damage in damages for name in damage.files}):
            self._dump(copy / name, by_command=by_command)
        self._look(path)
        served: Events | None = None
        try:
            if rng.random() < _REPAIRED:
                self._repair(path, ok=not findings)
            served = self._read_opened(path)
        except LogstoreError as error:
            # An open that is refused serves nothing wrong.
            self.figures[f"refused to open: {type(error).__name__}"] += 1
        if served is not None:
            self.compare(served)
            if served != self.events and not changed and not findings and refusal is None:
                raise BrokenPromiseError("verify is content, but what is served is less")
        self._judge(damages, changed, findings, refusal)

    def _judge(self, damages: list[Damage], changed: dict[str, str], findings: list[str], refusal: str | None) -> None:
        """Expect each file with changed content to be named; of the index, that anything is reported."""
        for damage in damages:
            whys = [(name, changed[name]) for name in damage.files if name in changed]
            is_named = any(found.endswith(name) for found in findings for name in damage.files)
            if not whys:
                self.figures[f"changed no content and were {'' if is_named else 'not '}reported"] += 1
                continue
            self.figures["changed content"] += 1
            for name, why in whys:
                is_index = name.startswith(_INDEX)
                if refusal is None and not any(is_index or found.endswith(name) for found in findings):
                    raise BrokenPromiseError(f"verify is content with {name}, but {why}; it names {findings}")
            self.figures["changed content and were reported"] += 1

    def _verify(self, path: Path, *, by_command: bool) -> tuple[list[str], str | None]:
        """Return the files that `verify` names, or why it refused."""
        if by_command:
            result = CliRunner().invoke(cli, ["verify", str(path), "--json"])
            self._expect_no_traceback(result.exception, "verify")
            self.figures["asked by command"] += 1
            if result.exit_code == 1 and not result.stdout.startswith("{"):
                self.figures["verify refused"] += 1
                return [], result.output
            said = json.loads(result.stdout)
            if said["ok"] != (not said["findings"]) or result.exit_code != (not said["ok"]):
                raise BrokenPromiseError(f"verify ends with {result.exit_code} and says {said}")
            return [each["file"] for each in said["findings"]], None
        try:
            quick = verify(path, quick=True)
            report = verify(path)
        except LogstoreError as error:
            self.figures["verify refused"] += 1
            return [], str(error)
        self.figures["found by --quick"] += not quick.ok
        return [each.file for each in report.findings], None

    def _dump(self, file: Path, *, by_command: bool) -> None:
        if file.suffix not in (".journal", ".segment", ".log"):
            return
        if by_command:
            result = CliRunner().invoke(cli, ["dump", str(file), "--json"])
            self._expect_no_traceback(result.exception, "dump")
            return
        with contextlib.suppress(LogstoreError):
            ends = [(each.offset, each.size) for each in dump(file) if each.what != "batch"]
            if ends != sorted(ends):
                raise BrokenPromiseError(f"dump of {file} does not go forward")

    @staticmethod
    def _expect_no_traceback(error: BaseException | None, command: str) -> None:
        if error is not None and not isinstance(error, SystemExit):
            raise BrokenPromiseError(f"{command} ended in {type(error).__name__}: {error}") from error

    def _look(self, path: Path) -> None:
        """Read everything without opening the store."""
        found: Events = {}
        try:
            with StoreView(path) as view:
                for stream in self.events:
                    found[stream] = list(_read(view.reader, stream))
        except LogstoreError as error:
            self.figures[f"refused to look: {type(error).__name__}"] += 1
        self.compare(found)

    def _repair(self, path: Path, *, ok: bool) -> None:
        done = repair(path)
        self.figures["repaired"] += not ok
        left = [each for each in done.report.findings if each.kind not in ("backup", "conflict")]
        if left:
            raise BrokenPromiseError(f"after repair there is still {left[:3]}; done was {done.actions}")
        self.figures["clean after repair"] += not ok

    def compare(self, found: Events) -> None:
        """Compare what was served with what was stored.

        Raises:
            BrokenPromiseError: An event is another one, or comes out of order.
        """
        for stream, events in found.items():
            original = self.events.get(stream, [])
            known = {each[0]: each for each in original}
            last = 0
            for event in events:
                if known.get(event[0]) != event:
                    raise BrokenPromiseError(f"stream {stream!r} has event {event[:2]}, which was never there")
                if event[0] <= last:
                    raise BrokenPromiseError(f"stream {stream!r} has event {event[0]} after {last}")
                last = event[0]

    def _changed(self, copy: Path, damages: list[Damage]) -> dict[str, str]:
        """Return the files of which content is not what it was, each with what is not."""
        changed: dict[str, str] = {}
        for name, parts in self._parts.items():
            before, now = (self._home / name).read_bytes(), (copy / name).read_bytes()
            if before == now:
                continue
            for start, end in parts:
                if before[start:end] != now[start:end]:
                    changed[name] = f"it was changed between {start} and {end}"
                    break
        for name in (file for damage in damages for file in damage.files if file.startswith(_INDEX)):
            if why := self._changed_rows(copy, cut_off=name.endswith("-wal")):
                changed[name] = why
        return changed

    def _changed_rows(self, copy: Path, *, cut_off: bool) -> str | None:
        rows = _logical_rows(copy / "events.db")
        if isinstance(rows, str) or isinstance(self._rows, str):
            return f"the index cannot be read: {rows}"
        for table, found in rows.items():
            known = self._rows[table]
            if table in _COPIES and cut_off:
                # A log of SQLite's that is cut off leaves an earlier state; these are copies of what files have.
                continue
            altered = found - known if table in _COPIES else found ^ known
            if altered:
                return f"{len(altered)} rows of {table} are others"
        return None

    def _read_opened(self, path: Path) -> Events:
        """Open a store and read all its streams, as far as they can be read."""
        disk = Disk()
        store = open_existing(path, disk)
        found: Events = {}
        try:
            foreign = Foreign(disk, store.root, store.lane.number)
            reader = Reader(disk, store.root, store.catalogue, foreign, frame_seed(store.store_id), Retention())
            names: list[str] = []
            with contextlib.suppress(sqlite3.Error):
                names += [summary.stream for summary in store.catalogue.summaries()]
            for name in dict.fromkeys([*names, *self.events]):
                found[name] = list(_read(reader, name))
            foreign.close()
        finally:
            store.close(empty=True)
        return found


def _read(reader: Reader, stream: str) -> Iterator[tuple[int, int, bytes]]:
    after = 0
    with contextlib.suppress(GapError, DamageError):
        while events := contiguous(stream, after, reader.read(stream, after, 1000, ())):
            for event in events:
                if event.stream != stream:
                    raise BrokenPromiseError(f"an event of {event.stream!r} was served for {stream!r}")
                yield event.id, event.flags, event.payload
            after = events[-1].id


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


_COLUMNS: Final = {
    "streams": "stream_id, name, dropped_id",
    "segments": "segment_id, stream_id, file, bytes, events, first_id, last_id, sealed, sha256, dropped",
    "events": "event_id, stream_id, segment_id, offset, length",
    "extents": "*",
    "journals": "lane, ordinal",
    "sessions": "session_hash, ended_at IS NULL, stream_prefix",
}
"""What the index says; the rest are times for people, which nothing is decided by."""


_COPIES: Final = ("journals", "sessions")


def _logical_rows(path: Path) -> dict[str, set[str]] | str:
    """Return everything that the index says, or why it does not."""
    rows: dict[str, set[str]] = {}
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            connection.text_factory = bytes
            for table, columns in _COLUMNS.items():
                found = connection.execute(f"SELECT {columns} FROM {table} NOT INDEXED")
                rows[table] = {repr(row) for row in found if table != "journals" or _exists(path, row)}
    except sqlite3.Error as error:
        return str(error)
    return rows


def _exists(path: Path, row: tuple[int, int]) -> bool:
    """Whether a journal that is to be removed is still there."""
    try:
        name = f"lanes/{row[0]:04d}/{row[1]:010d}.journal"
    except (TypeError, ValueError):
        return True
    return path.with_name("events-log").joinpath(name).exists()


def _name(home: Path, path: Path) -> str:
    return str(path.relative_to(home))


def _holder(name: str) -> str:
    """Return what is damaged once at most: a file, or a lane, whose journals tell of each other."""
    return str(Path(name).parent) if "/lanes/" in name else name


def _words(damages: list[Damage]) -> str:
    return "; ".join(f"{each.file}: {each.kind} {each.words}" for each in damages)


@contextlib.contextmanager
def _deadline(damages: list[Damage]) -> Generator[None]:
    """End what hangs."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise BrokenPromiseError(f"not done within {RUN_S} s; damaged was {_words(damages)}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(RUN_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
