"""What streaming costs: tokens a second that one gateway process streams, beside a bare StreamingResponse.

    python -m tests.bench.bench_streaming [--streams 1,32,256] [--rounds N] [--seconds S] [--json FILE]

The gateway is whole but for the group's socket: HTTP, chat template, a frame decoded and a turn of the loop
for each token, detokeniser, a chat chunk for each token. The group is a fake one in its process that always
has the next token. The floor writes bytes that were built before, as long as such a chunk, under uvicorn too.
A server has one core, the client the other. Whole events within a round's seconds count; sides take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import uvicorn
import uvloop

from engines import wire
from engines.wire import Generate, TokenDelta
from gateway import bench
from gateway.listener import listen
from tests import fakes

SERVER_CORE, CLIENT_CORE = 0, 1
QUESTION = "Which of the ways to split a model over several processes is the best one for me? " * 8
NUM_TOKENS = 3000  # of an answer; then the stream asks again
WARM_SECONDS = 1.0


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


class FakeGroup(fakes.FakeGroup):
    """Has the next token whenever it is asked for it, as a frame of its own."""

    async def generate(self, request: Generate) -> AsyncIterator[TokenDelta]:
        deltas = (TokenDelta(id=request.id, token_ids=[token]) for token in self.says)
        frames = itertools.cycle([wire.encode(wire.Tokens([delta]))[4:] for delta in deltas])
        for _ in range(request.max_tokens - 1):
            await asyncio.sleep(0)
            yield self._decoded(next(frames))
        yield msgspec.structs.replace(self._decoded(next(frames)), finish_reason="length")

    @staticmethod
    def _decoded(frame: bytes) -> TokenDelta:
        message = wire.from_worker_decoder.decode(frame)
        assert isinstance(message, wire.Tokens)
        return message.deltas[0]


async def serve_gateway() -> None:
    from tokenizers import Tokenizer

    from gateway.app import create_app
    from gateway.http_server import make_server
    from gateway.model_source import demo_directory
    from gateway.router import load_served_model
    from gateway.settings import Settings

    tokenizer = Tokenizer.from_file(str(demo_directory() / "tokenizer.json"))
    says = tokenizer.encode(QUESTION, add_special_tokens=False).ids
    group = FakeGroup(
        says=says,
        info=fakes.ready(tokenizer.get_vocab_size(), max_model_len=2 * NUM_TOKENS, max_num_seqs=256),
    )
    served = load_served_model(demo_directory(), name="demo", groups=[group], created=0)
    await _serve(make_server(create_app(Settings(), [served]), flush_seconds=1))


async def _serve(server: uvicorn.Server) -> None:
    """On a free port, which is printed, until standard input ends."""
    listener = listen("127.0.0.1", 0)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    print(listener.getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.should_exit = True
    await serving


@contextmanager
def server(kind: str) -> Iterator[tuple[psutil.Process, int]]:
    """It and its port."""
    command = [sys.executable, "-m", "tests.bench.bench_streaming", "--serve", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield psutil.Process(process.pid), int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(30)


# -- the client ------------------------------------------------------------------------------------


class Stream(asyncio.Protocol):
    """Asks again whenever an answer has ended, and counts events."""

    def __init__(self) -> None:
        body = json.dumps(
            {
                "model": "demo",
                "messages": [{"role": "user", "content": QUESTION}],
                "stream": True,
                "max_tokens": NUM_TOKENS,
            }
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        self._request = f"{head}Content-Type: application/json\r\n\r\n".encode() + body
        self._tail = b""
        self.num_events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        data = self._tail + data
        whole = data.rfind(b"\n\n") + 2
        if whole == 1:
            self._tail = data
            return
        self.num_events += data.count(b"data: {", 0, whole)
        self._tail = data[whole:]
        if b"data: [DONE]" in data[:whole]:
            self._ask()


async def rate(server: psutil.Process, port: int, num_streams: int, seconds: float) -> tuple[float, float]:
    """Events a second of all streams together, and the server's processor time for one, in microseconds."""
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(Stream, "127.0.0.1", port) for _ in range(num_streams)]
    await asyncio.sleep(WARM_SECONDS)
    before, started, busy = sum(stream.num_events for _, stream in made), time.monotonic(), _busy(server)
    await asyncio.sleep(seconds)
    counted, elapsed = sum(stream.num_events for _, stream in made) - before, time.monotonic() - started
    busy = _busy(server) - busy
    for transport, _ in made:
        transport.abort()
    await asyncio.sleep(0.5)  # the sequences of those who left end
    return counted / elapsed, 1e6 * busy / counted


def _busy(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


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
    results = []
    with server("floor") as floor, server("gateway") as gateway:
        for num_streams in map(int, args.streams.split(",")):
            rounds = [
                [uvloop.run(rate(*side, num_streams, args.seconds)) for side in (floor, gateway)]
                for _ in range(args.rounds)
            ]
            row = summary(num_streams, rounds)
            print(row, flush=True)
            results.append(row)
    if args.json:
        command = "python -m tests.bench.bench_streaming " + " ".join(sys.argv[1:])
        found = {"command": command.strip(), "machine": bench.machine(), "results": results}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
