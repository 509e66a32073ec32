"""What the damage campaign does to a copy of its store, drawn at random: mostly where a file holds something."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from logstore.ops.backup.manifest import read_manifest
from logstore.ops.backup.pool import MANIFEST_SUFFIX, FolderTarget, default_backups
from logstore.ops.verify.dump import dump
from logstore.storage.registry import salvage_entries

_SECTOR: Final = 512
_PAGE: Final = 4096
_SINGLE: Final = 0.25
"""Of the copies so many get one damage."""
_MOST_DAMAGES: Final = 16
_SHARES: Final = {"journal": 30, "segment": 30, "registry": 8, "catalogue": 20, "backup": 8, "lane": 4}
_INDEPENDENT: Final = ("journal", "segment", "segment", "backup", "lane")
"""What is damaged in copies that get several: the index and the registry say what is wrong with others."""


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


class Part(NamedTuple):
    """Bytes of a file that hold content."""

    start: int
    end: int


class Draw:
    """Draws damages for copies of one store.

    Args:
        home: The folder of the store.
        copy: A copy of it, to look into with SQLite, which leaves files beside what it reads.

    Attributes:
        parts: File by file, what holds content.
    """

    def __init__(self, home: Path, copy: Path) -> None:
        self._home = home
        self.parts: Mapping[str, Sequence[Part]] = self._content(copy)
        self._files = self._choices()

    def damage(self, copy: Path, rng: random.Random) -> list[Damage]:
        """Damage one file of a copy, or several of which none is needed to see what is wrong with another."""
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
        parts = self.parts.get(name)
        if parts and rng.random() < 0.8:
            part = rng.choice(parts)
            return min(size - 1, rng.randrange(part.start, part.end))
        if rng.random() < 0.1:
            return rng.randrange(min(size, 100))
        return rng.randrange(size)

    def _content(self, copy: Path) -> dict[str, list[Part]]:
        """Return, file by file, the parts that hold content."""
        parts: dict[str, list[Part]] = {}
        log = self._home / "events-log"
        with contextlib.closing(sqlite3.connect(f"file:{copy / 'events.db'}?mode=ro", uri=True)) as rows:
            for name, size in rows.execute("SELECT file, bytes FROM segments WHERE dropped = 0"):
                parts[f"events-log/{name}"] = [Part(0, size)]
            done = set(rows.execute("SELECT lane, ordinal FROM journals"))
        for journal in log.glob("lanes/*/*.journal"):
            if (int(journal.parent.name), int(journal.stem)) not in done:
                records = [each for each in dump(journal) if each.what in ("header", "batch")]
                parts[_name(self._home, journal)] = [Part(each.offset, each.offset + each.size) for each in records]
        data = (log / "registry.log").read_bytes()
        entries = list(salvage_entries(data, int.from_bytes(data[24:32], "little")))
        parts["events-log/registry.log"] = [Part(0, entries[-1].end)]
        backups = default_backups(self._home / "events.db")
        target = FolderTarget(backups)
        for key in target.manifests():
            parts[_name(self._home, backups / key)] = [Part(0, (backups / key).stat().st_size)]
            for file in read_manifest(target, key).files:
                parts[_name(self._home, backups / file.key)] = [Part(0, file.bytes)]
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


def _name(home: Path, path: Path) -> str:
    return str(path.relative_to(home))


def _holder(name: str) -> str:
    """Return what is damaged once at most: a file, or a lane, whose journals tell of each other."""
    return str(Path(name).parent) if "/lanes/" in name else name
