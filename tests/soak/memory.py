"""A real `sluice serve` of the demo model under steady, mixed traffic: memory and descriptors stay flat.

`--trials` are minutes. The first quarter is not counted: caches fill, allocators find their size. Over the
rest, a line is fitted through the memory that each process has written, and the descriptors it has open at
first are compared with those at last. A rush of more requests at once than ever come again goes before, and
some minutes of haste: an allocator keeps what the busiest moment took, with what the collector had not yet
come by for, and that moment shall not come by chance, hours later. And each token of the vocabulary is said
once: what the gateway keeps of tokens would else grow while rare ones come.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from gateway.model_source import demo_directory
from tests.e2e.server import MODEL, Server, serving
from tests.soak import _figures

CLIENTS = 4
RUSHES = 20  # of twice as many clients, with the longest requests
HURRY_SECONDS = 180  # of as many, with requests of every kind and no pause
THINK_SECONDS = 0.2  # on average, between a client's requests
SAMPLE_SECONDS = 5.0
MAX_SLOPE = 1.0  # MiB an hour
MAX_WORDS = 60
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
WORDS = "what is the colour of a duck and how many are three plus four please tell me now".split()  # noqa: SIM905


def written(pid: int) -> int:
    """Bytes of memory that the process has written: its heap and its other private pages.

    Not pages of files, libraries above all: which of these count as the process's own ("unique set size")
    depends on who else on the machine maps them, and the kernel drops them as it likes. That moves rank 0 by
    18 MiB and the gateway by 6 while other programs over torch and Python come and go.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kibibytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return 1024 * (kibibytes["Anonymous"] + kibibytes["Swap"])


@dataclass
class Samples:
    """Of one process: when, how much memory, how many descriptors."""

    seconds: list[float] = field(default_factory=list)
    mebibytes: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def add(self, now: float, process: psutil.Process) -> None:
        self.seconds.append(now)
        self.mebibytes.append(written(process.pid) / (1 << 20))
        self.descriptors.append(process.num_fds())

    def after(self, second: float) -> Samples:
        first = next(i for i, when in enumerate(self.seconds) if when >= second)
        return Samples(self.seconds[first:], self.mebibytes[first:], self.descriptors[first:])

    @property
    def slope(self) -> float:
        """MiB an hour. Python takes memory a MiB at a time: one such step in the middle of 45 minutes tilts
        the line by 2, of two hours and a quarter by 0.7. `steps` tells."""
        return statistics.linear_regression([second / 3600 for second in self.seconds], self.mebibytes).slope

    @property
    def steps(self) -> list[tuple[float, float]]:
        """(minute, MiB) wherever it has grown or shrunk by a tenth of a MiB since the one before."""
        found = [(0.0, self.mebibytes[0])]
        for second, size in zip(self.seconds, self.mebibytes, strict=True):
            if abs(size - found[-1][1]) >= 0.1:
                found.append((round(second / 60, 1), round(size, 1)))
        return found


