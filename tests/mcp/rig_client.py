"""A client that never gives up, and accounts for every event: what came, how often, in which order.

It opens its session once, and resumes each call with the last id that it saw until the call is answered, on whichever
worker the balancer sends it to. What no server may do is an error at once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from tests.mcp.rig_balancer import TAG_HEADER
from tests.mcp.rig_http import BrokenConnectionError, Exchange
from tests.mcp.strict_client import PROTOCOL, Sse

_RETRY_S: Final = 0.03
_tags = itertools.count()


class BrokenRuleError(AssertionError):
    """The server did what no server may."""


@dataclass
class Account:
    """What came of one stream, over all its connections.

    Attributes:
        name: Of what; the label of a call.
        ids: Every event id that came, in order.
        texts: What the notifications say, in order.
        tags: The tags of its requests, by which a balancer knows its connections.
        resumes: How often it was resumed.
        waits: For each resume that had an event, seconds from the GET to the first event.
    """

    name: str
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    resumes: int = 0
    waits: list[float] = field(default_factory=list)

    def take(self, event: Sse) -> None:
        """Take an event.

        Raises:
            BrokenRuleError: It has no id, or came before, or out of order.
        """
        if event.id is None:
            raise BrokenRuleError(f"{self.name}: an event without an id: {event.message}")
        if self.ids and int(event.id) <= int(self.ids[-1]):
            again = "again" if event.id in self.ids else "out of order"
            raise BrokenRuleError(f"{self.name}: event {event.id} came {again}, after {self.ids[-1]}: {event.message}")
        self.ids.append(event.id)


@dataclass
class Call(Account):
    """What came of one call.

    Attributes:
        request_id: Its JSON-RPC id.
        result: The answer.
        error: Instead of the answer, when it ended with one.
        lost: Whether it ended before its first id was seen, so that nothing can be resumed.
    """

    request_id: int = 0
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    lost: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more may come."""
        return self.result is not None or self.error is not None or self.lost

    @property
    def text(self) -> str:
        """What the result says."""
        assert self.result is not None, f"{self.name} ended with {self.error or 'nothing'}"
        text: str = self.result["content"][0]["text"]
        return text

    def answer(self, message: dict[str, Any]) -> None:
        """Take an answer.

        Raises:
            BrokenRuleError: It is not the one answer to this call.
        """
        if self.over:
            raise BrokenRuleError(f"{self.name}: a second answer: {message}")
        if message["id"] != self.request_id:
            raise BrokenRuleError(f"{self.name}: request {self.request_id} got the answer to another: {message}")
        self.result, self.error = message.get("result"), message.get("error")


