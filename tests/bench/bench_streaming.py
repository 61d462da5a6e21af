"""What streaming costs: tokens a second that one gateway process streams, beside a bare StreamingResponse.

    python -m tests.bench.bench_streaming [--streams 1,32,256] [--rounds N] [--seconds S] [--json FILE]

The gateway is whole: HTTP, chat template, detokeniser, a chat chunk for each token, and a group on its
socket. That one is fake, computes nothing, and sends a step whenever its clients have all but 64 tokens a
stream. The floor writes bytes that were built before, as long as such a chunk, under uvicorn too. A server
has a core, clients and fake group the other. Whole events within a round's seconds count; sides take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import psutil
import uvicorn
import uvloop
from tokenizers import Tokenizer

from engines import wire
from engines.config import ModelConfig
from engines.garbage import settle
from gateway import bench
from gateway.listener import listen
from gateway.model_source import demo_directory
from gateway.workers import connection as connections
from gateway.workers.connection import Connection
from gateway.workers.group import Group
from tests import fakes

SERVER_CORE, CLIENT_CORE = 0, 1
QUESTION = "Which of the ways to split a model over several processes is the best one for me? " * 8
NUM_TOKENS = 3000  # of an answer; then the stream asks again
NUM_AHEAD = 64  # tokens a stream: as many as are kept apart for a reader that lags
WARM_SECONDS = 1.0
START_SECONDS = 60.0


# -- the servers, each a process of its own --------------------------------------------------------


def _example() -> bytes:
    """A chunk as the gateway writes one."""
    choice = {"index": 0, "delta": {"content": " process"}, "logprobs": None, "finish_reason": None}
    chunk = {
        "id": "chatcmpl-1f781408f34e0d4fefa30ae809d19d05",
        "object": "chat.completion.chunk",
        "created": 1_795_295_675,
        "model": "sluice-demo",
        "choices": [choice],
        "system_fingerprint": "native-tp1-pp1-bfloat16-3882f9fc6992",
    }
    return b"data: %b\n\n" % json.dumps(chunk, separators=(",", ":")).encode()


async def serve_floor() -> None:
    from fastapi import FastAPI
    from starlette.responses import StreamingResponse

    app, event = FastAPI(), _example()

    async def events() -> AsyncIterator[bytes]:
        for _ in range(NUM_TOKENS):
            yield event
        yield b"data: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    async def answer() -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    await _serve(uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)))


async def serve_gateway() -> None:
    from gateway.app import create_app
    from gateway.http_server import make_server
    from gateway.router import load_served_model
    from gateway.settings import Settings

    group = Group("demo/0", ModelConfig(model_name="demo", served_model_names=("demo",), model_path="/none"))
    connection = Connection(group.report, group.die)
    group.start(connection)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "gateway.sock")
        listener = connections.listen(path)
        print(path, flush=True)
        await connections.accept(listener, path, connection)
    while group.info is None:
        await asyncio.sleep(0.01)
    served = load_served_model(demo_directory(), name="demo", groups=[group], created=0)
    server = make_server(create_app(Settings(), [served]), flush_seconds=1)
    settle()
    await _serve(server)


async def _serve(server: uvicorn.Server) -> None:
    """On a free port, which is printed, until standard input ends."""
    listener = listen("127.0.0.1", 0)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    print(listener.getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.should_exit = True
    await serving


class FakeRank(asyncio.Protocol):
    """Rank 0 of a group that always has the next tokens."""

    def __init__(self, says: list[int], vocab_size: int) -> None:
        self._says, self._vocab_size = says, vocab_size
        self._frames = wire.FrameBuffer()
        self._left: dict[str, int] = {}  # tokens that each sequence is still to get
        self._num_ahead = 0  # sent, and not with the clients yet
        self._num_awaited = 0  # sequences without which nothing is sent yet

    def await_sequences(self, count: int) -> None:
        """The next round begins when so many are there: not to be a measure of how prompts get through."""
        self._num_awaited = count

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send(fakes.ready(self._vocab_size, max_model_len=2 * NUM_TOKENS, max_num_seqs=256))

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            message = wire.to_worker_decoder.decode(body)
            if isinstance(message, wire.Generate):
                self._left[message.id] = message.max_tokens
            else:
                self._left.pop(message.id, None)
                self._num_ahead = 0  # those of who left are with nobody
        self.on_received(0)

    def on_received(self, num_events: int) -> None:
        """The clients have so many more."""
        self._num_ahead = max(0, self._num_ahead - num_events)
        if len(self._left) < self._num_awaited:
            return
        self._num_awaited = 0
        while self._left and self._num_ahead < NUM_AHEAD * len(self._left):
            self._num_ahead += len(self._left)
            self._send(wire.Tokens([self._next(id) for id in list(self._left)]))

    def _next(self, id: str) -> wire.TokenDelta:
        self._left[id] -= 1
        token = self._says[self._left[id] % len(self._says)]
        if self._left[id]:
            return wire.TokenDelta(id=id, token_ids=[token])
        del self._left[id]
        return wire.TokenDelta(id=id, token_ids=[token], finish_reason="length")

    def _send(self, message: wire.FromWorker) -> None:
        self._transport.write(wire.encode(message))


class Server:
    """One of the two, in a process of its own."""

    def __init__(self, kind: str) -> None:
        command = [sys.executable, "-m", "tests.bench.bench_streaming", "--serve", kind]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._times = psutil.Process(self._process.pid).cpu_times
        self.port = 0

    async def said(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        return (await asyncio.to_thread(self._process.stdout.readline)).strip()

    @property
    def busy(self) -> float:
        """Seconds of processor time."""
        times = self._times()
        return float(times.user + times.system)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


# -- the client ------------------------------------------------------------------------------------


class Stream(asyncio.Protocol):
    """Asks again whenever an answer has ended, and counts events."""

    def __init__(self, on_received: Callable[[int], None]) -> None:
        messages = [{"role": "user", "content": QUESTION}]
        asked = {"model": "demo", "messages": messages, "stream": True, "max_tokens": NUM_TOKENS}
        body = json.dumps(asked).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        self._request = f"{head}Content-Type: application/json\r\n\r\n".encode() + body
        self._on_received, self._tail = on_received, b""
        self.num_events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        data = self._tail + data
        whole = data.rfind(b"\n\n") + 2
        if whole == 1:
            self._tail = data
            return
        self._tail = data[whole:]
        num_events = data.count(b"data: {", 0, whole)
        self.num_events += num_events
        if data.find(b"data: [DONE]", 0, whole) >= 0:
            self._transport.write(self._request)
        self._on_received(num_events)


async def rate(
    server: Server, on_received: Callable[[int], None], num_streams: int, seconds: float
) -> tuple[float, float]:
    """Events a second of all streams together, and the server's processor time for one, in microseconds."""
    connect = asyncio.get_running_loop().create_connection
    made = [await connect(lambda: Stream(on_received), "127.0.0.1", server.port) for _ in range(num_streams)]
    async with asyncio.timeout(START_SECONDS):  # the rank waits for all; the floor answers in turn
        while not any(stream.num_events for _, stream in made):
            await asyncio.sleep(0.02)
    await asyncio.sleep(WARM_SECONDS)
    before, started, busy = sum(stream.num_events for _, stream in made), time.monotonic(), server.busy
    await asyncio.sleep(seconds)
    counted, elapsed = sum(stream.num_events for _, stream in made) - before, time.monotonic() - started
    busy = server.busy - busy
    for transport, _ in made:
        transport.abort()
    await asyncio.sleep(0.5)  # the sequences of those who left end
    return counted / elapsed, 1e6 * busy / counted


