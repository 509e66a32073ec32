"""Where an imported event came from, at the start of its payload.

The payload of an event with `FLAG_IMPORTED` begins with a msgpack array of two strings, `[source, source_id]`; the real
payload follows.
"""

from __future__ import annotations

from typing import Final

import msgspec

_PAIR: Final = 0x92
"""First byte of a msgpack array of two."""
_SHORT_TEXT: Final = range(0xA0, 0xC0)
"""First byte of a msgpack string of up to 31 bytes: the length is in it."""
_LENGTH_BYTES: Final = {0xD9: 1, 0xDA: 2, 0xDB: 4}
"""First bytes of longer strings, and how many bytes of length follow."""

_encode = msgspec.msgpack.Encoder().encode


def encode_origin(source: str, source_id: str) -> bytes:
    """Return what the payload of an imported event begins with.

    Args:
        source: What kind of store it came from.
        source_id: Which event of that store it was.
    """
    return _encode((source, source_id))


def split_origin(payload: bytes) -> tuple[str, str, bytes]:
    """Return source, source id, and the real payload of an imported event.

    Raises:
        ValueError: The payload does not begin with an origin.
    """
    if not payload or payload[0] != _PAIR:
        raise ValueError("the payload of an imported event does not say where it came from")
    source, end = _text_at(payload, 1)
    source_id, end = _text_at(payload, end)
    return source, source_id, payload[end:]


def _text_at(payload: bytes, offset: int) -> tuple[str, int]:
    """Return the msgpack string at an offset, and where it ends."""
    first = payload[offset] if offset < len(payload) else 0
    start = offset + 1
    if first in _SHORT_TEXT:
        end = start + first - _SHORT_TEXT.start
    elif first in _LENGTH_BYTES:
        width = _LENGTH_BYTES[first]
        start += width
        end = start + int.from_bytes(payload[start - width : start], "big")
    else:
        raise ValueError("the origin of an imported event is not two texts")
    if end > len(payload):
        raise ValueError("the origin of an imported event is cut off")
    return payload[start:end].decode(), end
