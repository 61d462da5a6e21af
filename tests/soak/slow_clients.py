"""Clients that are slow on purpose, against a real `sluice serve` over a fake group, and what others notice.

Slow senders drip a request that they never complete; stalled readers ask for long streams and read nothing;
idle ones ask for nothing. --trials scales all: 1000 are 1,000 senders, 100 readers and 10,000 idle ones.
Each has a fresh server; the others' times without them are taken from it just before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import msgspec
import psutil

from tests.e2e.server import FAKE_SERVE, MODEL, Server, serving
from tests.fake_group.spec import FakeSpec
from tests.soak import _figures

SPEC = FakeSpec(max_num_seqs=256, num_blocks=65_536, max_model_len=20_000, step_seconds=0.01)
MAX_TTFT_RATIO = 2.0  # the median of the others' time to first token: with slow senders, to without
MAX_ITL_RATIO = 1.2  # their median time between tokens: with stalled readers, to without
MAX_IDLE_BYTES = 300 << 20
RECEIVE_SECONDS, SEND_SECONDS = 10.0, 30.0  # the server's defaults
PATIENCE = 120.0
RUNNING = "sluice:num_requests_running"
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
PROBE = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"


@contextmanager
def fake_server(*arguments: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as directory:
        spec = Path(directory) / "spec.json"
        spec.write_bytes(msgspec.json.encode(SPEC))
        with serving("--spec", str(spec), *arguments, program=FAKE_SERVE) as server:
            yield server


class Raw:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def status(self) -> int:
        """Of the answer that comes next; 0 if none does."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            async with asyncio.timeout(PATIENCE):
                return int((await self.reader.readuntil(b"\r\n\r\n")).split(b" ")[1])
        return 0

    async def is_reset(self) -> bool:
        """Whether the server has ended the connection without a proper end."""
        try:
            async with asyncio.timeout(PATIENCE):
                await self.reader.read()
        except ConnectionResetError:
            return True
        return False


async def _connect(port: int, receive_buffer: int) -> Raw:
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return Raw(*await asyncio.open_connection(sock=sock))


@asynccontextmanager
async def connections(server: Server, num: int, receive_buffer: int = 0) -> AsyncIterator[list[Raw]]:
    """So many at once, opened in groups so that the listening queue holds them. `receive_buffer`: bytes that
    the kernel holds for the client; 0: as many as it likes."""
    opened: list[Raw] = []
    try:
        for start in range(0, num, 200):
            group = [_connect(server.port, receive_buffer) for _ in range(min(200, num - start))]
            opened += await asyncio.gather(*group)
        yield opened
    finally:
        for raw in opened:
            raw.writer.transport.abort()


