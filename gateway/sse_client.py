"""One streamed request, timed: what `sluice bench` sends many of.

Bytes go through httptools' parser and msgspec, on a connection of the request's own, so that one
process reads more events per second than a server sends.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import Literal, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from gateway.api_client import refusal, unreachable

Endpoint = Literal["completions", "chat"]


class BenchError(ValueError):
    """The benchmark cannot run as asked. The message says why."""


@dataclass(slots=True)
class RequestTrace:
    """One request as the client saw it. Times are perf_counter seconds."""

    started: float = 0.0
    ended: float = 0.0
    event_times: list[float] = field(default_factory=list)  # of events that carried text
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta
        return bool(self.text or (delta is not None and (delta.content or delta.reasoning_content)))


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _ErrorObject(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


def _message(error: msgspec.Raw) -> str:
    """OpenAI's message, or what stands in its place."""
    try:
        return msgspec.json.decode(error, type=_ErrorObject).message
    except msgspec.DecodeError:
        return bytes(error)[:300].decode(errors="replace")


_decode_event = msgspec.json.Decoder(_Event).decode


class SSEClient(asyncio.Protocol):
    """Sends one request and times the events of its answer into `trace`. `done` is set at the end."""

    def __init__(self, request: bytes, trace: RequestTrace, timeout: float) -> None:
        self._request = request
        self._trace = trace
        self._timeout = timeout
        self._parser = httptools.HttpResponseParser(self)
        self._pending = b""
        self._status = 0
        self._saw_end = False
        self._last_byte = 0.0
        self._transport: asyncio.Transport | None = None
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = loop.create_future()
        self._watch = loop.call_later(timeout, self._check_timeout)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._last_byte = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._last_byte = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.finish(f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.finish(self._what_was_wrong())

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._pending += body
        if self._status != 200:
            return
        *events, self._pending = self._pending.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            self._on_event(event)

    def on_message_complete(self) -> None:
        self.finish(self._what_was_wrong())

    def _what_was_wrong(self) -> str | None:
        if self._status == 0:
            return "the connection was closed without an answer"
        if self._status != 200:
            return refusal(self._status, self._pending.decode(errors="replace"))
        # Some servers send no [DONE]; one that has not even finished the choice has failed.
        return None if self._saw_end else "the stream ended without [DONE] or a finish_reason"

    def _on_event(self, event: bytes) -> None:
        if not event.startswith(b"data:"):
            return  # a comment, such as a ping
        payload = event[5:].strip()
        if payload == b"[DONE]":
            self._saw_end = True
            return
        try:
            parsed = _decode_event(payload)
        except msgspec.DecodeError as error:
            self.finish(f"an event that is not a chunk: {error}")
            return
        if bytes(parsed.error) not in (b"", b"null"):
            self.finish(f"the stream ended with an error: {_message(parsed.error)}")
        if parsed.usage is not None:
            self._trace.num_prompt_tokens = parsed.usage.prompt_tokens
            self._trace.num_output_tokens = parsed.usage.completion_tokens
        choices = parsed.choices or []
        self._saw_end |= any(choice.finish_reason for choice in choices)
        if any(choice.has_text for choice in choices):
            self._trace.event_times.append(self._last_byte)

    def _check_timeout(self) -> None:
        silent = time.perf_counter() - self._last_byte
        if silent >= self._timeout:
            self.finish(f"nothing came for {self._timeout:g} s")
        else:
            self._watch = asyncio.get_running_loop().call_later(self._timeout - silent, self._check_timeout)

    def finish(self, error: str | None) -> None:
        """The request is over; only the first call counts."""
        if self.done.done():
            return
        self._watch.cancel()
        self._trace.ended = time.perf_counter()
        self._trace.error = error
        if not self._trace.num_output_tokens:  # a server that sends no usage: one event, one token
            self._trace.num_output_tokens = len(self._trace.event_times)
        self.done.set_result(None)
        if self._transport is not None:
            self._transport.close()


@dataclass(frozen=True, slots=True)
class Target:
    host: str
    port: int
    path: str
    tls: bool

    @classmethod
    def parse(cls, url: str, endpoint: Endpoint) -> Target:
        """Raises BenchError for what is not an http or https address."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BenchError(f"--url {url} is not an http:// or https:// address")
        tls = parts.scheme == "https"
        base = parts.path.rstrip("/").removesuffix("/v1")
        path = f"{base}/v1/{'chat/completions' if endpoint == 'chat' else 'completions'}"
        return cls(parts.hostname, parts.port or (443 if tls else 80), path, tls)


async def run_request(request: bytes, target: Target, timeout: float) -> RequestTrace:
    """Send it, read to the end. Failures are in the trace, not raised."""
    trace = RequestTrace(started=time.perf_counter())
    client = SSEClient(request, trace, timeout)
    context = ssl.create_default_context() if target.tls else None
    try:
        await asyncio.get_running_loop().create_connection(
            lambda: client, target.host, target.port, ssl=context
        )
    except OSError as error:
        client.finish(unreachable(f"{target.host}:{target.port}", error))
    await client.done
    return trace
