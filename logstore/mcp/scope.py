"""Which session a call belongs to, and how its streams are named in the log.

The SDK names a stream after the JSON-RPC request id, `"1"`, in every session. So the name in the log begins with a
token of the session: `<token>/<stream id>`. The token is random and not the session id, since that is not known before
the response to `initialize`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from contextvars import ContextVar
from typing import Final
from urllib.parse import unquote

from logstore.mcp.sdk import STANDALONE_STREAM
from logstore.storage.record import MAX_STREAM_BYTES

_TOKEN_BYTES: Final = 16
_TEXT: Final = "%-"
"""Before a request id that looks like a number and is a str; `_escape` never makes it."""
_HASHED: Final = "#"
_NUMBER: Final = re.compile(r"0|-?[1-9][0-9]*")

RequestId = int | str
"""As JSON-RPC has it; `1` and `"1"` are not the same."""


class SessionScope:
    """One session's place in the log.

    Attributes:
        token: What its stream names begin with; 32 hexadecimal digits.
        running: Names of the streams of requests that wait for their answer.
        primed: Ids of the priming events of streams whose first response has not ended, by name.
        unrecorded: The one stream id that is not stored: of the request by which a session is revived.
        newest: Id of its newest event that may not be stored yet.
        closed: Whether nothing is stored for it any more: another process may serve it now.
    """

    __slots__ = ("_names", "_text_ids", "closed", "newest", "prefix", "primed", "running", "token", "unrecorded")

    def __init__(self, token: str | None = None) -> None:
        self.token = token or secrets.token_hex(_TOKEN_BYTES)
        self.prefix = f"{self.token}/"
        self.running: set[str] = set()
        self.primed: dict[str, str] = {}
        self.unrecorded: str | None = None
        self.newest = 0
        self.closed = False
        self._text_ids: set[str] = set()
        # Of streams whose request is running: names are asked for with every event.
        self._names: dict[str, str] = {}

    def begin(self, request_id: RequestId) -> str:
        """Note a request that was sent, and return the name of its stream."""
        stream_id = str(request_id)
        if isinstance(request_id, str) and _NUMBER.fullmatch(request_id):
            self._text_ids.add(stream_id)
        elif self._text_ids:
            self._text_ids.discard(stream_id)
        self._names.pop(stream_id, None)
        name = self._names[stream_id] = self.name_of(stream_id)
        self.running.add(name)
        return name

    def answered(self, stream_id: str, name: str) -> None:
        """Note that a request was answered."""
        self.running.discard(name)
        self._names.pop(stream_id, None)
        if self._text_ids:
            self._text_ids.discard(stream_id)

    def refused(self, name: str) -> None:
        """Note that the SDK did not take a request."""
        self.running.discard(name)
        for stream_id in [each for each, known in self._names.items() if known == name]:
            self.answered(stream_id, name)

    def name_of(self, stream_id: str) -> str:
        """Return the name in the log of a stream of this session; never fails, since clients choose request ids."""
        known = self._names.get(stream_id)
        if known is not None:
            return known
        if stream_id in self._text_ids and len(stream_id) + len(self.prefix) + len(_TEXT) <= MAX_STREAM_BYTES:
            return f"{self.prefix}{_TEXT}{stream_id}"
        return name_in_log(self.prefix, stream_id)

    def owns(self, name: str) -> bool:
        """Whether a stream is one of this session's."""
        return name.startswith(self.prefix)


def request_id_of(name: str) -> RequestId | None:
    """Return the id of the request that a session's stream belongs to.

    Returns:
        None for the standalone stream, for an id so long that the name holds a hash of it, and for a name that no
        session made.
    """
    escaped = name.partition("/")[2]
    if escaped.startswith(_TEXT):
        return escaped.removeprefix(_TEXT)
    if escaped == STANDALONE_STREAM or escaped.startswith(_HASHED):
        return None
    try:
        stream_id = unquote(escaped, errors="surrogatepass")
    except UnicodeDecodeError:
        return None
    return int(stream_id) if _NUMBER.fullmatch(stream_id) else stream_id


def is_standalone(name: str) -> bool:
    """Whether a session's stream is the one that belongs to no request, and never ends."""
    return name.partition("/")[2] == STANDALONE_STREAM


current_session: ContextVar[SessionScope | None] = ContextVar("logstore_session", default=None)
"""Set around each call into the SDK; the tasks that it starts for a session inherit it."""


def name_in_log(prefix: str, stream_id: str) -> str:
    """Return a valid name for a stream id of any length and content: escaped, or hashed where that is too long."""
    name = prefix + _escape(stream_id)
    if 0 < len(name) <= MAX_STREAM_BYTES:
        return name
    return f"{prefix}{_HASHED}{hashlib.sha256(stream_id.encode(errors='surrogatepass')).hexdigest()}"


def _escape(stream_id: str) -> str:
    """Return a stream id in ASCII that prints; reversible, and most stay as they are."""
    if stream_id.isascii() and stream_id.isprintable() and "%" not in stream_id and not stream_id.startswith(_HASHED):
        return stream_id
    return "".join(
        character
        if character.isascii() and character.isprintable() and character != "%" and (position or character != _HASHED)
        else "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass"))
        for position, character in enumerate(stream_id)
    )
