"""How events are printed: a line each for people, or the JSON of an export for programs."""

from __future__ import annotations

import click

from logstore.cli.output import iso_time, line_width, short_time, shown
from logstore.ops.transfer.event_json import write_event
from logstore.storage.origin import split_origin
from logstore.storage.record import FLAG_FINAL, FLAG_IMPORTED, FLAG_MODEL, FLAG_PRIMING, FLAG_REQUEST, Event

_WORDS = {
    FLAG_PRIMING: "priming",
    FLAG_MODEL: "model",
    FLAG_REQUEST: "request",
    FLAG_FINAL: "final",
    FLAG_IMPORTED: "imported",
}
_ID_WIDTH = 19
_TIME_WIDTH = 23
_SIZE_WIDTH = 9
_FLAGS_WIDTH = 13
_STREAM_WIDTH = 40
_LEAST_MESSAGE = 20
_JSON_RPC = '{"jsonrpc":"2.0",'


class EventLines:
    """Prints events one below the other, as they come.

    Args:
        as_json: One JSON object a line, the form that an export has.
        with_stream: Whether the events are of more than one stream.
    """

    def __init__(self, *, as_json: bool, with_stream: bool) -> None:
        self._as_json = as_json
        self._with_stream = with_stream
        self._headed = False

    def say(self, event: Event) -> None:
        """Print one event."""
        if self._as_json:
            click.echo(write_event(event))
            return
        if not self._headed:
            self._headed = True
            click.echo(self._line("event_id", "time (UTC)", "bytes", "kind", "stream", "message"))
        time = short_time(iso_time(event.time_us), milliseconds=True)
        size = f"{len(event.payload):,}"
        stream = shown(event.stream, _STREAM_WIDTH)
        click.echo(self._line(event.event_id, time, size, _flags(event.flags), stream, _message(event)))

    def _line(self, event_id: str, time: str, size: str, flags: str, stream: str, message: str) -> str:
        line = f"{event_id:<{_ID_WIDTH}}  {time:<{_TIME_WIDTH}}  {size:>{_SIZE_WIDTH}}  {flags:<{_FLAGS_WIDTH}}  "
        if self._with_stream:
            line += f"{stream:<{_STREAM_WIDTH}}  "
        return (line + shown(message, max(_LEAST_MESSAGE, line_width() - len(line)))).rstrip()


def _flags(flags: int) -> str:
    """Return an event's flags in words; one without is that of a plain JSON object."""
    words = [word for flag, word in _WORDS.items() if flags & flag]
    unknown = flags & ~sum(_WORDS)
    return " ".join([*words, f"{unknown:#x}"] if unknown else words) or "dict"


def _message(event: Event) -> str:
    payload = event.payload
    if event.flags & FLAG_IMPORTED:
        try:
            _, _, payload = split_origin(payload)
        except ValueError:
            return repr(payload[: line_width()])
    # Of mebibytes no more than a line is decoded; a character that is cut in two ends it.
    text = payload[: 4 * line_width()].decode(errors="backslashreplace")
    # What every message of the SDK begins with says nothing.
    return "{" + text.removeprefix(_JSON_RPC) if text.startswith(_JSON_RPC) else text
