"""Which session a call belongs to, and how its streams are named in the log.

The SDK names a stream after the JSON-RPC request id, `"1"`, in every session. So the name in the log begins with a
token of the session: `<token>/<stream id>`. The token is random and not the session id, since that is not known before
the response to `initialize`, and is a secret: whoever has it may speak in the session.
"""

from __future__ import annotations

import hashlib
import secrets
from contextvars import ContextVar
from typing import Final
from urllib.parse import unquote

import anyio

from logstore.storage.record import MAX_STREAM_BYTES

_TOKEN_BYTES: Final = 16


class SessionScope:
    """One session's place in the log.

    Attributes:
        token: What its stream names begin with; 32 hexadecimal digits.
        transport_prefix: What FastMCP's adapter puts before the stream ids of this session's transport.
    """

    __slots__ = ("__weakref__", "_readers", "token", "transport_prefix")

    def __init__(self) -> None:
        self.token = secrets.token_hex(_TOKEN_BYTES)
        self.transport_prefix = ""
        self._readers: set[anyio.CancelScope] = set()

    def name_of(self, stream_id: str) -> str:
        """Return the name in the log of a stream of this session; never fails, since clients choose request ids."""
        return name_in_log(f"{self.token}/", stream_id)

    def stream_id_of(self, name: str) -> str | None:
        """Return the SDK's id of a stream of this session, or None when the stream is another's.

        Of an id so long that its name holds a hash, the hash comes back: nobody can resume by that one through
        FastMCP's adapter.
        """
        token, slash, escaped = name.partition("/")
        if not slash or token != self.token:
            return None
        return unquote(escaped, errors="surrogatepass")

    def add_reader(self) -> anyio.CancelScope:
        """Return a cancel scope for one reader, cancelled when the session ends."""
        reader = anyio.CancelScope()
        self._readers.add(reader)
        return reader

    def remove_reader(self, reader: anyio.CancelScope) -> None:
        """Forget a reader that is done."""
        self._readers.discard(reader)

    def end(self) -> None:
        """End what reads in this session."""
        for reader in self._readers:
            reader.cancel()


current_session: ContextVar[SessionScope | None] = ContextVar("logstore_session", default=None)
"""Set around each call into the SDK; the tasks that it starts for a session inherit it."""


def name_in_log(prefix: str, stream_id: str) -> str:
    """Return a valid name for a stream id of any length and content: escaped, or hashed where that is too long."""
    name = prefix + _escape(stream_id)
    if 0 < len(name) <= MAX_STREAM_BYTES:
        return name
    return f"{prefix}#{hashlib.sha256(stream_id.encode(errors='surrogatepass')).hexdigest()}"


def _escape(stream_id: str) -> str:
    """Return a stream id in ASCII that prints; reversible, and most stay as they are."""
    if stream_id.isascii() and stream_id.isprintable() and "%" not in stream_id and not stream_id.startswith("#"):
        return stream_id
    return "".join(
        character
        if character.isascii() and character.isprintable() and character != "%" and (position or character != "#")
        else "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass"))
        for position, character in enumerate(stream_id)
    )
