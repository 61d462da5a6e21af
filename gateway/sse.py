"""Server-sent events: a stream of prepared bytes to one client, until it ends, fails or the client leaves.

sse-starlette pings; it gets whole events as bytes: an event object per token costs half the throughput.
A client that stops reading is http_connection's to cut off, whatever it was sent: here it has left then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

from gateway.direct import PUSH, Direct, Shape
from gateway.errors import ClientGone
from gateway.settings import Settings

COMMENT = ServerSentEvent(comment="ping", sep="\n")
DONE = b"data: [DONE]\n\n"
HEADERS = {
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}

Value = TypeVar("Value")
Chunks = AsyncGenerator[bytes, None]
DescribeError = Callable[[Exception], bytes]
"""The events that end a stream that failed."""


def event(data: bytes, name: str | None = None) -> bytes:
    """`name`: for protocols whose events have one."""
    if name is None:
        return b"data: %b\n\n" % data
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def direct_to(scope: Scope, shape: Shape) -> Direct | None:
    """The short way to the client of this request, where its connection has one (http_connection.py)."""
    push = scope.get("extensions", {}).get(PUSH)
    return None if push is None else Direct(push, shape)


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Value]) -> Value:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientGone then."""
    task = asyncio.create_task(work)
    try:
        await _first_of(receive, task, None)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _cancel(task)


async def open_stream(
    chunks: Chunks,
    receive: Receive,
    settings: Settings,
    describe_error: DescribeError,
    ping: ServerSentEvent = COMMENT,
) -> EventStream:
    """The response for `chunks`, once it is known what its status is. `ping` is sent in silence.

    Waits for the first chunk, so that a request which fails before it is answered with a proper status,
    but for `first_delta_wait` at most: then the headers go out, so that proxies and clients don't give
    up on a request that queues, and a later failure is an event in the stream. Raises what `chunks`
    raises, and ClientGone.
    """
    first = asyncio.ensure_future(anext(chunks))
    try:
        await _first_of(receive, first, settings.first_delta_wait)
        if first.done():
            first.result()
        return EventStream(first, chunks, settings, describe_error, ping)
    except BaseException:
        await _cancel(first)
        await chunks.aclose()
        raise


async def _first_of(receive: Receive, task: asyncio.Future[Value], timeout: float | None) -> None:
    """Returns when the task is done or the time is up. Raises ClientGone when the client was faster."""
    gone = asyncio.create_task(until_gone(receive))
    try:
        await asyncio.wait((task, gone), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not task.done():
            raise ClientGone
    finally:
        await _cancel(gone)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancels and waits until nothing of them runs any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(EventSourceResponse):
    """Sends `first` and then the rest of `chunks`; each chunk is one or more whole events.

    A chunk that raises becomes an error event, and the stream ends without [DONE]: OpenAI's SDK raises on
    the former and takes the lack of the latter for a normal end. A client that leaves ends the chunks.
    """

    def __init__(
        self,
        first: asyncio.Future[bytes],
        chunks: Chunks,
        settings: Settings,
        describe_error: DescribeError,
        ping: ServerSentEvent,
    ) -> None:
        super().__init__(
            self._events(first, chunks, describe_error),
            headers=HEADERS,
            ping=settings.ping_interval,
            ping_message_factory=lambda: ping,
            sep="\n",
        )
        self._first, self._chunks = first, chunks

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """Without sse-starlette's limit of time, a quarter of what an event costs: the connection has one."""
        await send(message)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await _cancel(self._first)
            await self._chunks.aclose()

    @staticmethod
    async def _events(
        first: asyncio.Future[bytes], chunks: Chunks, describe_error: DescribeError
    ) -> AsyncGenerator[bytes, None]:
        """The chunks, and the event of what went wrong. sse-starlette sends bytes as they are."""
        try:
            yield await first
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            yield describe_error(error)
