"""Requests that another worker serves: passed on, one hop, and never twice once they may have begun."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from starlette.responses import Response
from starlette.types import Scope

from logstore.mcp import answers
from logstore.mcp.connections import Connection
from logstore.mcp.custody import LOOK_AGAIN_S, Custody, LayerOptions
from logstore.mcp.peers import CALL_KEY, Outcome, PeerCall, Peers
from logstore.mcp.sessions import key_of

_STOPPING: Final = "the server is stopping; nothing was done, try again"
_SILENT: Final = "the server process that has this session does not react; the request may still be served"


class Forwarding:
    """Passes requests on.

    Args:
        custody: The sessions of this process, and the other workers.
        options: Settings.
        max_body_bytes: Returns what a request may bring at most.
    """

    def __init__(self, custody: Custody, options: LayerOptions, max_body_bytes: Callable[[], int]) -> None:
        self._custody = custody
        self._options = options
        self._max_body_bytes = max_body_bytes
        self._passing: set[Connection] = set()

    def end_all(self) -> None:
        """End the responses that come from other workers."""
        for connection in self._passing:
            connection.end()

    async def pass_on(self, worker: int, peers: Peers, scope: Scope, connection: Connection) -> Outcome:
        """Pass a request on; it is answered unless nothing was done there, or it is safe to try again."""
        if not connection.received and not await connection.read(self._max_body_bytes()):
            await connection.answer(answers.refusal(413, "Request body too large"))
            return Outcome.DONE
        self._passing.add(connection)
        try:
            outcome = await peers.forward(worker, scope, connection)
        finally:
            self._passing.discard(connection)
        if outcome is Outcome.SILENT:
            await connection.answer(answers.unavailable(_SILENT, connection.request_id))
        if outcome is Outcome.LOST and connection.status:
            # A response to a request on which no id went out cannot be resumed: its end is the only place for this.
            await connection.finish(answers.lost_message(connection.request_id) if connection.body else b"")
        elif outcome is Outcome.LOST and scope["method"] == "POST":
            await connection.answer(answers.lost(connection.request_id))
        return outcome

    async def leave_to_others(
        self, session_id: str | None, scope: Scope, connection: Connection, *, resumes: bool
    ) -> bool:
        """While the server stops, leave new work to another worker: streams that begin here are ended at once.

        Returns:
            Whether the request was answered; what belongs to a call that runs here is served here.
        """
        if not connection.received and not await connection.read(self._max_body_bytes()):
            await connection.answer(answers.refusal(413, "Request body too large"))
            return True
        request_id = connection.request_id
        call: PeerCall | None = scope.get(CALL_KEY)
        if (scope["method"] != "GET" and request_id is None) or (resumes and call is not None):
            return False
        live = None if resumes or session_id is None else self._custody.live.get(key_of(session_id))
        began_s = time.monotonic()
        while connection.waits and time.monotonic() - began_s < self._options.patience_s:
            if live is not None and live.may_use(scope):
                await self._custody.let_go(live)
            if call is not None:
                await send_back(call, connection, stopping=True)
            elif not await self._pass_to_any(scope, connection):
                break
        if connection.waits and request_id is not None:
            await connection.answer(answers.unavailable(_STOPPING, request_id))
        return not connection.waits

    async def _pass_to_any(self, scope: Scope, connection: Connection) -> bool:
        """Pass a request to any other worker; return whether there is a point in trying again.

        There is none when all the others are stopping, too, or gone: the server would wait for each other's requests.
        """
        peers = self._custody.peers
        stays = False
        for worker in [] if peers is None else peers.others():
            assert peers is not None
            outcome = await self.pass_on(worker, peers, scope, connection)
            if connection.status:
                return True
            stays = stays or outcome is Outcome.AGAIN
            if outcome is Outcome.UNREACHABLE:
                stays = stays or await self._custody.keeper.is_alive(worker)
        await asyncio.sleep(LOOK_AGAIN_S)
        return stays


async def send_back(call: PeerCall, connection: Connection, *, stopping: bool) -> None:
    """Give a request back to the worker that passed it on: nothing was done, it looks again who serves it."""
    call.again, call.stopping = True, stopping
    await connection.answer(Response(status_code=503))
