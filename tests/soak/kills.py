"""Worker groups are killed while streams run over HTTP: `python -m tests.soak.kills [--fake N] [--real N]`.

Each answer is compared with the one that the same request got when nobody was killed. Fake groups die by a
signal at a random moment, or of themselves at an exact round of prefill, decoding or sampling; real ones (two
ranks over gloo) by SIGKILL to a rank, torchrun or the guard; now and then the next one while it loads. No
answer meets more than one death while it runs: a second one would make it poison, which is another test's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import math
import operator
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

from gateway.bench import machine
from tests.e2e.server import FAKE_SERVE, MODEL, Server, serving
from tests.fake_group.spec import FakeSpec, Fault

HUNG_SECONDS = 240.0
POISONED = "request_poisoned"
BEDS = 4
Content = dict[int, tuple[str, str | None, list[str], list[float]]]  # text, finish reason, tokens, logprobs


@dataclass
class Answer:
    """What came of one request, and when."""

    choices: Content = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    error: str | None = None
    times: list[float] = field(default_factory=list)

    def take(self, chunk: dict[str, Any]) -> None:
        self.times.append(time.monotonic())
        if "error" in chunk:
            self.error = chunk["error"]["code"]
            return
        for choice in chunk["choices"]:
            text, reason, tokens, values = self.choices.get(choice["index"], ("", None, [], []))
            logprobs = choice["logprobs"] or {"tokens": [], "token_logprobs": []}
            self.choices[choice["index"]] = (
                text + choice["text"],
                choice["finish_reason"] or reason,
                tokens + logprobs["tokens"],
                values + logprobs["token_logprobs"],
            )
        self.usage = chunk.get("usage") or self.usage

    def same_as(self, other: Answer) -> bool:
        """The same text, tokens, ends and counts; log-probabilities within a rounding."""
        if self.error or self.choices.keys() != other.choices.keys() or not self._same_usage(other):
            return False
        return all(
            mine[:3] == theirs[:3] and all(abs(a - b) < 1e-3 for a, b in zip(mine[3], theirs[3], strict=True))
            for mine, theirs in ((self.choices[i], other.choices[i]) for i in self.choices)
        )

    def _same_usage(self, other: Answer) -> bool:
        assert self.usage is not None or other.usage is not None
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        return all((self.usage or {}).get(name) == (other.usage or {}).get(name) for name in names)


def requests(max_tokens: int) -> list[dict[str, Any]]:
    """Every kind of sampling, streamed and not; `greedy` and `seeded` in turn."""
    seeded: dict[str, Any] = {"temperature": 1.0, "seed": 7}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        seeded,
        {"temperature": 0, "logprobs": 2},
        seeded | {"top_p": 0.9, "logprobs": 0},
        {"temperature": 0, "frequency_penalty": 0.5, "presence_penalty": 0.5},
        seeded | {"repetition_penalty": 1.2, "top_k": 40},
        {"temperature": 0, "stop": ["zzz"], "min_tokens": 5},
        seeded | {"n": 2, "min_p": 0.01},
    ]
    prompts = ["Hello", "To serve a model, ", "x" * 300, "What is a worker group? " * 8]
    base = {"model": MODEL, "max_tokens": max_tokens, "ignore_eos": True}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return [
        base | kind | {"prompt": prompt} | (streamed if number % 8 < 7 else {})
        for number, (prompt, kind) in enumerate((prompt, kind) for prompt in prompts for kind in kinds)
    ]


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Raises TimeoutError when it hangs."""
    answer = Answer()
    async with asyncio.timeout(HUNG_SECONDS), client.stream("POST", "/v1/completions", json=body) as response:
        if not body.get("stream") or response.status_code != 200:
            answer.take(json.loads(await response.aread()))
            return answer
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                answer.take(json.loads(line[6:]))
    return answer


