"""What is stored: notifications as the SDK sends them."""

from __future__ import annotations

from typing import Final

from mcp_types import JSONRPCNotification


def message_of(size: int) -> JSONRPCNotification:
    """Return a notification of so many bytes on the wire, 100 at least."""
    message = _notification("")
    return _notification(("sixteen letters " * (size // 16 + 1))[: size - len(wire_bytes(message))])


def wire_bytes(message: JSONRPCNotification) -> bytes:
    """Return what goes over the wire."""
    return message.model_dump_json(by_alias=True, exclude_unset=True).encode()


def _notification(data: str) -> JSONRPCNotification:
    params = {"level": "info", "data": data}
    return JSONRPCNotification(jsonrpc="2.0", method="notifications/message", params=params)


MESSAGE: Final = message_of(600)
