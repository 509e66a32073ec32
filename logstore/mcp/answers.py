"""What the resume layer answers itself, in the words that MCP has for it."""

from __future__ import annotations

from typing import Final

from mcp_types import INTERNAL_ERROR, INVALID_REQUEST, ErrorData, JSONRPCError
from starlette.responses import Response

from logstore.mcp.messages import encode
from logstore.mcp.scope import RequestId, request_id_of
from logstore.storage import FLAG_FINAL, FLAG_MODEL, FLAG_REQUEST

CALL_LOST: Final = -32010
"""JSON-RPC error code of a call whose server process is gone, so that its result will never come."""

_CALL_LOST: Final = (
    "the server process that ran this call is gone and its result is lost; call again if running it twice does no harm"
)
_GAP: Final = "events after that one are gone, so the stream cannot be resumed without a hole; call again"


def refusal(status: int, reason: str, code: int = INVALID_REQUEST, request_id: RequestId | None = None) -> Response:
    """Return a response with a JSON-RPC error."""
    return Response(_error(request_id, code, reason), status_code=status, media_type="application/json")


def unknown_session() -> Response:
    """Return the answer for a session that is unknown, another client's, ended or expired: all the same."""
    return refusal(404, "Session not found")


def unknown_event() -> Response:
    """Return the answer for an event that is not of this session, or nowhere: both the same."""
    return refusal(400, "Bad Request: this session has no event with that id to resume after")


def unavailable(reason: str, request_id: RequestId | None = None) -> Response:
    """Return the answer when the session is well but cannot be served just now."""
    return refusal(503, reason, INTERNAL_ERROR, request_id)


def lost(request_id: RequestId | None) -> Response:
    """Return the answer to a request whose server process died before it answered anything."""
    return refusal(502 if request_id is None else 200, _CALL_LOST, CALL_LOST, request_id)


def lost_message(request_id: RequestId | None) -> bytes:
    """Return the same on a stream that has begun."""
    return as_sse(_error(request_id, CALL_LOST, _CALL_LOST))


def as_sse(payload: bytes, event_id: int | None = None) -> bytes:
    """Return a message, JSON in one line, as it goes over a stream."""
    if event_id is None:
        return b"event: message\r\ndata: %b\r\n\r\n" % payload
    return b"id: %d\r\nevent: message\r\ndata: %b\r\n\r\n" % (event_id, payload)


def lost_event(name: str) -> tuple[str, bytes, int]:
    """Return the event that ends the stream of a request whose server process is gone, for `append_many`."""
    payload = _error(request_id_of(name), CALL_LOST, _CALL_LOST)
    return name, payload, FLAG_MODEL | FLAG_FINAL | FLAG_REQUEST


def gap(name: str) -> bytes:
    """Return what ends a resumed stream of a request that has a hole."""
    return as_sse(_error(request_id_of(name), INVALID_REQUEST, _GAP))


def _error(request_id: RequestId | None, code: int, reason: str) -> bytes:
    error = JSONRPCError(jsonrpc="2.0", id=request_id, error=ErrorData(code=code, message=reason))
    return encode("", error)[0]
