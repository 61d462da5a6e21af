"""One client's connection: uvicorn's parser and answers, with the bounds that uvicorn lacks.

A request has `receive_timeout` seconds from its first byte to its last, headers are bounded in number and
size, connections in number (but for probes: a server that is full is not dead), and a client that stops
reading is cut off. What is refused here is refused in the words of its path's API, and the connection is
closed so that they arrive: a socket closed over unread data would send a reset that overtakes them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from typing import Any
from weakref import ref

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.anthropic_errors import error_body
from gateway.auth import PROBES, new_request_id
from gateway.direct import PUSH
from gateway.errors import (
    APIError,
    HeadersTooLarge,
    MalformedRequest,
    ReceiptTimeout,
    TooManyConnections,
    to_api_error,
)
from gateway.settings import Settings

log = logging.getLogger(__name__)

MAX_HEADERS = 128
MAX_HEADER_BYTES = 64 << 10
"""Of the request line and the headers together; one read more may be held before it is noticed."""
MAX_CHUNKS = 100_000
"""Of one body in chunked encoding: each costs time however little is in it."""
_LINGER_SECONDS = 2.0  # for a refused client to read why, and to stop sending
_NOT_SENT_BYTES = 128 << 10  # that the kernel holds for a client that does not read
_PROBE_SECONDS = (30, 5)  # TCP keepalive: of silence, and between two probes that go unanswered

_NO_LINGER = struct.pack("ii", 1, 0)

OnRefusal = Callable[[APIError], None]


class _FlowControl(FlowControl):
    async def drain(self) -> None:
        """When it was the client's leaving that ended the wait, whoever is to be told of that runs first: an
        answer with much in store would be written out to nobody without ever giving way."""
        await super().drain()
        await asyncio.sleep(0)


class AnswerPush:
    """Implements direct.Push: a piece of a body in chunks, as the cycle's `send` would write it."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = ref(cycle)  # whose scope has this

    @property
    def is_open(self) -> bool:
        cycle = self._cycle()
        return (
            cycle is not None
            and cycle.response_started
            and not cycle.response_complete
            and not cycle.disconnected
            and not cycle.flow.write_paused
            and cycle.chunked_encoding is True
            and not cycle.transport.is_closing()
        )

    def write(self, data: bytes) -> None:
        cycle = self._cycle()
        assert cycle is not None, "it is open"
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class ClientConnection(HttpToolsProtocol):
    """Made by uvicorn for each client, with `settings` and `on_refusal`, which is told of each refusal."""

    def __init__(self, *, settings: Settings, on_refusal: OnRefusal, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._settings = settings
        self._on_refusal = on_refusal
        self.url = b""  # until a request begins
        self._answering: RequestResponseCycle | None = None  # `cycle` is the newest, this the one in turn
        self._is_receiving = False  # a request has begun and is not whole
        self._is_in_headers = False
        self._num_header_bytes = 0  # in reads that held nothing but headers of this request
        self._num_chunks = 0
        self._is_over = False  # what still comes is read and dropped
        self._is_excess = False  # one more than may be: it is there for a probe, and for nothing else
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    # The connection's life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _FlowControl(transport)
        _notice_dead_peers(transport, self._settings.send_timeout)
        limit = self._settings.max_connections
        if len(self.connections) > limit + limit // 8 + 1:  # so many that even refusals are too many
            transport.abort()
        elif len(self.connections) > limit:
            self._is_excess = True
            self._deadline = self.loop.call_later(_LINGER_SECONDS, self._refuse_excess)
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True
        self._unset_keepalive_if_required()
        self._stop_deadline()
        self._stop_stall_watch()
        super().connection_lost(exc)
        if self._answering is not None:
            _tell_disconnected(self._answering)

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        self._unset_keepalive_if_required()
        was_in_headers = self._is_in_headers
        self._is_receiving = True  # empty lines before a request are its beginning, too
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # answered as if it were not asked for; what follows is not HTTP
            self._is_over = True
            self.cycle.keep_alive = False
        except httptools.HttpParserError as error:
            ours = error.__context__
            if not isinstance(ours, HeadersTooLarge | MalformedRequest | TooManyConnections):
                ours = MalformedRequest("The request is not valid HTTP/1.1.")
            self._refuse(ours)
            return
        if was_in_headers and self._is_in_headers:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > MAX_HEADER_BYTES:
                self._refuse(_headers_too_large())
                return
        if not self._is_receiving:
            self._stop_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self._settings.receive_timeout, self._on_late)

    # What the parser finds. What is raised here comes out of feed_data as the context of its error.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_receiving = self._is_in_headers = True
        self._num_header_bytes = self._num_chunks = 0
        self._stop_deadline()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_headers:  # a trailer: nobody asked for one, and it must not pass for a header
            self.on_chunk_header()
            return
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            raise _headers_too_large()

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEADER_BYTES:
            raise _headers_too_large()
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if num_hosts > 1 or (num_hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise MalformedRequest("A request must have exactly one Host header.")
        if self._is_excess and self._path not in PROBES:
            raise self._too_many()
        super().on_headers_complete()
        if self._is_excess:
            self.cycle.keep_alive = False

    def on_chunk_header(self) -> None:
        self._num_chunks += 1
        if self._num_chunks > MAX_CHUNKS:
            raise MalformedRequest(f"A body may come in at most {MAX_CHUNKS} chunks.")

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_receiving = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        cycle.scope["extensions"] = {PUSH: AnswerPush(cycle)}  # type: ignore[dict-item]
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_receiving and self.expect_100_continue and self._answering is self.cycle:
            self._close_gently()  # nobody knows whether the body will follow

    # Clients that are too many, send too slowly, or not what they should

    @property
    def _path(self) -> bytes:
        """Of the newest request, as much as has come."""
        return self.url.partition(b"?")[0]

    def _too_many(self) -> TooManyConnections:
        return TooManyConnections(f"The server holds at most {self._settings.max_connections} connections.")

    def _refuse_excess(self) -> None:
        self._deadline = None
        self._refuse(self._too_many())

    def _on_late(self) -> None:
        self._deadline = None
        if self._is_answering() and not self._is_about_newest():  # reading is paused meanwhile, by us
            self._deadline = self.loop.call_later(self._settings.receive_timeout, self._on_late)
        else:
            seconds = self._settings.receive_timeout
            self._refuse(ReceiptTimeout(f"The request was not complete within {seconds:g} seconds."))

    def _refuse(self, error: Exception) -> None:
        """Answer with an error and read nothing more; without words if another answer has begun."""
        answering = self._answering
        if self._is_answering() and answering is not None:
            is_unsaid = self._is_about_newest() and not answering.response_started
            _tell_disconnected(answering)
        else:
            is_unsaid = self._is_in_headers or self.cycle is None or not self._is_receiving
        if not is_unsaid:
            self._is_over = True
            self._cut_off()
            return
        api_error = to_api_error(error)
        self._on_refusal(api_error)
        self.transport.write(_response(api_error, self._path.decode("latin-1")))
        self._close_gently()

    def _is_answering(self) -> bool:
        return self._answering is not None and not self._answering.response_complete

    def _is_about_newest(self) -> bool:
        """The request being answered is the one being received."""
        return not self._is_in_headers and self._answering is self.cycle

    def _close_gently(self) -> None:
        """Send what is written and say that it was all; then drop what comes until the client closes, too."""
        self._is_over = True
        self._unset_keepalive_if_required()
        self._stop_deadline()
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.flow.resume_reading()
        self._deadline = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # Clients that do not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall_watch()

    def _watch_reader(self, num_unsent: int) -> None:
        self._stall = self.loop.call_later(self._settings.send_timeout, self._on_stall, num_unsent)

    def _on_stall(self, num_unsent: int) -> None:
        num_left = self.transport.get_write_buffer_size()
        if num_left < num_unsent:
            self._watch_reader(num_left)
            return
        log.info("a client has read nothing for %g s: it is cut off", self._settings.send_timeout)
        self._cut_off()

    def _cut_off(self) -> None:
        """Close with a reset: the kernel keeps nothing of what the client has not read."""
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()

    def _stop_stall_watch(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


def _headers_too_large() -> HeadersTooLarge:
    return HeadersTooLarge(
        f"A request may have at most {MAX_HEADERS} headers, and {MAX_HEADER_BYTES} bytes of them and its URL."
    )


def _tell_disconnected(cycle: RequestResponseCycle) -> None:
    """The application is told, whatever it waits for."""
    if not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()


def _response(error: APIError, path: str) -> bytes:
    request_id = new_request_id()
    body = error_body(error, path, request_id)
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers["x-request-id"] = request_id
    lines = [f"{name}: {value}\r\n" for name, value in (headers | error.headers).items()]
    head = "".join([*lines, "connection: close\r\n\r\n"])
    return STATUS_LINE[error.status] + head.encode("latin-1") + body


def _notice_dead_peers(transport: asyncio.Transport, seconds: float) -> None:
    """A peer that is gone without a word, or that does not take what was sent to it, for so many seconds ends
    the connection, even one that is already closed on our side."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    silence, interval = _PROBE_SECONDS
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, silence)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(1000 * seconds)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _NOT_SENT_BYTES)
