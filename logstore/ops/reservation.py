"""Setting what a lane has given out at most, for a store that is not open."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

import google_crc32c

from logstore.storage.files import Disk
from logstore.storage.lane import Reservation

_FIELDS: Final = struct.Struct("<QQQ")
_CRC: Final = struct.Struct("<I")
_FIRST: Final = 1


def write_reservation(disk: Disk, folder: Path, reservation: Reservation) -> None:
    """Give a lane that has no `state` yet its first one; on return the file is on disk, its folder's entry not.

    The slot is the first of the two in `docs/format.md`, which the lane's next state does not write over.
    """
    fields = _FIELDS.pack(_FIRST, *reservation)
    fd = disk.create(folder / "state")
    try:
        disk.write(fd, fields + _CRC.pack(google_crc32c.value(fields)), 4096)
        disk.sync(fd)
    finally:
        disk.close(fd)
