"""JSON of any length, read piece by piece in bounded memory.

Three layouts are taken, told apart by what they begin with: an object with a list `events` among its members, a list of
events, and one object after another (NDJSON). How they are broken into lines makes no difference.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Generator, Iterator
from typing import IO, Any, Final, NamedTuple

from logstore.errors import LogstoreError
from logstore.storage.record import MAX_BODY_BYTES

MAX_VALUE_CHARACTERS: Final = 2 * MAX_BODY_BYTES
"""The longest event that is read: one of `MAX_BODY_BYTES` in base64, with its other members, is shorter."""

_READ_BYTES: Final = 256 << 10
_NEAR_END: Final = 16
"""An error so close to the end of what was read may be for want of the rest."""
_BEHIND_NUMBER: Final = len("e+")
"""So much of what was read may belong to the number before it, once the rest is there."""
_BYTE_ORDER_MARK: Final = "\ufeff"
_SPACE: Final = " \t\r\n"
_MOST_DIGITS: Final = 4_000
"""Python refuses to make an integer of more than some 4,300."""


class BrokenJsonError(LogstoreError):
    """The text is no JSON from some place on; what comes before that place was read."""


class JsonValue(NamedTuple):
    """One value and where it stands.

    Attributes:
        line: Number of the line in which it begins, from 1.
        text: The JSON as it stands there; bytes that are no UTF-8 are half surrogates.
        value: What it means.
    """

    line: int
    text: str
    value: Any


def _integer(digits: str) -> int | float:
    """Return an integer; one of too many digits is no number, so that only the event that it is in is refused."""
    return int(digits) if len(digits) <= _MOST_DIGITS else math.nan


class JsonStream:
    """Reads the events of a JSON text.

    Args:
        stream: The text in UTF-8, with or without a byte order mark.
        name: What it is called in messages.

    Attributes:
        members: What the outermost object has beside its events, as far as it was read.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream = stream
        self._name = name
        # Bytes that are no UTF-8 spoil the event that they are in, and no other.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._scan = json.JSONDecoder(parse_int=_integer).raw_decode
        self._buffer = ""
        self._at = 0
        self._line = 1
        self._ended = False
        self._members_size = 0
        self.members: dict[str, Any] = {}

    def events(self) -> Iterator[JsonValue]:
        """Yield what stands where events are to be.

        Raises:
            BrokenJsonError: What comes next is no JSON, or the text ends too early.
        """
        self._fill(len(_BYTE_ORDER_MARK.encode()))
        self._buffer = self._buffer.removeprefix(_BYTE_ORDER_MARK)
        first = self._peek()
        if first == "[":
            yield from self._list()
        elif first == "{":
            found = yield from self._object()
            if not found:
                yield from self._lines()
                return
        else:
            raise self._broken("neither an object nor a list begins here")
        if self._peek():
            raise self._broken("there is more text behind the end")

    def _list(self) -> Iterator[JsonValue]:
        self._skip("[")
        if self._peek() == "]":
            self._skip("]")
            return
        while True:
            yield self._value()
            if self._one_of(",", "]") == "]":
                return

    def _object(self) -> Generator[JsonValue, None, bool]:
        """Yield the events in an object; return whether it had any place for them."""
        line = self._line
        found = False
        texts: list[str] = []
        self._skip("{")
        if self._peek() == "}":
            self._skip("}")
            return found
        while True:
            name = self._value()
            if not isinstance(name.value, str):
                raise self._broken("a member of an object must begin with its name")
            self._one_of(":")
            if name.value == "events" and self._peek() == "[":
                found = True
                yield from self._list()
            else:
                texts.append(self._member(name))
            if self._one_of(",", "}") == "}":
                break
        if not found and "format" not in self.members:
            # The first of several objects, as it stands there: the bytes of its message are those that were stored.
            members, self.members = self.members, {}
            yield JsonValue(line, f"{{{','.join(texts)}}}", members)
        return found

    def _member(self, name: JsonValue) -> str:
        """Read a member of the outermost object, and return it as it stands there."""
        value = self._value()
        self.members[name.value] = value.value
        self._members_size += len(name.text) + len(value.text)
        if self._members_size > MAX_VALUE_CHARACTERS:
            raise self._broken(f"an object has members of more than {MAX_VALUE_CHARACTERS:,} characters beside events")
        return f"{name.text}:{value.text}"

    def _lines(self) -> Iterator[JsonValue]:
        """Yield one object after another, up to the one that tells how many there were."""
        while self._peek():
            value = self._value()
            if "format" in self.members and isinstance(value.value, dict) and value.value.keys() == {"count", "gaps"}:
                self.members |= value.value
            else:
                yield value

    def _value(self) -> JsonValue:
        """Return the next value, read as far as it takes."""
        self._peek()
        while True:
            try:
                value, end = self._scan(self._buffer, self._at)
                if end + _BEHIND_NUMBER < len(self._buffer) or self._ended:
                    break
            except RecursionError:
                raise self._broken("a value is nested too deeply") from None
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - _NEAR_END
                if self._ended or not cut_off:
                    raise self._broken(error.msg, error.pos) from None
            read = len(self._buffer) - self._at
            if read > MAX_VALUE_CHARACTERS:
                raise self._broken(f"an event is longer than {MAX_VALUE_CHARACTERS:,} characters")
            # Twice as much each time: what was read is scanned again, and must not be again and again.
            self._fill(max(1, min(read, MAX_VALUE_CHARACTERS - read)))
        found = JsonValue(self._line, self._buffer[self._at : end], value)
        self._advance(end)
        return found

    def _one_of(self, *characters: str) -> str:
        found = self._peek()
        if found not in characters or not found:
            raise self._broken(f"{' or '.join(characters)} is missing")
        self._advance(self._at + 1)
        return found

    def _skip(self, character: str) -> None:
        self._one_of(character)

    def _peek(self) -> str:
        """Return the next character that is no space, empty at the end; it becomes the current one."""
        while True:
            at = self._at
            while at < len(self._buffer) and self._buffer[at] in _SPACE:
                at += 1
            self._advance(at)
            if at < len(self._buffer):
                return self._buffer[at]
            if self._ended:
                return ""
            self._fill()

    def _advance(self, at: int) -> None:
        self._line += self._buffer.count("\n", self._at, at)
        self._at = at

    def _fill(self, least: int = 1) -> None:
        """Read some more bytes, `least` if there are so many, and forget what is done with."""
        pieces = [self._stream.read(max(least, _READ_BYTES))]
        missing = least - len(pieces[0])
        while pieces[-1] and missing > 0:
            pieces.append(self._stream.read(missing))
            missing -= len(pieces[-1])
        data = b"".join(pieces)
        self._ended = not data
        self._buffer = self._buffer[self._at :] + self._decode(data, final=self._ended)
        self._at = 0

    def _broken(self, reason: str, at: int | None = None) -> BrokenJsonError:
        place = self._at if at is None else at
        line = self._line + self._buffer.count("\n", self._at, place)
        end = ", where it ends" if self._ended and place >= len(self._buffer) - _NEAR_END else ""
        return BrokenJsonError(f"{self._name} is no JSON any more at line {line}{end}: {reason}")
