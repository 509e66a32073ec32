"""The SQLite file of a catalogue: opening it, and telling whose it is and whether it is damaged."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Generator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from logstore.errors import DamageError, FormatVersionError, NotAStoreError
from logstore.storage.schema import APPLICATION_ID, SCHEMA_VERSION

_BUSY_TIMEOUT_S: Final = 10.0


def is_damage(error: BaseException) -> bool:
    """Whether an error says that the file is damaged, or no database; not that the disk refuses or a lock is held."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_io_error(error: BaseException) -> bool:
    """Whether an error says that the disk refused a read, a write or a sync."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF == sqlite3.SQLITE_IOERR


@contextlib.contextmanager
def damage_of(path: Path) -> Generator[None]:
    """Raise damage that SQLite finds in the block as that of a certain file, where another one is worked on, too.

    Raises:
        DamageError: The file is damaged.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        raise DamageError(path, 0, 0, f"SQLite says: {error}") from error


def connect(path: Path, *, write: bool, immutable: bool = False) -> sqlite3.Connection:
    """Open the database, which must exist, with the settings that every connection of ours has."""
    mode = "rw" if write else "ro&immutable=1" if immutable else "ro"
    # Statements of any thread, one at a time, under the lock of the object that owns the connection.
    connection = sqlite3.connect(
        f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=_BUSY_TIMEOUT_S,
    )
    try:
        _read_schema(connection)
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        if write:
            # The checkpoint deletes journals on the word of a commit.
            connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def _read_schema(connection: sqlite3.Connection) -> None:
    """Have SQLite read the schema, and say in its own words when the name in its complaint is no text."""
    try:
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
    except UnicodeDecodeError as error:
        damaged = sqlite3.DatabaseError("malformed database schema, with a name that is no text")
        damaged.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damaged from error
    except sqlite3.DatabaseError:
        # Whoever asks something is told.
        return


def inspect_file(path: Path, *, look_only: bool = False) -> str:
    """Tell what stands at the path of the catalogue: `absent`, `ours` or `damaged`.

    Args:
        path: The catalogue.
        look_only: Make no file beside it.

    Raises:
        NotAStoreError: A folder, or a database of another program.
        FormatVersionError: Written by a newer release.
    """
    if path.is_dir():
        raise NotAStoreError(f"{path} is a folder; give the path of the catalogue file, such as {path / 'events.db'}")
    if not path.exists() or path.stat().st_size == 0:
        return "absent"
    at_rest = not has_wal(path) if look_only else _is_not_ours(path)
    # SQLite calls a database damaged whose schema the disk did not give, too: it may do so the second time.
    found = _identity(path, immutable=at_rest) or _identity(path, immutable=at_rest)
    if found is None:
        return "damaged"
    application, version, tables = found
    if application == 0 and not tables:
        return "absent"
    if application != APPLICATION_ID:
        raise NotAStoreError(
            f"{path} is a SQLite database of another program (tables: {', '.join(sorted(tables)) or 'none'}); "
            "nothing was written to it. Give another path, or import it into a new store"
        )
    if version > SCHEMA_VERSION:
        raise FormatVersionError(
            f"{path} has catalogue version {version}, this release knows {SCHEMA_VERSION}: upgrade mcp-logstore", path
        )
    return "ours"


def _identity(path: Path, *, immutable: bool) -> tuple[int, int, set[str]] | None:
    """Return application, version and tables of a database; None when it is damaged."""
    try:
        with contextlib.closing(connect(path, write=False, immutable=immutable)) as connection:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return None
    return application, version, tables


def is_whole(path: Path) -> bool:
    """Whether a look at every page of a database finds no damage.

    Raises:
        sqlite3.Error: It cannot be read.
    """
    try:
        with contextlib.closing(connect(path, write=False)) as connection:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return False


def has_wal(path: Path) -> bool:
    """Whether somebody has the database open, or died with it: SQLite's write-ahead log is there."""
    return path.with_name(f"{path.name}-wal").exists()


def _is_not_ours(path: Path) -> bool:
    """Whether a database at rest is another program's, or a newer release's, by the file's first bytes.

    SQLite leaves `-wal` and `-shm` beside a database that it has only read, unless it is told that nobody writes it.

    Source: the database header at https://www.sqlite.org/fileformat2.html#the_database_header
    """
    if any(path.with_name(path.name + suffix).exists() for suffix in ("-wal", "-journal")):
        return False
    with path.open("rb") as file:
        header = file.read(100)
    version, application = (int.from_bytes(header[offset : offset + 4], "big") for offset in (60, 68))
    return application != APPLICATION_ID or version > SCHEMA_VERSION
