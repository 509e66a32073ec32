"""What a device may hold after the power went: files by sector, folders by entry.

The model is weaker than what one file system does, so that it covers several:

- **Files.** Each sector written since the file was last synced is the newest, any one in between, the one that was on
  the device, zeros or noise, whatever becomes of its neighbours; the length is any between the synced one and the
  newest. What was synced in a sector and not written since stays, since a device writes a sector whole or not at all
  (SQLite calls that powersafe overwrite). Of files named in `TORN` not even that is left: the whole sector may be
  noise.
- **Folders.** Of the changes to one folder since its last sync the first ones are kept and the others lost; what is
  kept of one folder says nothing of another. A rename between two folders is one change of both. ext4 and XFS keep a
  prefix of the changes of all folders, in one journal; that is one of the cases. A later change of a folder without an
  earlier one of the same, which POSIX would allow, is not: no file system with a journal does it.
- A sync of a file says nothing of its entry in the folder, a sync of a folder nothing of its files.

Left out: sectors that cannot be read, and a device that says it has synced and has not, but for what `crash_disk` is
told to leave out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

SECTOR_BYTES: Final = 512
TORN: Final = ("*.journal", "state")
"""Files that lose nothing synced even when the sector that it lies in is torn."""
_ODDS: Final = (0.0, 0.02, 0.2, 0.5, 0.9, 0.99, 1.0)
"""Mostly kept or mostly lost: even odds for hundreds of sectors would never leave a batch whole."""

_CHANGE_ODDS: Final = (0.0, 0.5, 0.8, 0.9, 1.0)
"""Of a change to a folder, when those before it were kept."""


class _Sector:
    """A sector that was written since the last sync: what it held meanwhile, and which of its bytes were written."""

    __slots__ = ("end", "start", "versions")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.versions: list[bytes] = []


class FileState:
    """The bytes of a file: those on the device, and what was written since.

    Attributes:
        synced: What the device has.
        length: The length that the system shows.
    """

    def __init__(self, synced: bytes = b"") -> None:
        self.synced = synced
        self.length = len(synced)
        self._writes: list[tuple[int, bytes]] = []
        self._written: dict[int, _Sector] | None = None

    def write(self, data: bytes, offset: int) -> None:
        """Write bytes that the device need not have."""
        self._writes.append((offset, bytes(data)))
        self._written = None
        self.length = max(self.length, offset + len(data))

    def extend(self, length: int) -> None:
        """Make the file at least so long."""
        self.length = max(self.length, length)

    def shorten(self, length: int) -> None:
        """Cut the file off; the device may have it longer until the next sync."""
        self._writes = [(offset, data[: length - offset]) for offset, data in self._writes if offset < length]
        self._written = None
        self.length = min(self.length, length)

    def sync(self) -> None:
        """Bring everything to the device."""
        if self._writes or self.length != len(self.synced):
            self.synced = self.content()
            self._writes.clear()
            self._written = None

    def content(self) -> bytes:
        """Return the file as the system shows it."""
        content = bytearray(self.synced.ljust(self.length, b"\0"))
        for offset, data in self._writes:
            content[offset : offset + len(data)] = data
        return bytes(content[: self.length])

    def copy(self) -> FileState:
        """Return the same as it is now."""
        copy = FileState(self.synced)
        copy.length = self.length
        copy._writes = self._writes.copy()
        return copy

    def after_cut(self, rng: random.Random, *, torn: bool) -> bytes:
        """Return what may be left when the power goes now.

        Args:
            rng: What is drawn from.
            torn: Whether a sector that is being written may lose also what was synced of it.
        """
        if not self._writes and self.length == len(self.synced):
            return self.synced
        odds = rng.choice(_ODDS)
        image = bytearray(self.synced.ljust(self.length, b"\0"))
        for number, sector in sorted(self._sectors().items()):
            start = number * SECTOR_BYTES
            place = slice(start, start + len(sector.versions[-1]))
            if rng.random() < odds:
                image[place] = sector.versions[-1]
                continue
            fate = rng.randrange(4)
            if fate == 3:
                # A version from before the file grew is shorter.
                image[place] = rng.choice(sector.versions).ljust(place.stop - start, b"\0")
            elif fate:
                hit = place if torn else slice(sector.start, sector.end)
                image[hit] = bytes(hit.stop - hit.start) if fate == 1 else rng.randbytes(hit.stop - hit.start)
        if rng.random() < 0.2:
            shorter, longer = sorted((len(self.synced), self.length))
            del image[rng.randrange(shorter, longer + 1) :]
        return bytes(image)

    def _sectors(self) -> dict[int, _Sector]:
        """Return the sectors that were written since the last sync."""
        if self._written is not None:
            return self._written
        content = bytearray(self.synced.ljust(self.length, b"\0"))
        sectors: dict[int, _Sector] = {}
        for offset, data in self._writes:
            end = offset + len(data)
            content[offset:end] = data
            for number in range(offset // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
                start = number * SECTOR_BYTES
                first, last = max(offset, start), min(end, start + SECTOR_BYTES)
                sector = sectors.setdefault(number, _Sector(first, last))
                sector.start, sector.end = min(sector.start, first), max(sector.end, last)
                sector.versions.append(bytes(content[start : start + SECTOR_BYTES]))
        self._written = sectors
        return sectors


class File:
    """A file, whatever its name; of a mapped one, `versions` are all contents that were seen."""

    def __init__(self, state: FileState, versions: list[bytes] | None = None) -> None:
        self.state = state
        self.versions = versions


class Folder:
    """A folder: its entries as the system shows them, and as the device has them."""

    def __init__(self) -> None:
        self.now: dict[str, File | Folder] = {}
        self.synced: dict[str, File | Folder] = {}


Node = File | Folder


class _Entry(NamedTuple):
    """What is, or is no more, under a name."""

    folder: Folder
    name: str
    node: Node | None


_Change = tuple[_Entry, ...]
"""Entries that change together."""


def _apply(entries: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


class Device:
    """The files and folders below a folder, as the system shows them and as the device has them.

    What is there at the beginning is on the device.

    Args:
        home: The folder.
        mapped: Name of the files that are written through memory.
    """

    def __init__(self, home: Path, mapped: str) -> None:
        self.home = home
        self._prefix = f"{home}/"
        self._mapped = mapped
        self._pending: list[_Change] = []
        self._root = Folder()
        self._load(self._root, home)

    def _load(self, folder: Folder, path: Path) -> None:
        for entry in sorted(path.iterdir()):
            node: Node
            if entry.is_dir():
                node = Folder()
                self._load(node, entry)
            elif entry.is_file():
                node = self.new_file(entry.name, entry.read_bytes())
            else:
                continue
            folder.now[entry.name] = folder.synced[entry.name] = node

    def copy(self, home: Path) -> Device:
        """Return the same device for a copy of the folder elsewhere."""
        copy = deepcopy(self)
        copy.home, copy._prefix = home, f"{home}/"
        return copy

    def new_file(self, name: str, content: bytes = b"") -> File:
        """Return a file that has no place yet."""
        return File(FileState(content), [content] if name == self._mapped else None)

    def holds(self, path: Path) -> bool:
        """Whether a path is below the folder."""
        return str(path).startswith(self._prefix)

    def _spot(self, path: Path) -> tuple[Folder, str]:
        """Return the folder of a path, made when nobody told of it, and the name there."""
        *parents, name = path.relative_to(self.home).parts
        folder = self._root
        for parent in parents:
            child = folder.now.get(parent)
            if not isinstance(child, Folder):
                child = Folder()
                self._change(_Entry(folder, parent, child))
            folder = child
        return folder, name

    def _change(self, *entries: _Entry) -> None:
        for folder, name, node in entries:
            _apply(folder.now, name, node)
        self._pending.append(entries)

    def find(self, path: Path) -> Node | None:
        """Return what the system shows at a path."""
        folder, name = self._spot(path)
        return folder.now.get(name)

    def put(self, path: Path, node: Node) -> None:
        """Put something at a path."""
        self._change(_Entry(*self._spot(path), node))

    def remove(self, path: Path) -> None:
        """Remove what is at a path, if there is something."""
        folder, name = self._spot(path)
        if name in folder.now:
            self._change(_Entry(folder, name, None))

    def move(self, source: Path, target: Path) -> None:
        """Put what is at one path in the place of what is at another."""
        folder, name = self._spot(source)
        if (node := folder.now.get(name)) is not None:
            self._change(_Entry(folder, name, None), _Entry(*self._spot(target), node))

    def look(self, path: Path) -> None:
        """Take up the folders that came to a folder, and those that went, since nobody tells of them."""
        folder = self._root
        if path != self.home:
            parent, name = self._spot(path)
            found = parent.now.get(name)
            if not isinstance(found, Folder):
                return
            folder = found
        for name, node in list(folder.now.items()):
            if isinstance(node, Folder) and not (path / name).is_dir():
                self._change(_Entry(folder, name, None))
        if path.is_dir():
            for entry in path.iterdir():
                if entry.name not in folder.now and entry.is_dir():
                    self._change(_Entry(folder, entry.name, Folder()))

    def sync_folder(self, path: Path) -> None:
        """Bring the entries of a folder to the device, and what they need: a file moved there is gone elsewhere."""
        folder = self._root
        if path != self.home:
            parent, name = self._spot(path)
            found = parent.now.get(name)
            assert isinstance(found, Folder)
            folder = found
        wanted = {folder}
        kept: list[_Change] = []
        due: list[_Change] = []
        for change in reversed(self._pending):
            if any(entry.folder in wanted for entry in change):
                wanted.update(entry.folder for entry in change)
                due.append(change)
            else:
                kept.append(change)
        for change in reversed(due):
            for entry in change:
                _apply(entry.folder.synced, entry.name, entry.node)
        self._pending = kept[::-1]

    def freeze(self) -> Frozen:
        """Return everything as it is at this moment."""
        self._look_below(self._root, self.home)
        folders: dict[Folder, dict[str, Node]] = {}
        files: dict[File, File] = {}
        for node in self._all():
            if isinstance(node, Folder):
                folders[node] = node.synced.copy()
            else:
                files[node] = File(node.state.copy(), node.versions and node.versions.copy())
        return Frozen(self._root, folders, files, list(self._pending))

    def _look_below(self, folder: Folder, path: Path) -> None:
        self.look(path)
        for name, node in list(folder.now.items()):
            if isinstance(node, Folder):
                self._look_below(node, path / name)

    def _all(self) -> Iterator[Node]:
        """Yield everything that is on the device or may come there."""
        seen: set[Node] = set()
        waiting: list[Node] = [self._root]
        for change in self._pending:
            waiting += [node for entry in change for node in (entry.folder, entry.node) if node is not None]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            yield node
            if isinstance(node, Folder):
                waiting += [*node.synced.values(), *node.now.values()]

    def files_named(self, name: str) -> Iterator[tuple[Path, File]]:
        """Yield the files of a name that the system shows, with their paths."""
        waiting: list[tuple[Path, Folder]] = [(self.home, self._root)]
        while waiting:
            path, folder = waiting.pop()
            for entry, node in folder.now.items():
                if isinstance(node, Folder):
                    waiting.append((path / entry, node))
                elif entry == name:
                    yield path / entry, node


class Frozen(NamedTuple):
    """A device at the moment when the power went: what it has, and what was on its way."""

    root: Folder
    folders: Mapping[Folder, dict[str, Node]]
    files: Mapping[File, File]
    pending: list[_Change]

    def leave(self, rng: random.Random, target: Path, torn: tuple[str, ...] = TORN) -> None:
        """Write one of the states that may be left.

        Args:
            rng: What is drawn from.
            target: Folder, which must not exist.
            torn: Patterns of the names of files whose sectors are torn whole.
        """
        entries = {folder: names.copy() for folder, names in self.folders.items()}
        odds = rng.choice(_CHANGE_ODDS)
        stopped: set[Folder] = set()
        for change in self.pending:
            concerned = {entry.folder for entry in change}
            if concerned & stopped or rng.random() >= odds:
                stopped |= concerned
                continue
            for entry in change:
                _apply(entries[entry.folder], entry.name, entry.node)
        self._write(rng, self.root, target, entries, torn)

    def _write(
        self,
        rng: random.Random,
        folder: Folder,
        path: Path,
        entries: Mapping[Folder, dict[str, Node]],
        torn: tuple[str, ...],
    ) -> None:
        path.mkdir()
        for name, node in sorted(entries[folder].items()):
            if isinstance(node, Folder):
                self._write(rng, node, path / name, entries, torn)
                continue
            file = self.files[node]
            if file.versions is not None:
                content = rng.choice(file.versions)
            else:
                whole = any(PurePosixPath(name).match(pattern) for pattern in torn)
                content = file.state.after_cut(rng, torn=whole)
            (path / name).write_bytes(content)