@dataclass
class Figures:
    """Counts and seconds of a bed, or of several."""

    kills: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    resumed_greedy: int = 0
    resumed_seeded: int = 0
    gaps: list[float] = field(default_factory=list)  # from a death to the next event of a stream
    refusals: list[float] = field(default_factory=list)  # how long a 503 took
    ready: list[float] = field(default_factory=list)  # from a death to ready
    starts: list[float] = field(default_factory=list)  # from the spawn to ready, as the gateway's log has it
    wrong: list[str] = field(default_factory=list)

    def __add__(self, other: Figures) -> Figures:
        return Figures(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def summary(self) -> dict[str, Any]:
        start = statistics.median(self.starts)
        return {
            "kills": sum(self.kills.values()),
            "kills_by_kind": dict(sorted(self.kills.items())),
            "answers": dict(sorted(self.answers.items())),
            "resumed_greedy_streams": self.resumed_greedy,
            "resumed_seeded_streams": self.resumed_seeded,
            "start_seconds": spread(self.starts),
            "gap_seconds": spread(self.gaps),
            "gap_beyond_start_seconds": spread([gap - start for gap in self.gaps]),
            "refusal_seconds": spread(self.refusals),
            "ready_seconds": spread(self.ready),
            "ready_beyond_start_seconds": spread([ready - start for ready in self.ready]),
            "wrong": self.wrong,
        }


def spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {"n": 0}
    ordered = sorted(values)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    places = {name: min(int(share * len(ordered)), len(ordered) - 1) for name, share in at.items()}
    return {"n": len(ordered)} | {name: round(ordered[place], 4) for name, place in places.items()}


class Bed:
    """A server of one group that is killed again and again."""

    def __init__(self, server: Server, client: httpx.AsyncClient, spec_file: Path | None, seed: int) -> None:
        self.server, self.client, self._spec_file = server, client, spec_file
        self._random = random.Random(seed)
        self._fault: Fault | None = None  # that the group which runs now is going to meet
        self._trigger = 0  # the token that makes it happen
        self._requests = requests(max_tokens=120 if spec_file else 60)
        self._expected: list[Answer] = []
        self._num_at_once = 6 if spec_file else 24  # a start of a real group costs more
        self._usual_seconds = 0.0  # of an answer when nobody dies
        self.figures = Figures()

    async def learn(self) -> None:
        """What the requests are answered when nobody dies."""
        await self._until_ready()
        self._expected = list(await asyncio.gather(*(ask(self.client, body) for body in self._requests)))
        assert all(answer.error is None for answer in self._expected)
        started = time.monotonic()
        some = self._requests[: self._num_at_once]
        await asyncio.gather(*(ask(self.client, body) for body in some))
        self._usual_seconds = time.monotonic() - started

    async def kill_once(self) -> None:
        """One death under some answers (now and then under none), and all that must follow."""
        pids = self._pids()
        next_fault = self._plan_next_start()
        is_idle = self._random.random() < 0.1
        picked = [] if is_idle else self._random.sample(range(len(self._requests)), self._num_at_once)
        asking = [asyncio.create_task(ask(self.client, self._requests[index])) for index in picked]
        asking_for = (
            None if self._fault is None or is_idle else asyncio.create_task(self._ask_for(self._fault))
        )
        kind, died_at = await self._death(pids, "idle" if is_idle else "")
        self.figures.kills[kind] += 1
        probes = [asyncio.create_task(self._probe()) for _ in range(2)]
        num_before = sum(self.figures.kills.values())
        if self._random.random() < 0.1:
            died_at = await self._kill_while_loading(pids)
        await self._until_ready()
        ready_at = time.monotonic()
        self.figures.ready.append(ready_at - died_at)
        self._fault = next_fault
        answers = await asyncio.gather(*asking, return_exceptions=True)
        was_killed_twice = sum(self.figures.kills.values()) > num_before
        for index, answer in zip(picked, answers, strict=True):
            if self._is_explained(answer, ready_at, was_killed_twice):
                continue
            self._judge(index, answer, died_at)
        if asking_for is not None:
            response = await asking_for
            is_poisoned = was_killed_twice and response.json().get("error", {}).get("code") == POISONED
            assert is_poisoned or response.json()["usage"]["completion_tokens"] == 100, response.text
        await asyncio.gather(*probes)

    async def _until_ready(self) -> None:
        """Until the group is ready that was started after the last death."""
        async with asyncio.timeout(HUNG_SECONDS):
            while True:
                response = await self.client.get("/readyz")
                restarts = response.json()["models"][0]["groups"][0]["restarts"]
                if response.status_code == 200 and restarts >= sum(self.figures.kills.values()):
                    return
                await asyncio.sleep(0.01)

    def _pids(self) -> dict[str, int]:
        names = {"engines.guard": "guard", "torch.distributed.run": "torchrun"}
        found = {f"rank {rank}": process.pid for rank, process in self.server.workers().items()}
        for process in self.server.tree()[1:]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # it ends just now
                words = process.cmdline()[:4]
                found |= {name: process.pid for word, name in names.items() if word in words}
        return found

    def _plan_next_start(self) -> Fault | None:
        """How a fake group shall end that is started after this one; None: by a signal. What is sent to it
        before its turn has come must not have the token."""
        if self._spec_file is None:
            return None
        fault = None
        if self._random.random() < 0.5:
            phase = self._random.choice(["prefill", "decode", "sample"])
            nth = 1 if phase == "prefill" else self._random.randint(1, 60)
            action = self._random.choice(["kill", "exit", "raise", "memory"])
            self._trigger = 1_500 + (self._trigger + 1) % 500
            fault = Fault(phase=phase, nth=nth, action=action, token=self._trigger)  # type: ignore[arg-type]
        spec = FakeSpec(step_seconds=0.002, faults=(fault,) if fault else ())
        self._spec_file.write_bytes(msgspec.json.encode(spec))
        return fault

    async def _death(self, pids: dict[str, int], why: str) -> tuple[str, float]:
        """Waits for the fault of this start, or kills one of its processes. Returns what, and when."""
        if self._fault is not None and not why:
            async with asyncio.timeout(HUNG_SECONDS):
                await gone(pids["rank 0"])
            return f"{self._fault.phase}: {self._fault.action}", time.monotonic()
        await asyncio.sleep(self._random.uniform(0.0, self._usual_seconds))
        victim = self._random.choice(sorted(pids))
        died_at = await kill(pids[victim])
        return f"{why or 'any moment'}: SIGKILL {victim}", died_at

    async def _kill_while_loading(self, old: dict[str, int]) -> float:
        """The group that is started in its place, too."""
        async with asyncio.timeout(HUNG_SECONDS):
            while self._pids().get("rank 0", old["rank 0"]) == old["rank 0"]:
                await asyncio.sleep(0.005)
        if self._spec_file is None:
            await asyncio.sleep(self._random.uniform(0.0, 2.0))
        pids = self._pids()
        if (await self.client.get("/readyz")).status_code != 200 and "rank 0" in pids:
            self.figures.kills["load: SIGKILL rank 0"] += 1
            return await kill(pids["rank 0"])
        return time.monotonic()

    async def _ask_for(self, fault: Fault) -> httpx.Response:
        """The request that the fault waits for: it survives what it does, for the next start minds it not."""
        body = {"model": MODEL, "prompt": [fault.token, 20, 21], "max_tokens": 100, "temperature": 0}
        return await self.client.post("/v1/completions", json=body)

    async def _probe(self) -> None:
        """A request that comes while nobody is there is told so at once. One that comes before the gateway
        has noticed is answered like those that were underway."""
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 1}
        for _ in range(3):
            started = time.monotonic()
            response = await self.client.post("/v1/completions", json=body)
            if response.status_code == 503:
                assert int(response.headers["retry-after"]) >= 1
                self.figures.refusals.append(time.monotonic() - started)
                return
            assert response.status_code == 200, response.text
            await asyncio.sleep(0.02)

    def _is_explained(self, answer: Answer | BaseException, ready_at: float, was_killed_twice: bool) -> bool:
        """An error that is as it must be. The gateway may know of a death before we do."""
        if not isinstance(answer, Answer):
            return False
        if answer.error == "model_not_ready" and len(answer.times) == 1 and answer.times[0] <= ready_at:
            self.figures.answers["refused: it came when the group was gone"] += 1
            return True
        if answer.error == POISONED and was_killed_twice:  # the second group was ready a moment before
            self.figures.answers["poisoned: in two groups that died"] += 1
            return True
        return False

    def _judge(self, index: int, answer: Answer | BaseException, died_at: float) -> None:
        body, figures = self._requests[index], self.figures
        if isinstance(answer, BaseException):
            figures.answers["hung" if isinstance(answer, TimeoutError) else "broken"] += 1
            figures.wrong.append(f"{answer!r}: {body}")
            return
        if not answer.same_as(self._expected[index]):
            figures.answers["wrong"] += 1
            figures.wrong.append(
                f"{body}: {answer.error or answer.choices}, not {self._expected[index].choices}"
            )
            return
        figures.answers["the same"] += 1
        gap = gap_after(answer.times, died_at)
        if gap is not None and gap > 0.1:  # else it had ended, or what came was underway already
            figures.gaps.append(gap)
            if body["temperature"] == 0:
                figures.resumed_greedy += 1
            else:
                figures.resumed_seeded += 1

    def read_starts(self) -> None:
        """How long the starts took that came to be ready, as the gateway logged them."""
        spawned = None
        for line in self.server.output().splitlines():
            if "starting under guard" in line:
                spawned = logged_at(line)
            elif line.endswith(": ready") and spawned is not None:
                self.figures.starts.append(logged_at(line) - spawned)


