"""What three witnesses say about one call: the server, the client, and the disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCRequest

from logstore.mcp.messages import Message

_MOST_NAMED: Final = 3


class Entry(NamedTuple):
    """One event as a witness saw it.

    Attributes:
        event_id: Its id.
        text: What it says, see `text_of`.
    """

    event_id: str
    text: str


def text_of(message: Message) -> str:
    """Return what a message of the call says: the text of a progress report or of the result."""
    if isinstance(message, JSONRPCError):
        return f"error: {message.error.message}"
    if isinstance(message, JSONRPCNotification | JSONRPCRequest):
        return str((message.params or {}).get("message"))
    fields: dict[str, Any] = message if isinstance(message, dict) else message.result
    return str(fields["content"][0]["text"])


def problems_in(expected: Sequence[str], witnesses: Mapping[str, Sequence[Entry]]) -> list[str]:
    """Return what is wrong, one sentence each; none when all saw each event once, in order, under one id.

    Args:
        expected: What the events of the call say, in order.
        witnesses: What each witness saw, in order.
    """
    problems = [
        problem
        for witness, entries in witnesses.items()
        for problem in _problems_of_one(witness, expected, [entry.text for entry in entries])
    ]
    return problems or _problems_with_ids(witnesses)


def _problems_of_one(witness: str, expected: Sequence[str], texts: Sequence[str]) -> list[str]:
    wanted, found = Counter(expected), Counter(texts)
    problems: list[str] = []
    if lost := list((wanted - found).elements()):
        problems.append(f"{witness}: {len(lost)} lost: {_some(lost)}")
    if surplus := list((found - wanted).elements()):
        doubled = [text for text in surplus if text in wanted]
        foreign = [text for text in surplus if text not in wanted]
        if doubled:
            problems.append(f"{witness}: {len(doubled)} doubled: {_some(doubled)}")
        if foreign:
            problems.append(f"{witness}: {len(foreign)} that nobody sent: {_some(foreign)}")
    if not problems and list(texts) != list(expected):
        place = next(place for place, text in enumerate(texts) if text != expected[place])
        problems.append(f"{witness}: out of order: {texts[place]!r} came where {expected[place]!r} belongs")
    return problems


def _problems_with_ids(witnesses: Mapping[str, Sequence[Entry]]) -> list[str]:
    """Compare each witness, whose texts are all right, with the first one."""
    (first, truth), *others = witnesses.items()
    problems: list[str] = []
    if len({entry.event_id for entry in truth}) < len(truth):
        problems.append(f"{first}: one event id stands for several events")
    for witness, entries in others:
        differing = [(mine, theirs) for mine, theirs in zip(truth, entries, strict=True) if mine != theirs]
        if differing:
            mine, theirs = differing[0]
            problems.append(
                f"{witness}: {len(differing)} under another event id: {theirs.text!r} as {theirs.event_id}, "
                f"for {first} it is {mine.event_id}"
            )
    return problems


def _some(texts: Sequence[str]) -> str:
    named = ", ".join(repr(text) for text in texts[:_MOST_NAMED])
    return named if len(texts) <= _MOST_NAMED else f"{named} and {len(texts) - _MOST_NAMED} more"
