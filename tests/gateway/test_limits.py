"""The bounds on connections, requests and bodies, over real sockets against the real server."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.http_connection import MAX_CHUNKS, MAX_HEADER_BYTES, MAX_HEADERS
from gateway.http_server import Server, make_server
from gateway.settings import Settings
from tests.gateway.serving import make_app, make_group

pytestmark = pytest.mark.anyio
PATIENCE = 60.0  # longer than anything here takes on a busy machine
BODY = b'{"model": "demo", "prompt": "hi", "max_tokens": 1}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
REQUEST = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
PROBE = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"


class Raw:
    """A client that says exactly what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of the next response."""
        async with asyncio.timeout(PATIENCE):
            head = await self._reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").strip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            body = await self._reader.readexactly(int(headers["content-length"]))
            return int(first.split(" ")[1]), headers, json.loads(body)

    async def until_closed(self) -> bytes:
        """What still came before the server closed."""
        async with asyncio.timeout(PATIENCE):
            return await self._reader.read()

    async def refusal(self) -> tuple[int, str]:
        """Status and code of an error in OpenAI's shape, after which the server closes the connection."""
        status, headers, body = await self.answer()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert headers["connection"] == "close"
        assert await self.until_closed() == b""
        return status, body["error"]["code"]


class Gate:
    """A running server, and clients of it."""

    def __init__(self, address: tuple[str, int], server: Server) -> None:
        self.address, self.server = address, server
        self._clients: list[Raw] = []

    async def connect(self) -> Raw:
        client = Raw(*await asyncio.open_connection(*self.address))
        self._clients.append(client)
        return client

    async def ask(self, *parts: bytes) -> Raw:
        client = await self.connect()
        await client.send(*parts)
        return client

    async def errors(self) -> str:
        """The lines of /metrics that count errors."""
        client = await self.ask(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        text = (await client.until_closed()).decode()
        return "\n".join(line for line in text.splitlines() if "error" in line and not line.startswith("#"))

    async def close(self) -> None:
        for client in self._clients:
            client.writer.transport.abort()


@asynccontextmanager
async def gate(model_dir: Path, group: Any = None, **settings: Any) -> AsyncIterator[Gate]:
    app = make_app(model_dir, group or make_group(model_dir), settings=Settings(**settings))
    server = make_server(app, flush_seconds=5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        serving = asyncio.create_task(server.serve([listener]))
        running = Gate(address, server)
        try:
            yield running
        finally:
            await running.close()
            server.should_exit = server.force_exit = True
            await asyncio.wait_for(serving, PATIENCE)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


# Requests that are no HTTP, or two things at once


@pytest.mark.parametrize(
    "raw",
    [
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        HEAD + b"content-length: 5\r\ncontent-length: 5\r\n\r\nhello",
        HEAD + b"content-length: -5\r\n\r\nhello",
        HEAD + b"content-length: 99999999999999999999999\r\n\r\nhello",
        HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhello!!\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\n0\n\n",
        HEAD + b"x: a\x00b\r\n\r\n",
        HEAD + b"host: y\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\nhost: x\n\n",
        b"GET /livez HTTP/9.9\r\nhost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
        b"hello\r\n\r\n",
    ],
)
async def test_what_is_not_one_clear_request_is_refused_and_the_connection_closed(
    model_dir: Path, raw: bytes
) -> None:
    group = make_group(model_dir)
    async with gate(model_dir, group) as server:
        client = await server.ask(raw + REQUEST)
        assert await client.refusal() == (400, "malformed_request")
        assert 'code="malformed_request"' in await server.errors()
    assert group.requests == []


async def test_trailers_are_no_headers(model_dir: Path) -> None:
    async with gate(model_dir) as server:
        chunked = HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
        client = await server.ask(chunked + b"x-request-id: from-a-trailer\r\n\r\n")
        status, headers, _ = await client.answer()
    assert status == 200
    assert headers["x-request-id"].startswith("req_")


async def test_requests_in_one_packet_are_answered_in_turn(model_dir: Path) -> None:
    async with gate(model_dir) as server:
        client = await server.ask(REQUEST + PROBE + REQUEST)
        assert [(await client.answer())[0] for _ in range(3)] == [200, 200, 200]


async def test_a_client_that_sends_requests_ahead_and_leaves_is_noticed(model_dir: Path) -> None:
    group = make_group(model_dir, waits_after=0)
    async with gate(model_dir, group) as server:
        client = await server.ask(REQUEST + PROBE)
        await until(lambda: group.num_outstanding == 1)
        client.writer.transport.abort()
        await until(lambda: group.num_outstanding == 0)
    assert len(group.closed_early) == 1


# Sizes


@pytest.mark.parametrize(
    "headers",
    [
        b"".join(b"x-%d: y\r\n" % number for number in range(MAX_HEADERS)),
        b"x: " + b"y" * MAX_HEADER_BYTES + b"\r\n",
        b"".join(b"x-%d: %b\r\n" % (number, b"y" * 1024) for number in range(64)),
    ],
)
@pytest.mark.parametrize("is_whole", [True, False])
async def test_headers_are_limited_in_number_and_size(
    model_dir: Path, headers: bytes, is_whole: bool
) -> None:
    async with gate(model_dir) as server:
        end = b"\r\n\r\n" if is_whole else b"y" * 400_000
        client = await server.ask(b"POST / HTTP/1.1\r\nhost: x\r\n" + headers + b"x-last: ", end)
        status, code = await client.refusal()
    assert (status, code) == (431, "headers_too_large")


async def test_a_long_url_is_too_large_a_header(model_dir: Path) -> None:
    async with gate(model_dir) as server:
        client = await server.ask(b"GET /", b"x" * 600_000)
        assert await client.refusal() == (431, "headers_too_large")


async def test_headers_up_to_the_limits_pass(model_dir: Path) -> None:
    many = b"".join(b"x-%d: y\r\n" % number for number in range(MAX_HEADERS - 2))
    long = b"x: " + b"y" * (MAX_HEADER_BYTES - 200) + b"\r\n"
    async with gate(model_dir) as server:
        for headers in (many, long):
            client = await server.ask(PROBE[:-2] + headers + b"\r\n")
            assert (await client.answer())[0] == 200


async def test_a_body_declared_too_long_is_refused_before_it_comes(model_dir: Path) -> None:
    async with gate(model_dir, max_body_bytes=1_000) as server:
        for _ in range(100):
            client = await server.ask(HEAD + b"content-length: %d\r\n\r\n" % (1 << 30))
            status, _, body = await client.answer()
            assert (status, body["error"]["code"]) == (413, "request_too_large")


async def test_the_refusal_of_a_body_reaches_a_client_that_goes_on_sending(model_dir: Path) -> None:
    async with gate(model_dir, max_body_bytes=1_000, receive_timeout=1.0) as server:
        client = await server.ask(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        answering = asyncio.create_task(client.answer())
        while not answering.done():
            await client.send(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
        status, _, body = await answering
        assert (status, body["error"]["code"]) == (413, "request_too_large")
        with pytest.raises(ConnectionError):  # noqa: PT012
            async with asyncio.timeout(PATIENCE):
                while True:
                    await client.send(b"10000\r\n" + b"x" * 65_536 + b"\r\n")


async def test_a_connection_goes_on_after_a_refused_body_was_read_to_its_end(model_dir: Path) -> None:
    async with gate(model_dir, max_body_bytes=1_000) as server:
        client = await server.ask(HEAD + b"content-length: 100000\r\n\r\n", b"x" * 100_000, REQUEST)
        assert (await client.answer())[0] == 413
        assert (await client.answer())[0] == 200


async def test_a_refusal_instead_of_continue_ends_the_connection(model_dir: Path) -> None:
    async with gate(model_dir, max_body_bytes=1_000) as server:
        client = await server.ask(HEAD + b"expect: 100-continue\r\ncontent-length: 100000\r\n\r\n")
        assert (await client.answer())[0] == 413
        assert await client.until_closed() == b""
        client = await server.ask(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(BODY))
        assert await client._reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(BODY)
        assert (await client.answer())[0] == 200


async def test_a_body_in_too_many_chunks_is_refused(model_dir: Path) -> None:
    async with gate(model_dir) as server:
        client = await server.ask(
            HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * (MAX_CHUNKS + 1)
        )
        assert await client.refusal() == (400, "malformed_request")


# Time


@pytest.mark.parametrize(
    "begun",
    [b"P", b"\r\n", HEAD, HEAD + b"content-length: 50\r\n\r\n" + b'{"model"', REQUEST[:-1]],
)
async def test_a_request_must_be_complete_in_time_however_steadily_it_comes(
    model_dir: Path, begun: bytes
) -> None:
    group = make_group(model_dir)
    async with gate(model_dir, group, receive_timeout=0.5) as server:
        client = await server.ask(begun)

        async def trickle() -> None:
            while True:
                client.writer.write(b"\r\n" if begun == b"\r\n" else b"")
                await asyncio.sleep(0.1)

        trickling = asyncio.create_task(trickle())
        assert await client.refusal() == (408, "request_timeout")
        trickling.cancel()
        assert 'code="request_timeout"' in await server.errors()
        assert "internal_error" not in await server.errors()
    assert group.requests == []


@pytest.mark.parametrize(
    ("begun", "status"), [(b"", 408), (b"x: " + b"y" * MAX_HEADER_BYTES + b"\r\n\r\n", 431)]
)
async def test_anthropics_paths_are_refused_in_anthropics_words(
    model_dir: Path, begun: bytes, status: int
) -> None:
    async with gate(model_dir, receive_timeout=0.5) as server:
        client = await server.ask(b"POST /v1/messages?beta=true HTTP/1.1\r\nhost: x\r\n" + begun)
        got, headers, body = await client.answer()
    assert got == status
    assert set(body) == {"type", "error", "request_id"}
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert headers["x-request-id"] == body["request_id"]


async def test_bytes_one_by_one_do_not_extend_the_time(model_dir: Path) -> None:
    async with gate(model_dir, receive_timeout=1.0) as server:
        client = await server.ask(HEAD + b"content-length: 100000\r\n\r\n")
        loop = asyncio.get_running_loop()
        started = loop.time()

        async def trickle() -> None:
            for _ in range(100_000):
                client.writer.write(b" ")
                await asyncio.sleep(0.05)

        trickling = asyncio.create_task(trickle())
        assert await client.refusal() == (408, "request_timeout")
        trickling.cancel()
    assert loop.time() - started >= 1.0


async def test_the_answer_may_take_longer_than_the_request(model_dir: Path) -> None:
    group = make_group(model_dir, waits_after=0)
    async with gate(model_dir, group, receive_timeout=0.2) as server:
        client = await server.ask(REQUEST, PROBE[:5])  # half of the next request waits behind it
        await until(lambda: group.num_outstanding == 1)
        await asyncio.sleep(0.6)
        group.go_on.set()
        assert (await client.answer())[0] == 200
        await client.send(PROBE[5:])
        assert (await client.answer())[0] in (200, 408)


async def test_idle_connections_are_closed(model_dir: Path) -> None:
    async with gate(model_dir, idle_timeout=0.3) as server:
        fresh = await server.connect()
        assert await fresh.until_closed() == b""
        used = await server.ask(PROBE)
        assert (await used.answer())[0] == 200
        assert await used.until_closed() == b""


# Number


async def fill(server: Gate, num: int) -> list[Raw]:
    """Connections that have been answered once, and are kept open."""
    held = [await server.ask(PROBE) for _ in range(num)]
    assert [(await client.answer())[0] for client in held] == [200] * num
    return held


async def test_connections_are_limited_and_the_excess_is_told_when_to_come_back(model_dir: Path) -> None:
    async with gate(model_dir, max_connections=3) as server:
        held = await fill(server, 3)
        excess = await server.ask(REQUEST)
        status, headers, body = await excess.answer()
        assert (status, body["error"]["code"]) == (503, "too_many_connections")
        assert int(headers["retry-after"]) >= 1
        assert await excess.until_closed() == b""
        await held[0].send(PROBE)
        assert (await held[0].answer())[0] == 200
        held[1].writer.close()
        await until(lambda: len(server.server.server_state.connections) < 3)
        assert (await (await server.ask(REQUEST)).answer())[0] == 200


async def test_a_server_that_is_full_is_not_taken_for_dead(model_dir: Path) -> None:
    async with gate(model_dir, max_connections=8) as server:
        held = await fill(server, 8)
        probe = await server.ask(PROBE)
        status, headers, _ = await probe.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert await probe.until_closed() == b""
        probe.writer.close()
        silent = await server.connect()
        assert (await silent.answer())[0] == 503, "its place is for probes"
        assert len(held) == 8


async def test_of_a_flood_of_connections_those_that_were_there_notice_nothing(model_dir: Path) -> None:
    async with gate(model_dir, max_connections=8) as server:
        first = await server.ask(PROBE)
        await first.answer()
        flood = [await server.connect() for _ in range(100)]
        await until(lambda: len(server.server.server_state.connections) <= 10)
        await first.send(REQUEST)
        assert (await first.answer())[0] == 200
        assert len(flood) == 100


# Peers that are gone


async def test_the_kernel_is_told_to_notice_peers_that_are_gone(model_dir: Path) -> None:
    async with gate(model_dir, send_timeout=7.0) as server:
        client = await server.ask(PROBE)
        await client.answer()
        [connection] = server.server.server_state.connections
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7_000
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 128 << 10
