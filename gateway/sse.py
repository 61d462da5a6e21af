"""Server-sent events: a stream of prepared bytes to one client, until it ends, fails or nobody reads.

Starlette's StreamingResponse neither pings nor gives up on a client that stops reading, and an event
object per token costs half the throughput; so this is a small response of our own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.errors import ClientGone
from gateway.settings import Settings

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}

Value = TypeVar("Value")
Chunks = AsyncGenerator[bytes, None]
DescribeError = Callable[[Exception], bytes]
"""The error object as JSON, for the event that ends a stream that failed."""


def event(data: bytes) -> bytes:
    return b"data: %b\n\n" % data


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
    chunks: Chunks, receive: Receive, settings: Settings, describe_error: DescribeError
) -> EventStream:
    """The response for `chunks`, once it is known what its status is.

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
        return EventStream(first, chunks, settings, describe_error)
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


class EventStream(Response):
    """Sends `first` and then the rest of `chunks`; each chunk is one or more whole events.

    A chunk that raises becomes an error event, and the stream ends without [DONE]: OpenAI's SDK raises on
    the former and takes the lack of the latter for a normal end.
    """

    def __init__(
        self, first: Awaitable[bytes], chunks: Chunks, settings: Settings, describe_error: DescribeError
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._first = first
        self._chunks = chunks
        self._settings = settings
        self._describe_error = describe_error
        self._last_sent = 0.0
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        tasks = [
            asyncio.create_task(self._pump(send)),
            asyncio.create_task(until_gone(receive)),
            asyncio.create_task(self._keep_alive(send)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _cancel(*tasks, asyncio.ensure_future(self._first))
            await self._chunks.aclose()

    async def _pump(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        chunk = await self._next(self._first)
        while chunk is not None:
            self._sending_since = loop.time()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._last_sent, self._sending_since = loop.time(), None
            chunk = await self._next(anext(self._chunks))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self, chunk: Awaitable[bytes]) -> bytes | None:
        """None at the end. A failure is its event, and the chunks, being closed by it, end after that."""
        try:
            return await chunk
        except StopAsyncIteration:
            return None
        except Exception as error:
            return event(self._describe_error(error))

    async def _keep_alive(self, send: Send) -> None:
        """Pings when there is silence; returns, which ends the stream, when the client does not read."""
        loop = asyncio.get_running_loop()
        interval = min(self._settings.ping_interval, self._settings.send_timeout)
        self._last_sent = loop.time()
        while True:
            await asyncio.sleep(interval / 2)
            if self._sending_since is not None:
                if loop.time() - self._sending_since > self._settings.send_timeout:
                    return
            elif loop.time() - self._last_sent >= self._settings.ping_interval / 2:
                self._last_sent = loop.time()
                await send({"type": "http.response.body", "body": PING, "more_body": True})
