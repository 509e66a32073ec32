"""What the fuzz campaign feeds: valid bytes with damage, and values that somebody made up to do harm."""

from __future__ import annotations

import copy
import json
import random
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, NamedTuple, cast

import google_crc32c
import msgspec

MIB: Final = 1 << 20
EXTREMES: Final = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 20, (64 << 20) + 1, 0x7FFFFFFF, 0xFFFFFFFF)
"""Numbers of 32 bits at which a parser may go astray."""
LARGE: Final = (1 << 40, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)

_extend = google_crc32c.extend
_encode = msgspec.msgpack.Encoder().encode


class Input(NamedTuple):
    """What is fed to a parser.

    Attributes:
        data: The bytes.
        forged: Whether checksums were made to match what was changed, so that nothing tells it from what was written.
        numbers: What else the parser is told, such as up to where a file was on disk.
    """

    data: bytes
    forged: bool = False
    numbers: tuple[int, ...] = ()


class Target(ABC):
    """One parser, with what it is fed.

    Attributes:
        name: What it is called.
        cpu_s: Seconds of processor time that one input may take.
        memory_bytes: What one input may make the process grow by.
        share: How many of the inputs that are asked for it gets: some take milliseconds.
    """

    name: ClassVar[str]
    cpu_s: ClassVar[float] = 2.0
    memory_bytes: ClassVar[int] = 192 * MIB
    share: ClassVar[float] = 1.0

    @abstractmethod
    def draw(self, rng: random.Random) -> Input:
        """Return an input; the same one for the same state of the generator."""

    @abstractmethod
    def feed(self, given: Input) -> bool:
        """Give an input to the parser; return whether it was taken.

        Raises:
            LogstoreError: It was refused.
            BrokenPromiseError: Something wrong was taken.
            Exception: The parser crashed.
        """

    def close(self) -> None:  # noqa: B027
        """Give back what was opened; most open nothing."""


# Damage, as disks and bugs do it.


