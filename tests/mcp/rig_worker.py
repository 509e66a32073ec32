"""A worker of the rig: a process that serves MCP over a store.

Run as a script, this is a nursery: it has imported everything, and forks a worker for each line of orders on its stdin,
which takes milliseconds where a new interpreter takes a second. `application` is for `uvicorn --factory`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import traceback
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette

from logstore.mcp import PersistentEventStore, resumable_http_app
from tests.mcp.rig_orders import ORDERS_VARIABLE, Orders, Reap, bound_socket
from tests.mcp.rig_tools import Link, fastmcp_server, mcp_server


def app_for(orders: Orders) -> Starlette:
    """Return the app that a worker serves; it tells the test when it has started."""
    link = Link()
    store = PersistentEventStore(orders.path, durability=orders.durability)
    server: Any
    if orders.server == "fastmcp":
        server = fastmcp_server(link, auth=orders.auth)
    else:
        server = mcp_server(link, auth=orders.auth)
    options = dict(orders.options)
    if orders.server == "lowlevel":
        if orders.auth:
            options |= {"auth": server.settings.auth, "token_verifier": server._token_verifier}
        server = server._lowlevel_server
    if orders.bare:
        app: Starlette = server.streamable_http_app(event_store=store, **options)
    else:
        app = resumable_http_app(server, store, **options)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[Any, None]:
        listening = await link.connect(orders.control)
        async with inner(app) as state:
            link.tell("ready")
            yield state
        listening.cancel()

    app.router.lifespan_context = lifespan
    return app


def application() -> Starlette:
    """Return the app of one of uvicorn's workers."""
    return app_for(msgspec.json.decode(os.environ[ORDERS_VARIABLE], type=Orders))


def serve(orders: Orders) -> None:
    """Serve until a signal says otherwise."""
    # Before the SDK does it, which wraps each line as for a narrow terminal.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = uvicorn.Config(
        app_for(orders), log_level="warning", lifespan="on", timeout_graceful_shutdown=orders.stop_s
    )
    with bound_socket(orders.port) as listener:
        listener.listen(1024)
        asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


def _fork(orders: Orders) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        log = os.open(orders.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for fd, target in ((nothing, 0), (nothing, 1), (log, 2)):
            os.dup2(fd, target)
        serve(orders)
        status = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        # Not the nursery's exit handlers and buffers.
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Be a nursery until stdin ends."""
    decoder = msgspec.json.Decoder(Orders | Reap)
    # Unbuffered: a forked worker has no part of the next line.
    with os.fdopen(0, "rb", buffering=0) as stdin:
        for line in stdin:
            order = decoder.decode(line)
            if isinstance(order, Orders):
                answer = _fork(order)
            else:
                answer = os.waitstatus_to_exitcode(os.waitpid(order.pid, 0)[1])
            os.write(1, b"%d\n" % answer)


if __name__ == "__main__":
    main()
