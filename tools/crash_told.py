"""What a process told of its work on a store, and what the store must hold for it, whatever happened to the process."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from crash_kill import BrokenPromiseError
from crash_writer import Call, Mark

LARGE_CALL: Final = 60
"""Events of one call from which on they are large, so that their stream gets a file of its own."""
_LARGE_BYTES: Final = 5_000
_CACHED: Final = 20_000

Contents = Mapping[str, Sequence[tuple[int, bytes]]]
"""Of each stream `(id, payload)`, in order."""


def payload_of(mark: Mark) -> bytes:
    """Return the payload of an event: its mark, and bytes that follow from it."""
    text = "|".join(map(str, (mark.stream, *mark.call, mark.place, mark.of))).encode() + b"|"
    digest = hashlib.shake_128(text)
    size = _LARGE_BYTES if mark.of >= LARGE_CALL else 50 + 3 * digest.digest(1)[0]
    return text + digest.digest(size)


# The same ones are looked at thousands of times.
@functools.lru_cache(_CACHED)
def mark_of(payload: bytes) -> Mark | None:
    """Return what a payload says, or None when it is not what was stored."""
    fields = payload.split(b"|", 7)
    try:
        run, process, writer, number, place, count = map(int, fields[1:7])
        mark = Mark(fields[0].decode(), Call(run, process, writer, number), place, count)
    except ValueError:
        return None
    return mark if payload_of(mark) == payload else None


class Told:
    """What was told of one store, line by line, and how it must be for that.

    Attributes:
        stored: Id of every event that must be there, by its mark.
        sessions: The states that each session may be in: the last that was told, and one that was being written.
        errors: What was raised where an error was injected.
        odd: What must not be said at all: tracebacks, damage where none was done.
        expected: What may be logged as an error, since it was done to the store; empty for nothing.
        most_events: How many of a stream's newest events retention keeps; None for all.
    """

    def __init__(self) -> None:
        self.stored: dict[Mark, int] = {}
        self.sessions: dict[str, list[str]] = {}
        self.errors: list[str] = []
        self.odd: list[str] = []
        self.expected = ""
        self.most_events: int | None = None
        self.words: set[str] = set()
        # Acknowledged while the store said that it had them in memory only, or may not have synced them.
        self._kept: dict[Mark, int] = {}
        self._begun: set[Call] = set()
        self._refused: set[Call] = set()
        self._shown: dict[int, Mark] = {}

    def copy(self) -> Told:
        """Return what has the same, and learns more on its own."""
        other = Told()
        other.stored = dict(self.stored)
        other.sessions = {key: list(states) for key, states in self.sessions.items()}
        other.expected = self.expected
        other.most_events = self.most_events
        other._kept = dict(self._kept)
        other._begun = set(self._begun)
        other._refused = set(self._refused)
        other._shown = dict(self._shown)
        return other

    @property
    def highest_id(self) -> int:
        """The highest id that was given out."""
        return max((*self.stored.values(), *self._kept.values(), *self._shown), default=0)

    def hear(self, line: str) -> None:
        """Take up a line of a `Hand`; what is none is odd."""
        try:
            what, *rest = json.loads(line)
        except ValueError:
            self.odd.append(line)
            return
        match what:
            case "begun" | "stored" | "kept" | "refused":
                self._hear_of_call(what, Call(*rest[0]), rest[1:])
            case "well":
                self._is_well()
            case "shown":
                self._show(*rest)
            case "session":
                self._session(*rest)
            case "error":
                self.errors.append(rest[0])
            case "odd":
                self.odd += self.unexpected(rest)
            case _:
                self.words.add(what)

    def unexpected(self, lines: Iterable[str]) -> list[str]:
        """Return the lines that should not have been logged."""
        return [line for line in lines if not (self.expected and self.expected in line)]

    def _hear_of_call(self, what: str, call: Call, rest: list[Any]) -> None:
        if what == "begun":
            self._begun.add(call)
        elif what == "refused":
            self._refused.add(call)
        else:
            (events,) = rest
            into = self.stored if what == "stored" else self._kept
            for place, (stream, event_id) in enumerate(events):
                into[Mark(stream, call, place, len(events))] = int(event_id)

    def _is_well(self) -> None:
        """The store says that nothing is in memory only any more: what was acknowledged is stored, refused is not."""
        self.stored.update(self._kept)
        self._kept.clear()
        self._begun -= self._refused
        self._refused.clear()

    def _show(self, stream: str, events: Iterable[Sequence[Any]]) -> None:
        for event_id, call, place, of in events:
            self._shown[event_id] = Mark(stream, Call(*call), place, of)

    def _session(self, key: str, state: str, done: bool) -> None:
        if done:
            self.sessions[key] = [state]
        else:
            self.sessions.setdefault(key, ["none"]).append(state)

    def check(self, contents: Contents) -> None:
        """Compare the streams of the store with what was told.

        Raises:
            BrokenPromiseError: With what is wrong.
        """
        found: dict[int, Mark] = {}
        for stream, events in contents.items():
            found.update(self._checked(stream, events))
        self._check_lost({mark: event_id for event_id, mark in found.items()})
        self._check_others(found)
        self._shown = found

    def _checked(self, stream: str, events: Sequence[tuple[int, bytes]]) -> dict[int, Mark]:
        """Return the marks of a stream's events by id: each once, in order, and none that was never stored there."""
        found: dict[int, Mark] = {}
        seen: set[Mark] = set()
        last_of_writer: dict[tuple[int, int, int], Mark] = {}
        last_id, last_life = 0, -1
        for event_id, payload in events:
            mark = mark_of(payload)
            if mark is None or mark.stream != stream:
                raise BrokenPromiseError(f"event {event_id} of {stream} was never stored there: {payload[:80]!r}")
            before = last_of_writer.get(mark.call[:3])
            if mark in seen:
                raise BrokenPromiseError(f"{mark} is there twice")
            if event_id <= last_id or mark.call.run < last_life or (before is not None and mark[1:] < before[1:]):
                raise BrokenPromiseError(f"{mark}, event {event_id}, comes after {before}, event {last_id}")
            seen.add(mark)
            last_of_writer[mark.call[:3]] = mark
            last_id, last_life = event_id, mark.call.run
            found[event_id] = mark
        return found

    def _check_lost(self, found: Mapping[Mark, int]) -> None:
        must = dict(self.stored)
        must.update((mark, event_id) for event_id, mark in self._shown.items())
        lost = {mark: event_id for mark, event_id in must.items() if found.get(mark) != event_id}
        if self.most_events is not None and lost:
            lost = self._not_dropped(must, lost, self.most_events)
        if lost:
            first = min(lost, key=lambda mark: lost[mark])
            shown = sum(mark not in self.stored for mark in lost)
            raise BrokenPromiseError(
                f"{len(lost)} events are gone, {shown} of them only shown; the first is {lost[first]}, {first}, "
                f"and its id now {found.get(first)}"
            )

    @staticmethod
    def _not_dropped(must: Mapping[Mark, int], lost: Mapping[Mark, int], most: int) -> dict[Mark, int]:
        """Return those of the lost that retention had no right to drop: it takes a stream's oldest, and leaves some."""
        streams: dict[str, list[Mark]] = {}
        for mark in sorted(must, key=lambda mark: must[mark]):
            streams.setdefault(mark.stream, []).append(mark)
        wrong: dict[Mark, int] = {}
        for marks in streams.values():
            gone = [mark for mark in marks if mark in lost]
            if marks[: len(gone)] != gone or len(gone) > max(0, len(marks) - most):
                wrong.update((mark, lost[mark]) for mark in gone)
        return wrong

    def _check_others(self, found: Mapping[int, Mark]) -> None:
        """Check the events that nobody was told of: their call was under way, and is there whole."""
        by_id = {event_id: mark for mark, event_id in (*self.stored.items(), *self._kept.items())}
        for event_id, mark in found.items():
            known = by_id.get(event_id, mark)
            if known != mark:
                raise BrokenPromiseError(f"id {event_id} is {mark} and was given to {known}")
        others = [mark for mark in found.values() if mark not in self.stored and mark not in self._kept]
        for call, events in Counter(mark.call for mark in others).items():
            if call not in self._begun:
                raise BrokenPromiseError(f"{call} is there, and was never begun, or refused")
            count = next(mark.of for mark in others if mark.call == call)
            if events != count and self.most_events is None:
                raise BrokenPromiseError(
                    f"{events} of the {count} events of {call} are there, all or none were promised"
                )