def summary(num_streams: int, rounds: list[list[tuple[float, float]]]) -> dict[str, object]:
    """Medians; the ratio of the rates is the median of the rounds' ratios."""
    ratios = sorted(round(ours / bare, 3) for (bare, _), (ours, _) in rounds)
    sides = {"floor": 0, "gateway": 1}
    return {
        "streams": num_streams,
        **{
            f"{name} events/s": round(statistics.median(r[at][0] for r in rounds))
            for name, at in sides.items()
        },
        **{
            f"{name} CPU us/event": round(statistics.median(r[at][1] for r in rounds), 1)
            for name, at in sides.items()
        },
        "ratio": round(statistics.median(ratios), 3),
        "ratios": ratios,
    }


async def measure(all_streams: list[int], num_rounds: int, seconds: float) -> list[dict[str, object]]:
    tokenizer = Tokenizer.from_file(str(demo_directory() / "tokenizer.json"))
    says = tokenizer.encode(QUESTION, add_special_tokens=False).ids
    rank = FakeRank(says, tokenizer.get_vocab_size())
    floor, gateway = Server("floor"), Server("gateway")
    try:
        await asyncio.get_running_loop().create_unix_connection(lambda: rank, await gateway.said())
        floor.port, gateway.port = int(await floor.said()), int(await gateway.said())
        sides: tuple[tuple[Server, Callable[[int], None]], ...] = (
            (floor, lambda num_events: None),
            (gateway, rank.on_received),
        )
        results = []
        for num_streams in all_streams:
            rounds = []
            for _ in range(num_rounds):
                rank.await_sequences(num_streams)
                rounds.append([await rate(*side, num_streams, seconds) for side in sides])
            results.append(summary(num_streams, rounds))
            print(results[-1], flush=True)
        return results
    finally:
        floor.end()
        gateway.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--serve", choices=["floor", "gateway"], help=argparse.SUPPRESS)
    parser.add_argument("--streams", default="1,32,256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.serve:
        os.sched_setaffinity(0, {SERVER_CORE})
        uvloop.run(serve_floor() if args.serve == "floor" else serve_gateway())
        return
    os.sched_setaffinity(0, {CLIENT_CORE})
    num_streams = [int(number) for number in args.streams.split(",")]
    results = uvloop.run(measure(num_streams, args.rounds, args.seconds))
    if args.json:
        command = "python -m tests.bench.bench_streaming " + " ".join(sys.argv[1:])
        found = {"command": command.strip(), "machine": bench.machine(), "results": results}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