class StubbornClient:
    """One session, for as long as it may live.

    Attributes:
        session_id: Given by the server.
        port: Where it connects to; may change, as an address does.
    """

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port = port
        self.session_id = ""
        self._token = token
        self._request_ids = itertools.count(1)

    @classmethod
    async def connected(cls, port: int, token: str | None = None) -> StubbornClient:
        """Open a session; that is done once, and not resumed."""
        client = cls(port, token)
        capabilities: dict[str, Any] = {"elicitation": {"form": {}}}
        info = {
            "protocolVersion": PROTOCOL,
            "capabilities": capabilities,
            "clientInfo": {"name": "stubborn", "version": "1"},
        }
        async with client.post(_request(0, "initialize", info)) as exchange:
            assert exchange.status == 200, await exchange.body()
            client.session_id = exchange.headers["mcp-session-id"]
            await exchange.rest()
        await client.tell("notifications/initialized")
        return client

    @asynccontextmanager
    async def post(self, body: dict[str, Any], account: Account | None = None) -> AsyncGenerator[Exchange]:
        """POST a message, once."""
        async with Exchange.begun(self.port, "POST", self._headers(account), body) as exchange:
            yield exchange

    @asynccontextmanager
    async def get(self, last_event_id: str | None, account: Account | None = None) -> AsyncGenerator[Exchange]:
        """GET a stream after an event, or the standalone one, once."""
        headers = self._headers(account) | ({} if last_event_id is None else {"last-event-id": last_event_id})
        async with Exchange.begun(self.port, "GET", headers) as exchange:
            yield exchange

    async def tell(self, method: str) -> None:
        """Send a notification, once."""
        async with self.post({"jsonrpc": "2.0", "method": method}) as exchange:
            assert exchange.status == 202, await exchange.body()

    async def reply(self, message: dict[str, Any]) -> int:
        """Send the answer to a request of the server's, once; return the status."""
        async with self.post({"jsonrpc": "2.0", **message}) as exchange:
            return exchange.status

    async def end(self) -> int:
        """End the session; return the status."""
        async with Exchange.begun(self.port, "DELETE", self._headers(None)) as exchange:
            return exchange.status

    async def call(self, tool: str, name: str, **arguments: Any) -> Call:
        """Call a tool and return the account of it, when it is over; `name` is its label, too.

        Raises:
            BrokenRuleError: The server broke a rule.
        """
        call = self.begin(name)
        await self.run(call, tool, **arguments)
        return call

    def begin(self, name: str) -> Call:
        """Return the account of a call that `run` will make."""
        return Call(name, request_id=next(self._request_ids))

    async def run(self, call: Call, tool: str, **arguments: Any) -> None:
        """Make a call; on return it is over."""
        params = {
            "name": tool,
            "arguments": {"label": call.name, **arguments},
            "_meta": {"progressToken": call.request_id},
        }
        try:
            async with self.post(_request(call.request_id, "tools/call", params), call) as exchange:
                await self._take_response(call, exchange)
        except BrokenConnectionError:
            pass
        call.lost = not call.over and not call.ids
        await self.finish(call)

    async def finish(self, call: Call) -> None:
        """Resume a call until it is over."""
        while not call.over:
            await self._resume(call)

    async def listen(self, account: Account) -> None:
        """Read the standalone stream for as long as the caller does not cancel."""
        while True:
            try:
                async with self.get(account.ids[-1] if account.ids else None, account) as exchange:
                    # 409: the server has not noticed yet that the connection before is gone.
                    if exchange.status == 200:
                        async for event in exchange:
                            account.take(event)
                            if event.message is not None:
                                account.texts.append(event.message["params"]["uri"])
                    elif exchange.status not in (409, 503):
                        raise BrokenRuleError(f"the standalone stream: {exchange.status} {await exchange.body()!r}")
            except BrokenConnectionError:
                pass
            account.resumes += 1
            await asyncio.sleep(_RETRY_S)

    async def _resume(self, call: Call) -> None:
        call.resumes += 1
        began = asyncio.get_running_loop().time()
        before = len(call.ids)
        try:
            async with self.get(call.ids[-1], call) as exchange:
                if exchange.status != 200:
                    raise BrokenRuleError(f"{call.name}: a resume got {exchange.status}: {await exchange.body()!r}")
                await self._take_events(call, exchange, began, before)
        except BrokenConnectionError:
            pass
        if not call.over:
            await asyncio.sleep(_RETRY_S)

    async def _take_response(self, call: Call, exchange: Exchange) -> None:
        if exchange.is_stream and exchange.status == 200:
            await self._take_events(call, exchange)
            return
        body = await exchange.body()
        if exchange.status == 404 or not exchange.headers.get("content-type", "").startswith("application/json"):
            raise BrokenRuleError(f"{call.name}: the call got {exchange.status}: {body!r}")
        message = _parsed(body)
        if "error" not in message:
            raise BrokenRuleError(f"{call.name}: the call got {exchange.status}: {body!r}")
        # The SDK's client takes an error without an id for the answer, too.
        call.answer({"id": call.request_id, "error": message["error"]})

    async def _take_events(self, call: Call, exchange: Exchange, began: float = 0.0, before: int = 0) -> None:
        async for event in exchange:
            if began and len(call.ids) == before:
                call.waits.append(asyncio.get_running_loop().time() - began)
            if not call.ids and event.id is None and event.message is not None and "error" in event.message:
                # Its worker died before there was an id; whoever passed the request on says so, and has none to give.
                call.answer(event.message)
                continue
            call.take(event)
            if event.message is None:
                continue
            if "method" in event.message:
                self._take_message(call, event.message)
            else:
                call.answer(event.message)

    @staticmethod
    def _take_message(call: Call, message: dict[str, Any]) -> None:
        if call.over:
            raise BrokenRuleError(f"{call.name}: a message after the answer: {message}")
        if message["method"] != "notifications/progress" or message["params"]["progressToken"] != call.request_id:
            raise BrokenRuleError(f"{call.name}: a message that is not of this call: {message}")
        call.texts.append(message["params"]["message"])

    def _headers(self, account: Account | None) -> dict[str, str]:
        tag = f"request-{next(_tags)}"
        if account is not None:
            account.tags.append(tag)
        headers = {
            TAG_HEADER: tag,
            "accept": "application/json, text/event-stream",
            "mcp-protocol-version": PROTOCOL,
        }
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token}"
        if self.session_id:
            headers["mcp-session-id"] = self.session_id
        return headers


def check_counted(call: Call, to: int, result: str) -> None:
    """Check a call that reports steps 1 to `to`: each once, in order, and the exact result, or as many as came before
    the error.

    Raises:
        BrokenRuleError: Something else came.
    """
    if call.texts != [f"{call.name} {step}" for step in range(1, len(call.texts) + 1)]:
        raise BrokenRuleError(f"{call.name}: these came: {call.texts}")
    if call.result is None:
        return
    if len(call.texts) != to or call.text != result or call.result.get("isError"):
        raise BrokenRuleError(f"{call.name}: {len(call.texts)} of {to} reports came, and {call.result}")


def _request(request_id: int, method: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}


def _parsed(body: bytes) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(body)
    return message