def thirds(values: Sequence[float]) -> list[float]:
    """The median of each third."""
    size = -(-len(values) // 3)
    return [
        round(statistics.median(values[start : start + size]), 1) for start in range(0, len(values), size)
    ]


class Client:
    """Requests of every kind, one after another, until the time is up."""

    def __init__(self, url: str, seed: int, counts: Counter[str], think_seconds: float) -> None:
        self._url, self._draw, self._counts = url, random.Random(seed), counts
        self._think_seconds = think_seconds

    async def run(self, until: float) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as client:
            while time.monotonic() < until:
                kind = self._draw.choice((self._chat, self._stream, self._cut, self._choices, self._refused))
                await kind(client)
                self._counts[kind.__name__.strip("_")] += 1
                await asyncio.sleep(self._draw.uniform(0, 2 * self._think_seconds))

    async def rush(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as client:
            for _ in range(RUSHES):
                prompts = [self._text(MAX_WORDS), self._text(MAX_WORDS)]
                await self._post(client, "completions", 200, prompt=prompts, n=2)

    async def say(self, tokens: Sequence[int]) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as client:
            for token in tokens:
                bias = {str(token): 100}
                await self._post(client, "chat/completions", 200, logprobs=True, logit_bias=bias, **HELLO)

    def _text(self, min_words: int = 3) -> str:
        return " ".join(self._draw.choices(WORDS, k=self._draw.randint(min_words, MAX_WORDS)))

    def _messages(self) -> dict[str, object]:
        return {"messages": [{"role": "user", "content": self._text()}]}

    async def _post(self, client: httpx.AsyncClient, path: str, status: int, **body: object) -> None:
        max_tokens = self._draw.randint(1, 40)
        answer = await client.post(f"/v1/{path}", json={"model": MODEL, "max_tokens": max_tokens, **body})
        if answer.status_code != status:
            self._counts["failed"] += 1

    async def _chat(self, client: httpx.AsyncClient) -> None:
        await self._post(client, "chat/completions", 200, logprobs=True, top_logprobs=3, **self._messages())

    async def _choices(self, client: httpx.AsyncClient) -> None:
        await self._post(client, "completions", 200, prompt=[self._text(), self._text()], n=2)

    async def _refused(self, client: httpx.AsyncClient) -> None:
        await self._post(client, "completions", 400, prompt=self._text(), temperature=-1, logit_bias={"1": 5})

    async def _stream(self, client: httpx.AsyncClient, cut_after: int | None = None) -> None:
        body = {"model": MODEL, "max_tokens": 60, "stream": True, **self._messages()}
        last, count = "", 0
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                last, count = line or last, count + 1
                if count == cut_after:
                    return  # and the connection is closed: what is left of the answer is not read
        if last != "data: [DONE]":
            self._counts["failed"] += 1

    async def _cut(self, client: httpx.AsyncClient) -> None:
        await self._stream(client, self._draw.randint(1, 20))


async def _soak(server: Server, minutes: float) -> tuple[Counter[str], dict[str, Samples]]:
    counts: Counter[str] = Counter()
    early = [Client(server.url, seed, counts, 0) for seed in range(2 * CLIENTS)]
    vocabulary = range(json.loads((demo_directory() / "config.json").read_text())["vocab_size"])
    await asyncio.gather(*(client.rush() for client in early))
    await asyncio.gather(*(client.say(vocabulary[place :: len(early)]) for place, client in enumerate(early)))
    hurry_until = time.monotonic() + HURRY_SECONDS
    await asyncio.gather(*(client.run(hurry_until) for client in early))
    started = time.monotonic()
    until = started + 60 * minutes
    processes = {"gateway": psutil.Process(server.process.pid)}
    processes |= {f"rank {rank}": process for rank, process in server.workers().items()}
    samples = {name: Samples() for name in processes}
    steady = [Client(server.url, seed, counts, THINK_SECONDS) for seed in range(CLIENTS)]
    clients = [asyncio.create_task(client.run(until)) for client in steady]
    while (now := time.monotonic()) < until:
        for name, process in processes.items():
            samples[name].add(now - started, process)
        await asyncio.sleep(SAMPLE_SECONDS)
    await asyncio.gather(*clients)
    return counts, samples


def run(minutes: int) -> dict[str, object]:
    with serving("--kv-cache-memory", "64MiB") as server:  # small: soon every page of it has been written
        counts, samples = asyncio.run(_soak(server, minutes))
    counted = {name: of.after(15 * minutes) for name, of in samples.items()}
    growing = [name for name, of in counted.items() if of.slope >= MAX_SLOPE]
    descriptors = {name: thirds(of.descriptors) for name, of in counted.items()}
    leaking = [name for name, of in descriptors.items() if of[-1] > of[0] + 1]  # one: a client between two
    return {
        "minutes": minutes,
        "requests": counts,
        "MiB an hour": {name: round(of.slope, 2) for name, of in counted.items()},
        "MiB, in each third": {name: thirds(of.mebibytes) for name, of in counted.items()},
        "(minute, MiB) of each change": {name: of.steps for name, of in samples.items()},
        "descriptors, in each third": descriptors,
        "growing": growing,
        "leaking descriptors": leaking,
        "failed": counts["failed"] + len(growing) + len(leaking),
    }


if __name__ == "__main__":
    _figures.main("memory", __doc__, 60, run)