def damaged(data: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Return bytes with up to four things done to them; `others` are samples of the same kind to splice in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(_DAMAGES)(changed, rng, others)
    return bytes(changed)


def _place(data: bytearray, rng: random.Random) -> int:
    # The beginning of a file has the fields that everything else hangs on.
    return rng.randrange(min(len(data), 80) if rng.random() < 0.3 else len(data))


def _flip(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    if data:
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    if data:
        data[_place(data, rng)] = rng.choice((0, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x5B, 0x96, rng.randrange(256)))


def _number(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    """Put an extreme number over whatever is there, as a length field may be."""
    size = rng.choice((2, 4, 4, 8))
    number = rng.choice(EXTREMES + LARGE) & ((1 << 8 * size) - 1)
    if len(data) >= size:
        place = min(_place(data, rng), len(data) - size)
        data[place : place + size] = number.to_bytes(size, rng.choice(("little", "little", "big")))


def _cut(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    if data:
        del data[_place(data, rng) :]


def _take_out(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    if data:
        place = _place(data, rng)
        del data[place : place + rng.choice((1, 2, 8, 64, 512, 4096))]


def _blot(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    """Overwrite a run with zeros, or anything."""
    if data:
        place = _place(data, rng)
        size = min(rng.choice((1, 8, 64, 512, 4096)), len(data) - place)
        data[place : place + size] = rng.choice((bytes(size), rng.randbytes(size), b"\xff" * size))


def _insert(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    place = _place(data, rng) if data else 0
    data[place:place] = rng.choice((bytes(8), rng.randbytes(rng.choice((1, 8, 40))), b"\xff" * 4))


def _repeat(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    if data:
        source, place = _place(data, rng), _place(data, rng)
        data[place:place] = data[source : source + rng.choice((1, 8, 64, 512, 4096))]


def _splice(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    other = rng.choice(others) if others else bytes(data)
    if data and other:
        source, place = rng.randrange(len(other)), _place(data, rng)
        piece = other[source : source + rng.choice((8, 64, 512, 4096, len(other)))]
        data[place : place + (len(piece) if rng.random() < 0.5 else 0)] = piece


_DAMAGES: Final[tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...]] = (
    _flip,
    _flip,
    _byte,
    _number,
    _number,
    _cut,
    _take_out,
    _blot,
    _insert,
    _repeat,
    _splice,
)


# Values that are no accident.


def hostile_msgpack(rng: random.Random) -> bytes:
    """Return one msgpack value, or what begins like one, of the kinds that harm parsers."""
    return rng.choice(_HOSTILE)(rng)


def _any_int(rng: random.Random) -> bytes:
    return bytes(_encode(rng.choice((0, 1, -1, -(1 << 63), *LARGE, rng.getrandbits(62)))))


def _any_text(rng: random.Random) -> bytes:
    return bytes(
        _encode(rng.choice(("", "a", "\0", "x" * 600, "é" * 300, "\u2028", "nul\0", "../../x", "%", "\ud7ff")))
    )


def _bad_text(rng: random.Random) -> bytes:
    return rng.choice((b"\xa1\xff", b"\xa3\xed\xa0\x80", b"\xa2\xc0\xaf", b"\xa4a"))


def _huge_head(rng: random.Random) -> bytes:
    """Announce thousands of millions of elements, characters or bytes."""
    return rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")) + b"\xff" * 4 + rng.randbytes(3)


def _nest(rng: random.Random) -> bytes:
    depth = rng.choice((3, 600, 5_000, 60_000))
    return rng.choice((b"\x91", b"\x81\xa1a", b"\xdd\0\0\0\1")) * depth + b"\xc0"


def _odd(rng: random.Random) -> bytes:
    return rng.choice(
        (
            b"\xc0",
            b"\xc1",
            b"\xc2",
            b"\xcb\x7f\xf8" + bytes(6),
            b"\xca\x7f\x80\0\0",
            b"\xc7\x0c\xff" + b"\xff" * 12,
            b"\xd6\xff\xff\xff\xff\xff",
            b"\xd8\x05" + bytes(16),
            b"\x80",
            b"\x90",
            b"\x81\x80\x01",
            b"\xc4\x02ab",
        )
    )


_HOSTILE: Final[tuple[Callable[[random.Random], bytes], ...]] = (
    _any_int,
    _any_int,
    _any_text,
    _bad_text,
    _huge_head,
    _nest,
    _odd,
)


def hostile_array(fields: Sequence[object], rng: random.Random) -> bytes:
    """Return a msgpack array of some fields, some of them others than a parser expects."""
    parts = [bytes(_encode(field)) for field in fields]
    for _ in range(rng.choice((0, 1, 1, 2))):
        parts[rng.randrange(len(parts))] = hostile_msgpack(rng)
    change = rng.random()
    if change < 0.1:
        parts.pop()
    elif change < 0.2:
        parts.append(hostile_msgpack(rng))
    head = bytes([0x90 | len(parts)])
    if rng.random() < 0.1:
        head = rng.choice(
            (b"\xdc" + struct.pack(">H", len(parts)), b"\xdd\xff\xff\xff\xff", b"\xdd\0\0\0\x06", b"\x95")
        )
    body = head + b"".join(parts)
    return body[: rng.randrange(1, len(body))] if rng.random() < 0.05 else body


def hostile_json(rng: random.Random) -> bytes:
    """Return one JSON value, or what begins like one, of the kinds that harm parsers."""
    depth = rng.choice((3, 900, 5_000, 60_000))
    return rng.choice(
        (
            b"null",
            b"true",
            b"0",
            b"-1",
            b"1e400",
            b"-0.0",
            b"NaN",
            b"Infinity",
            b"9" * rng.choice((19, 20, 40, 5_000)),
            b"1." + b"0" * 300,
            b'""',
            b'"a"',
            b'"\\ud800"',
            b'"\\udc00\\ud800"',
            b'"\xff"',
            b'"\xed\xa0\x80"',
            b'"\\u0000"',
            b'"\x00"',
            b'"' + b"x" * rng.choice((600, 70_000)) + b'"',
            b"[]",
            b"{}",
            b'{"a":1,"a":2}',
            b'{"":{"":{}}}',
            b"[" * depth + b"]" * depth,
            b'{"a":' * depth + b"1" + b"}" * depth,
            b"[" * depth,
            b'"unfinished',
            b"{",
            b"tru",
            b'"9223372036854775807"',
            b'"9223372036854775808"',
            b'"0001-01-01T00:00:00+00:00"',
            b'"9999-12-31T23:59:59.999999-23:59"',
            b'"0001-01-01T00:00:00+23:59"',
            b'"2026-01-01"',
            b"-9223372036854775809",
            b"18446744073709551616",
        )
    )


def frame(body: bytes, seed: int) -> bytes:
    """Return a length, a checksum that matches, and a body: how records and registry entries are framed."""
    return struct.pack("<II", len(body), _extend(seed, body)) + body


def altered_json(sample: object, rng: random.Random) -> bytes:
    """Return a JSON text of which some values are others than a parser expects, or are missing or there twice."""
    tree = copy.deepcopy(sample)
    hostile: dict[str, bytes] = {}
    for number in range(rng.choice((1, 1, 2, 3))):
        place = f"@{number}@"
        if _alter(tree, place, rng):
            hostile[f'"{place}"'] = hostile_json(rng)
    text = json.dumps(tree, indent=rng.choice((None, None, 1))).encode()
    for place, value in hostile.items():
        text = text.replace(place.encode(), value)
    return damaged(text, rng) if rng.random() < 0.1 else text


def _alter(tree: object, place: str, rng: random.Random) -> bool:
    """Change one place of a tree; return whether a value is to be put there."""
    while isinstance(tree, dict | list) and tree:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key: Any = rng.choice(keys)
        below: Any = cast("Any", tree)[key]
        if isinstance(below, dict | list) and below and rng.random() < 0.8:
            tree = below
            continue
        if isinstance(tree, dict) and rng.random() < 0.2:
            if rng.random() < 0.5:
                del tree[key]
                return False
            key = rng.choice(("extra", "", "kind", "__class__", "_fields_set", "cls", "self", "\u00e9"))
        cast("Any", tree)[key] = place
        return True
    return False