class Others:
    """Well-behaved clients: streams one after another, and when their tokens came."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.first: list[float] = []  # seconds to the first token
        self.between: list[float] = []  # and between two

    async def ask(self, num: int, max_tokens: int) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=PATIENCE, limits=limits) as client:
            for _ in range(num):
                await self._stream(client, max_tokens)

    async def _stream(self, client: httpx.AsyncClient, max_tokens: int) -> None:
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": max_tokens, "stream": True, "temperature": 0}
        last, is_first = time.perf_counter(), True
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.perf_counter()
                (self.first if is_first else self.between).append(now - last)
                last, is_first = now, False


async def others(server: Server, num_clients: int, num_each: int, max_tokens: int) -> Others:
    seen = Others(server)
    await asyncio.gather(*(seen.ask(num_each, max_tokens) for _ in range(num_clients)))
    return seen


async def slow_senders(server: Server, num: int) -> dict[str, object]:
    """Each sends a byte of its body every second; all are refused in time, and the others are served."""
    before = await others(server, 4, 20, 2)
    async with connections(server, num) as senders:
        for raw in senders:
            raw.writer.write(HEAD + b"content-length: 100000\r\n\r\n")
        started = time.perf_counter()

        async def drip() -> None:
            while True:
                await asyncio.sleep(1)
                for raw in senders:
                    if not raw.writer.is_closing():
                        raw.writer.write(b" ")

        dripping = asyncio.create_task(drip())
        answers = [asyncio.create_task(raw.status()) for raw in senders]
        during = await others(server, 4, 20, 2)
        statuses = await asyncio.gather(*answers)
        dripping.cancel()
        seconds = time.perf_counter() - started
    ratio = statistics.median(during.first) / statistics.median(before.first)
    return {
        "slow senders": num,
        "refused with 408": sum(status == 408 for status in statuses),
        "seconds until the last was refused": round(seconds, 1),
        "others' median time to first token, ms": [_ms(before.first), _ms(during.first)],
        "ratio": round(ratio, 2),
        "ratio is good": ratio <= MAX_TTFT_RATIO,
        "failed": sum(status != 408 for status in statuses),
    }


async def stalled_readers(server: Server, num: int, send_seconds: float) -> dict[str, object]:
    """Each asks for a stream that fills every buffer and reads nothing; all are cut off, nothing is left."""
    before = await others(server, 4, 2, 200)
    gateway = psutil.Process(server.process.pid)
    memory = gateway.memory_info().rss
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 10_000, "stream": True, "temperature": 0.0}
    body |= {"ignore_eos": True, "logprobs": 5}  # long events: the buffers are full soon
    content = json.dumps(body).encode()
    async with connections(server, num, receive_buffer=8_192) as readers:
        for raw in readers:
            raw.reader._limit = 1  # type: ignore[attr-defined]  the client's own buffer
            raw.writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(content) + content)
        filling = await others(server, 4, 2, 200)  # they are written to until their buffers are full
        during = await others(server, 4, 2, 200)
        started = time.perf_counter()
        while server.metric(RUNNING) and time.perf_counter() - started < PATIENCE:
            await asyncio.sleep(0.5)
        left = int(server.metric(RUNNING))
        growth = gateway.memory_info().rss - memory
        cut = int(server.metric("sluice:request_success_total", finished_reason="abort"))
        closed = sum(await asyncio.gather(*(raw.is_reset() for raw in readers)))
    ratio = statistics.median(during.between) / statistics.median(before.between)
    return {
        "stalled readers": num,
        "cut off after so many seconds without reading": send_seconds,
        "cut off": cut,
        "connections reset": closed,
        "sequences left running": left,
        "growth of the gateway's memory, MiB": round(growth / (1 << 20), 1),
        "others' median time between tokens, ms": [_ms(before.between), _ms(during.between)],
        "the same while the readers' buffers filled, ms": _ms(filling.between),
        "ratio": round(ratio, 2),
        "ratio is good": ratio <= MAX_ITL_RATIO,
        "failed": left + abs(num - cut) + num - closed,
    }


async def idle_connections(server: Server, num: int) -> dict[str, object]:
    """All have been answered once and are kept open; the gateway goes on answering others."""
    gateway = psutil.Process(server.process.pid)
    before = await others(server, 4, 5, 2)
    memory = gateway.memory_info().rss
    async with connections(server, num) as idle:
        answered = 0
        for start in range(0, num, 200):
            some = idle[start : start + 200]
            for raw in some:
                raw.writer.write(PROBE)
            answered += sum(status == 200 for status in await asyncio.gather(*(raw.status() for raw in some)))
        during = await others(server, 4, 5, 2)
        rss = gateway.memory_info().rss
        num_open = sum(
            connection.status == psutil.CONN_ESTABLISHED for connection in gateway.net_connections()
        )
    return {
        "idle connections": num,
        "answered": answered,
        "open at once": num_open,
        "gateway's resident memory, MiB": round(rss / (1 << 20), 1),
        "of it for the connections, MiB": round((rss - memory) / (1 << 20), 1),
        "others' median time to first token, ms": [_ms(before.first), _ms(during.first)],
        "failed": (num - answered) + (num_open < num) + (rss >= MAX_IDLE_BYTES),
    }


def _ms(seconds: Sequence[float]) -> float:
    return round(1000 * statistics.median(seconds), 2)


def run(trials: int, send_seconds: float = SEND_SECONDS) -> dict[str, object]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # our own end of so many connections
    try:
        with fake_server() as server:
            senders = asyncio.run(slow_senders(server, trials))
        with fake_server("--send-timeout", str(send_seconds)) as server:
            readers = asyncio.run(stalled_readers(server, max(1, trials // 10), send_seconds))
        with fake_server() as server:
            idle = asyncio.run(idle_connections(server, 10 * trials))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    parts = {"senders": senders, "readers": readers, "idle": idle}
    return {**parts, "failed": sum(part["failed"] for part in parts.values())}  # type: ignore[misc]


if __name__ == "__main__":
    _figures.main("slow_clients", __doc__, 1_000, run)
