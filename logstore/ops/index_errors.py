"""What SQLite says of a damaged index, as an error that tells what to do."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Generator
from pathlib import Path

from logstore.errors import DamageError


@contextlib.contextmanager
def index_errors(path: Path) -> Generator[None]:
    """Turn SQLite's errors in the block into `DamageError`.

    Args:
        path: The catalogue.
    """
    try:
        yield
    except sqlite3.Error as error:
        reason = f"SQLite says: {error}. `logstore reindex {path}` makes the catalogue again"
        raise DamageError(path, 0, 0, reason) from error
