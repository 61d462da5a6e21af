"""Streams of which a fifth is cut at a random token, over real sockets: every sequence of a client that
left is aborted, no block is lost, and those who stay get the text that they get alone.

The group is the fake one (real inbox, leader, scheduler; a token depends on all K/V before it), with so few
blocks that it preempts.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import tempfile
import time
from collections import Counter
from pathlib import Path

import msgspec

from tests.e2e.server import FAKE_SERVE, MODEL, Server, serving, wait_until
from tests.fake_group.spec import FakeSpec
from tests.soak import _figures

CONCURRENCY = 24
SHARE_CUT = 0.2
RST = struct.pack("ii", 1, 0)
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def bodies(draw: random.Random, count: int) -> list[dict[str, object]]:
    """Different requests: one choice, several, several prompts; some with a common beginning."""
    made: list[dict[str, object]] = []
    for number in range(count):
        prompt = (
            " ".join(WORDS[: draw.randint(1, 10)]) + " " + " ".join(draw.choices(WORDS, k=5)) + f" {number}"
        )
        kind = draw.choice(({}, {}, {"n": 3}, {"prompt": [prompt, prompt[::-1]]}))
        made.append({"prompt": prompt, "max_tokens": draw.randint(100, 200), "seed": number, **kind})
    return made


def num_sequences(body: dict[str, object]) -> int:
    prompts = body["prompt"]
    return int(body.get("n", 1)) * (len(prompts) if isinstance(prompts, list) else 1)  # type: ignore[call-overload]


class Client:
    """One request on a connection of its own; `cut_after` events it leaves, by FIN or by RST."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def stream(self, body: dict[str, object], cut_after: int | None, *, by_rst: bool) -> dict[int, str]:
        """The text of each choice, as far as it came."""
        reader, writer = await self._send({**body, "stream": True})
        texts: dict[int, str] = {}
        num_events = 0
        try:
            while num_events != cut_after and (line := await reader.readline()):
                if line.startswith(b"data: {"):
                    num_events += 1
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    for choice in event["choices"]:
                        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                elif line.startswith(b"data: [DONE]"):
                    break
        finally:
            self._leave(writer, by_rst=by_rst)
        return texts

    async def leave_unanswered(self, body: dict[str, object], seconds: float, *, by_rst: bool) -> None:
        """Ask without a stream, and leave before the answer."""
        _, writer = await self._send(body)
        await asyncio.sleep(seconds)
        self._leave(writer, by_rst=by_rst)

    async def _send(self, body: dict[str, object]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        content = json.dumps({"model": MODEL, "ignore_eos": True, **body}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        return reader, writer

    def _leave(self, writer: asyncio.StreamWriter, *, by_rst: bool) -> None:
        if by_rst:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        writer.close()


async def _run_all(port: int, trials: int, draw: random.Random) -> tuple[Counter[str], list[str]]:
    client, counts, wrong = Client(port), Counter[str](), list[str]()
    requests = bodies(draw, min(60, max(trials // 5, 10)))
    alone = [await client.stream(body, None, by_rst=False) for body in requests]
    assert all(len(texts) == num_sequences(body) for texts, body in zip(alone, requests, strict=True))
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(number: int, fate: float, cut: int, by_rst: bool) -> None:
        body, want = requests[number], alone[number]
        async with gate:
            if fate < SHARE_CUT / 4:
                await client.leave_unanswered(body, cut / 1000, by_rst=by_rst)
                counts["left without a stream"] += 1
                counts["sequences of those who left"] += num_sequences(body)
            elif fate < SHARE_CUT:
                got = await client.stream(body, cut, by_rst=by_rst)
                counts["streams cut"] += 1
                counts["sequences of those who left"] += num_sequences(body)
                if not all(want[index].startswith(text) for index, text in got.items()):
                    wrong.append(f"{body}: {got} does not begin {want}")
            else:
                got = await client.stream(body, None, by_rst=False)
                counts["streams to the end"] += 1
                if got != want:
                    wrong.append(f"{body}: {got} is not {want}")

    await asyncio.gather(
        *(
            one(draw.randrange(len(requests)), draw.random(), draw.randint(0, 19), draw.random() < 0.5)
            for _ in range(trials)
        )
    )
    return counts, wrong


def left_over(server: Server) -> float:
    """Sequences, and the share of the K/V that is in use."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return sum(server.metric(f"sluice:{name}") for name in names)


def run(trials: int, seed: int = 1) -> dict[str, object]:
    started = time.monotonic()
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as work:
        spec = Path(work) / "spec.json"
        spec.write_bytes(msgspec.json.encode(FakeSpec(num_blocks=128, max_num_seqs=16, step_seconds=0.005)))
        with serving("--spec", str(spec), program=FAKE_SERVE) as server:
            counts, wrong = asyncio.run(_run_all(server.port, trials, draw))
            wait_until(lambda: left_over(server) == 0, "nothing left of them", 30)
            time.sleep(1.5)  # the audit of an idle group, and the heartbeat that tells of it
            aborted = server.metric("sluice:request_success_total", finished_reason="abort")
            faults = server.metric("sluice:kv_cache_account_faults_total")
            preemptions = server.metric("sluice:num_preemptions_total")
    return {
        **counts,
        "sequences aborted": aborted,
        "preemptions": preemptions,
        "blocks lost": faults,
        "streams with another's text": len(wrong),
        "differences": wrong[:5],
        "seconds": round(time.monotonic() - started),
        "failed": len(wrong) + faults,
    }


if __name__ == "__main__":
    _figures.main("disconnects", __doc__, 1_000, run)
