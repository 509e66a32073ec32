"""The damage campaign: random places of files of a store are damaged, and then the store is asked everything.

What must hold, each time: `verify` names each file of which content was changed; no event is served that is not the
original one; no command ends in a traceback, or not at all. What content is, is decided here, by the bytes that held
some before the damage, by the rows of the index, and by what is served. Many copies have one damage, which nothing can
hide behind; most have several, each in a file of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
import signal
import sqlite3
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from click.testing import CliRunner

from crash_damage_draw import Damage, Draw
from crash_damage_store import make_store
from crash_kill import BrokenPromiseError
from logstore.cli import main as cli
from logstore.errors import DamageError, GapError, LogstoreError
from logstore.ops.access import StoreView, open_existing
from logstore.ops.verify.dump import dump
from logstore.ops.verify.repair import repair
from logstore.ops.verify.store import verify
from logstore.storage.files import Disk
from logstore.storage.foreign import Foreign
from logstore.storage.header import frame_seed
from logstore.storage.options import Retention
from logstore.storage.reader import Reader, contiguous

RUN_S = 60
"""A run that takes longer hangs."""
_BY_COMMAND: Final = 0.03
_REPAIRED: Final = 0.1
_INDEX: Final = "events.db"

Events = dict[str, list[tuple[int, int, bytes]]]
"""Of each stream `(id, flags, payload)`, in order."""


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
        make_store(self._home / "events.db")
        self._draw = Draw(self._home, self._copied())
        self._rows = _logical_rows(self._copied() / "events.db")
        report = verify(self._copied() / "events.db")
        if not report.ok:
            raise BrokenPromiseError(f"the store is found damaged before it is: {report.findings[:3]}")
        self.events = self._read_opened(self._copied() / "events.db")
        self.figures["events in the store"] = sum(map(len, self.events.values()))

    def run(self, number: int) -> None:
        """Damage a copy and ask it everything.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        rng = random.Random(f"{self._seed} {number}")
        copy = self._copied()
        damages = self._draw.damage(copy, rng)
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
        for name, parts in self._draw.parts.items():
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
        while events := contiguous(stream, after, reader.read(stream, after, 1000, ()).events):
            for event in events:
                if event.stream != stream:
                    raise BrokenPromiseError(f"an event of {event.stream!r} was served for {stream!r}")
                yield event.id, event.flags, event.payload
            after = events[-1].id


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
