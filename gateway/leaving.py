"""How a gateway leaves its connections to the one that comes after it on the same listening socket.

A connection closed while a request is on its way over it fails that request, and clients rightly do not
repeat a POST. So a kept-alive connection is not closed but answered once more, with `Connection: close`;
only one that has long been silent is closed from this side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

IDLE_SECONDS = 6.0
"""What follows an answer comes sooner, or over another connection: httpx, so OpenAI's SDK, keeps one 5 s."""
_LOOK_SECONDS = 0.05
_CLOSE = (b"connection", b"close")


def stop_accepting(server: uvicorn.Server) -> None:
    """Connections wait in the listening socket's queue from now on, for whoever else holds it."""
    for listening in server.servers:
        listening.close()


def close_after_answers(server: uvicorn.Server) -> None:
    """Whatever is answered from now on says that it was the last answer on its connection, which then closes.
    An answer that has begun has promised more, so its connection waits for one more request."""
    server.config.encoded_headers.append(_CLOSE)  # takes effect with uvicorn's next tick, within a second
    server.server_state.default_headers = [*server.server_state.default_headers, _CLOSE]
    for connection in _connections(server):
        if connection.cycle is not None and not connection.cycle.response_started:
            connection.cycle.keep_alive = False


async def until_unused(server: uvicorn.Server, idle_seconds: float = IDLE_SECONDS) -> None:
    """Until no connection is left. One on which nothing comes for `idle_seconds` is closed."""
    loop = asyncio.get_running_loop()
    idle_since: dict[HttpToolsProtocol, float] = {}
    while server.server_state.connections:
        now = loop.time()
        for connection in _connections(server):
            if connection.cycle is not None and not connection.cycle.response_complete:
                idle_since.pop(connection, None)
            elif now - idle_since.setdefault(connection, now) > idle_seconds:
                connection.shutdown()
        await asyncio.sleep(_LOOK_SECONDS)


def _connections(server: uvicorn.Server) -> Iterator[HttpToolsProtocol]:
    return (cast(HttpToolsProtocol, connection) for connection in list(server.server_state.connections))
