"""What a store was given and what it said, and what it must therefore hold after the power went."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from crash_kill import BrokenPromiseError

Contents = Mapping[str, Sequence[tuple[int, bytes]]]
"""Of each stream `(id, payload)`, in order."""


class Owner(NamedTuple):
    """Whose a session is; None in its place when there is no such session."""

    incarnation: int
    released: bool


class _Sent(NamedTuple):
    """An event that an append was asked for."""

    stream: str
    opening: int
    call: int


class _Opening:
    """One opening of the store."""

    def __init__(self, floor: int, *, always: bool) -> None:
        self.floor = floor
        self.always = always
        self.acknowledged: list[bytes] = []
        self.covered = 0

    def copy(self) -> _Opening:
        copy = _Opening(self.floor, always=self.always)
        copy.acknowledged = self.acknowledged.copy()
        copy.covered = self.covered
        return copy


class Ledger:
    """What one store was given and what it said. For any threads; no two payloads are the same.

    Attributes:
        given: Payload of every event whose id is known, by id, whatever became of it.
        required: Events that must be there.
        kept: How many of the newest events of a stream retention keeps, None while it has dropped nothing. Of streams
            of a session that has ended it keeps none.
        swept: Whether retention was at work at all.
    """

    def __init__(self) -> None:
        self.given: dict[int, bytes] = {}
        self.required: set[bytes] = set()
        self.kept: int | None = None
        self.swept = False
        self._mutex = threading.Lock()
        self._sent: dict[bytes, _Sent] = {}
        self._ids: dict[bytes, int] = {}
        self._calls: Counter[int] = Counter()
        self._openings: list[_Opening] = []
        # What was lost with a power cut and must not come back, and what retention dropped.
        self._lost: set[bytes] = set()
        self._dropped: set[bytes] = set()
        self._sessions: dict[str, list[Owner | None]] = {}

    def copy(self) -> Ledger:
        """Return the same as it is now."""
        with self._mutex:
            copy = Ledger()
            copy.given = self.given.copy()
            copy.required = self.required.copy()
            copy.kept, copy.swept = self.kept, self.swept
            copy._sent = self._sent.copy()
            copy._ids = self._ids.copy()
            copy._calls = self._calls.copy()
            copy._openings = [each.copy() for each in self._openings]
            copy._lost = self._lost.copy()
            copy._dropped = self._dropped.copy()
            copy._sessions = {key: states.copy() for key, states in self._sessions.items()}
            return copy

    @property
    def streams(self) -> list[str]:
        """All streams that events were sent to."""
        return sorted({sent.stream for sent in self._sent.values()})

    def ids_of(self, stream: str) -> list[int]:
        """Return the ids of a stream's events, as far as they are known, in order."""
        return sorted(event_id for payload, event_id in self._ids.items() if self._sent[payload].stream == stream)

    # What happens.

    def opened(self, *, always: bool) -> int:
        """Note that somebody opens the store and return the number of the opening.

        Args:
            always: Whether what it acknowledges is on the disk.
        """
        with self._mutex:
            self._openings.append(_Opening(max(self.given, default=0), always=always))
            return len(self._openings) - 1

    def sent(self, opening: int, events: Iterable[tuple[str, bytes]]) -> None:
        """Note events that are about to be appended with one call."""
        with self._mutex:
            call = len(self._sent)
            for stream, payload in events:
                self._sent[payload] = _Sent(stream, opening, call)
                self._calls[call] += 1

    def acknowledged(self, payload: bytes, event_id: int) -> None:
        """Note that an append has returned.

        Raises:
            BrokenPromiseError: The id was given out before, or is not above all that were.
        """
        with self._mutex:
            opening = self._openings[self._sent[payload].opening]
            if event_id in self.given or event_id <= opening.floor:
                raise BrokenPromiseError(f"id {event_id} was given out again, or is not above {opening.floor}")
            self.given[event_id] = payload
            self._ids[payload] = event_id
            opening.acknowledged.append(payload)
            if opening.always:
                self.required.add(payload)

    def synced(self, opening: int) -> None:
        """Note that the disk has all that an opening has acknowledged so far."""
        with self._mutex:
            found = self._openings[opening]
            self.required.update(found.acknowledged[found.covered :])
            found.covered = len(found.acknowledged)

    def shown(self, found: Contents) -> None:
        """Note what a reader was shown: of what is acknowledged once it is on disk, nothing may go."""
        with self._mutex:
            for events in found.values():
                for event_id, payload in events:
                    sent = self._sent.get(payload)
                    if sent is not None and self._openings[sent.opening].always:
                        self._ids[payload] = event_id
                        self.required.add(payload)

    def keep(self, events: int | None) -> None:
        """Note that retention drops from streams, but none of their newest so many events; None for none at all."""
        with self._mutex:
            self.swept = True
            if events is not None:
                self.kept = min(self.kept or events, events)

    def _kept_of(self, stream: str) -> int | None:
        """Return how many events retention leaves to a stream, None when it drops nothing of it."""
        key, *below = stream.split("/")
        if self.swept and below and None in self._sessions.get(key, ())[-1:]:
            return 0
        return self.kept

    def session(self, key: str, owner: Owner | None) -> None:
        """Note what is about to become of a session."""
        with self._mutex:
            self._sessions.setdefault(key, [None]).append(owner)

    def session_done(self, key: str) -> None:
        """Note that it became so."""
        with self._mutex:
            del self._sessions[key][:-1]

    # What must be.

    def all_there(self) -> None:
        """Note that what was acknowledged must be there, synced or not: the system has it."""
        with self._mutex:
            self.required |= self._ids.keys() - self._lost - self._dropped

    def check(self, found: Contents, sessions: Mapping[str, Owner], *, has_notes: bool = True) -> None:
        """Compare what a store holds with what it must.

        Args:
            found: All streams.
            sessions: All sessions.
            has_notes: Whether the store knows what retention has dropped.

        Raises:
            BrokenPromiseError: With what is wrong.
        """
        with self._mutex:
            ids: dict[bytes, int] = {}
            for stream, events in found.items():
                self._check_stream(stream, events, ids)
            self._check_lost(ids, has_notes=has_notes)
            missing = (self.required | self._ids.keys()) - self._lost - self._dropped - ids.keys()
            missing = {payload for payload in missing if not self._is_excused(payload, found, has_notes=has_notes)}
            self._check_required(missing)
            self._check_holes(missing, ids)
            self._check_calls(ids)
            for key, states in self._sessions.items():
                if sessions.get(key) not in states:
                    raise BrokenPromiseError(f"session {key} is {sessions.get(key)}, it was {states}")
            if unknown := sessions.keys() - self._sessions.keys():
                raise BrokenPromiseError(f"sessions {sorted(unknown)} were never opened")

    def _check_stream(self, stream: str, events: Sequence[tuple[int, bytes]], ids: dict[bytes, int]) -> None:
        last = 0
        for event_id, payload in events:
            sent = self._sent.get(payload)
            if sent is None or sent.stream != stream:
                raise BrokenPromiseError(f"event {event_id} of {stream} was never stored there: {payload[:40]!r}")
            if payload in ids or event_id <= last:
                raise BrokenPromiseError(f"event {event_id} of {stream} comes twice, or after event {last}")
            if self.given.get(event_id, payload) != payload or self._ids.get(payload, event_id) != event_id:
                raise BrokenPromiseError(f"event {event_id} of {stream} has the id or the payload of another")
            ids[payload] = last = event_id

    def _check_lost(self, ids: Mapping[bytes, int], *, has_notes: bool) -> None:
        back = self._lost & ids.keys()
        if has_notes:
            # Without them an index that is made again shows what is still in files.
            back |= self._dropped & ids.keys()
        if back:
            raise BrokenPromiseError(f"{len(back)} events were gone and are back: {sorted(ids[each] for each in back)}")

    def _is_excused(self, payload: bytes, found: Contents, *, has_notes: bool) -> bool:
        """Whether retention may have dropped an event: enough newer ones are there, and none that is older."""
        kept = self._kept_of(self._sent[payload].stream)
        if kept is None:
            return False
        event_id = self._ids[payload]
        ids = [each for each, _ in found.get(self._sent[payload].stream, ())]
        newer = sum(each > event_id for each in ids)
        return newer >= kept and (newer == len(ids) or not has_notes)

    def _check_required(self, missing: set[bytes]) -> None:
        lost = missing & self.required
        if lost:
            first = min(lost, key=self._ids.__getitem__)
            raise BrokenPromiseError(
                f"{len(lost)} events that were on disk are gone, the first is {self._ids[first]}, {self._sent[first]}"
            )

    def _check_holes(self, missing: set[bytes], ids: Mapping[bytes, int]) -> None:
        newest: Counter[str | int] = Counter()
        for payload, event_id in ids.items():
            sent = self._sent[payload]
            for place in (sent.stream, sent.opening):
                newest[place] = max(newest[place], event_id)
        for payload in missing:
            sent, event_id = self._sent[payload], self._ids[payload]
            if any(event_id < newest[place] for place in (sent.stream, sent.opening)):
                raise BrokenPromiseError(f"event {event_id} is gone, of {sent}, and some behind it are there")

    def _check_calls(self, ids: Mapping[bytes, int]) -> None:
        if self.swept:
            return
        counts = Counter(self._sent[payload].call for payload in ids)
        for call, count in counts.items():
            if count != self._calls[call]:
                raise BrokenPromiseError(f"{count} of the {self._calls[call]} events of one call are there")

    def settle(self, found: Contents, sessions: Mapping[str, Owner]) -> None:
        """Note what a store shows that was opened after the power went: it must stay so."""
        with self._mutex:
            for events in found.values():
                for event_id, payload in events:
                    self.given[event_id] = payload
                    self._ids[payload] = event_id
            there = {payload for events in found.values() for _, payload in events}
            self._dropped = ((self.required | self._dropped) - there) & self._ids.keys()
            self._lost = self._sent.keys() - there - self._dropped
            self.required = there
            self._sessions = {key: [sessions.get(key)] for key in self._sessions}

    def at_rest(self) -> Ledger:
        """Return what a backup holds that is made now, while nothing is appended."""
        copy = self.copy()
        there = (copy.required | copy._ids.keys()) - copy._lost - copy._dropped
        copy.required = there
        return copy

    def restored(self, backup: Ledger) -> Ledger:
        """Return what the store holds once it was restored; no id is given out again, whatever was before."""
        after = backup.copy()
        with self._mutex:
            after.given |= self.given
            after._sent |= self._sent
            after._calls |= self._calls
            after._openings = [each.copy() for each in self._openings]
            after._lost = self._sent.keys() - after.required - after._dropped
        return after