def gap_after(times: list[float], died_at: float) -> float | None:
    """From the death to the event that took longest to come after it; None for what had not begun, or had
    ended."""
    if not times or times[0] > died_at or times[-1] <= died_at:
        return None
    return max(after - max(before, died_at) for before, after in pairwise(times) if after > died_at)


def logged_at(line: str) -> float:
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()


async def kill(pid: int) -> float:
    """SIGKILL; returns when it was gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return time.monotonic()
    await gone(pid)
    return time.monotonic()


async def gone(pid: int) -> None:
    """Until the process has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def kill_many(bed: Bed, num_kills: int, max_seconds: float) -> Figures:
    """So many deaths, or as many as there is time for, each looked at. Says how far it is now and then."""
    await bed.learn()
    give_up_at = time.monotonic() + max_seconds
    while (done := sum(bed.figures.kills.values())) < num_kills and time.monotonic() < give_up_at:
        await bed.kill_once()
        if done % 20 == 19:
            print(f"{done} of {num_kills} kills, {dict(bed.figures.answers)}", file=sys.stderr, flush=True)
            print(*bed.figures.wrong, sep="\n", file=sys.stderr, flush=True)
    bed.read_starts()
    return bed.figures


def fake_kills(num_kills: int, seed: int = 0, max_seconds: float = math.inf, num_beds: int = 1) -> Figures:
    """Over groups without torch: `num_beds` servers at the same time, each with its share of the kills. From
    one death to the next they wait more than they compute."""

    async def kill_all(beds: list[tuple[Server, Path]]) -> list[Figures]:
        share = -(-num_kills // num_beds)
        seeds = range(seed * num_beds, (seed + 1) * num_beds)
        return await asyncio.gather(
            *(_kill(*bed, share, own, max_seconds) for bed, own in zip(beds, seeds, strict=True))
        )

    with contextlib.ExitStack() as stack:
        beds = [stack.enter_context(_fake_server()) for _ in range(num_beds)]
        return functools.reduce(operator.add, asyncio.run(kill_all(beds)))


@contextlib.contextmanager
def _fake_server() -> Iterator[tuple[Server, Path]]:
    """And the file that says what its next group is."""
    with tempfile.TemporaryDirectory() as directory:
        spec_file = Path(directory) / "spec.json"
        spec_file.write_bytes(msgspec.json.encode(FakeSpec(step_seconds=0.002)))
        with serving(program=(*FAKE_SERVE, "--spec", str(spec_file))) as server:
            yield server, spec_file


def real_kills(num_kills: int, seed: int = 0, max_seconds: float = math.inf) -> Figures:
    """Over torchrun groups of two ranks, in float32."""
    with serving("--tp", "2", "--dtype", "float32", program=(*FAKE_SERVE, "--real")) as server:
        return asyncio.run(_kill(server, None, num_kills, seed, max_seconds))


async def _kill(
    server: Server, spec_file: Path | None, num_kills: int, seed: int, max_seconds: float
) -> Figures:
    limits = httpx.Limits(max_connections=32, max_keepalive_connections=32)
    async with httpx.AsyncClient(base_url=server.url, timeout=HUNG_SECONDS, limits=limits) as client:
        bed = Bed(server, client, spec_file, seed)
        figures = await kill_many(bed, num_kills, max_seconds)
        restarts = (await client.get("/readyz")).json()["models"][0]["groups"][0]["restarts"]
        assert restarts == sum(figures.kills.values()), "every kill was a death, and every death a kill"
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fake", type=int, default=3_000, help="kills of fake groups")
    parser.add_argument("--real", type=int, default=300, help="kills of real groups")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for each of the two, at most")
    parser.add_argument("--beds", type=int, default=BEDS, help="servers over fake groups at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    runs = {
        "fake": (functools.partial(fake_kills, num_beds=given.beds), given.fake),
        "real": (real_kills, given.real),
    }
    results = {
        name: run(count, given.seed, 60 * given.minutes).summary()
        for name, (run, count) in runs.items()
        if count
    }
    command = f"python -m tests.soak.kills --fake {given.fake} --real {given.real} --minutes {given.minutes}"
    report = {"command": f"{command} --beds {given.beds}", "machine": machine(), **results}
    text = json.dumps(report, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")
    if any(result["wrong"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
