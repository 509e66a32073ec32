"""Calls into the MCP endpoint that no client makes: opening a session again, and closing one that is idle."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from pydantic_core import from_json, to_json
from starlette.types import ASGIApp, Message, Scope

from logstore.mcp.scope import SessionScope, current_session

SESSION_HEADER: Final = b"mcp-session-id"
_INITIALIZED: Final = b'{"jsonrpc":"2.0","method":"notifications/initialized"}'
_OF_THE_REQUEST: Final = frozenset(
    {
        SESSION_HEADER,
        b"accept",
        b"content-length",
        b"content-type",
        b"last-event-id",
        b"mcp-protocol-version",
        b"transfer-encoding",
    }
)
"""Headers that say something of one request; the others say who sends it, and where to."""
_KEPT: Final = ("protocolVersion", "capabilities", "clientInfo")
MAX_INITIALIZE_BYTES: Final = 64 << 10
"""Every worker keeps it in memory as long as the session lives."""
_BODY_HEADERS: Final = (
    (b"accept", b"application/json, text/event-stream"),
    (b"content-type", b"application/json"),
)


class InnerResponse(NamedTuple):
    """What the endpoint answered."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def session_id(self) -> str | None:
        """The SDK's id of the session."""
        return session_id_in(self.headers)


def session_id_in(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the session id that headers name."""
    return next((value.decode("latin-1") for name, value in headers if name.lower() == SESSION_HEADER), None)


def with_session_id(headers: Iterable[tuple[bytes, bytes]], session_id: str) -> list[tuple[bytes, bytes]]:
    """Return headers that name another session."""
    return [
        (name, session_id.encode("latin-1") if name.lower() == SESSION_HEADER else value) for name, value in headers
    ]


def initialize_of(body: bytes) -> bytes:
    """Return what of a request it takes to open its session again; empty when it opens none.

    Read as the SDK does: to it NaN is JSON.
    """
    try:
        request = from_json(body)
    except ValueError:
        return b""
    if not isinstance(request, dict) or request.get("method") != "initialize":
        return b""
    params = request.get("params")
    kept = {name: params[name] for name in _KEPT if name in params} if isinstance(params, dict) else {}
    return to_json({"jsonrpc": "2.0", "method": "initialize", "params": kept})


async def open_inside(app: ASGIApp, session: SessionScope, initialize: bytes, scope: Scope) -> InnerResponse:
    """Open a session in the SDK as its client once did, and return what the SDK answered.

    Args:
        app: The endpoint.
        session: Where its events go.
        initialize: The body of the request that opened it.
        scope: Of the request on whose behalf it is done; the credential is in it.

    Returns:
        Status 400 also when the body is none that the SDK can have taken.
    """
    try:
        # The SDK's own parser, which takes more than JSON has: what opened the session once opens it again.
        request = from_json(initialize)
    except ValueError:
        request = None
    if type(request) is not dict:
        return InnerResponse(400, [], b"")
    # An id that no client has, and whose stream is not kept: the client got its answer long ago.
    request["id"] = session.unrecorded = f"logstore-{secrets.token_hex(8)}"
    opened = await _call(app, session, scope, "POST", _BODY_HEADERS, to_json(request))
    if opened.status >= 400 or opened.session_id is None:
        return opened
    headers = (*_BODY_HEADERS, (SESSION_HEADER, opened.session_id.encode("latin-1")))
    initialized = await _call(app, session, scope, "POST", headers, _INITIALIZED)
    return opened if initialized.status < 400 else initialized


async def close_inside(app: ASGIApp, session: SessionScope, sdk_id: str, scope: Scope) -> InnerResponse:
    """End a session in the SDK, as its client would."""
    return await _call(app, session, scope, "DELETE", ((SESSION_HEADER, sdk_id.encode("latin-1")),), b"")


async def _call(
    app: ASGIApp,
    session: SessionScope,
    scope: Scope,
    method: str,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes,
) -> InnerResponse:
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in _OF_THE_REQUEST]
    length = (b"content-length", str(len(body)).encode())
    inner: dict[str, Any] = {**scope, "method": method, "headers": [*kept, *headers, length]}
    start: Message = {"status": 500, "headers": []}
    chunks: list[bytes] = []
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:
            # Nobody goes away here.
            await asyncio.get_running_loop().create_future()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
        else:
            chunks.append(message.get("body", b""))

    token = current_session.set(session)
    try:
        await app(inner, receive, send)
    finally:
        current_session.reset(token)
    return InnerResponse(start["status"], list(start["headers"]), b"".join(chunks))
