"""Ten times as many requests as can be served: what is served, what the rest is told, how soon it is over.

A heavy key sends requests at a fixed rate, whatever becomes of them; a light key has one underway at a time.
--trials is how many seconds that goes on. The peak is measured just before, by as many clients as fit.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from tests.e2e.server import FAKE_SERVE, Server, serving
from tests.fake_group.spec import FakeSpec
from tests.soak import _figures

HEAVY, LIGHT = "key-of-the-heavy-one", "key-of-the-light-one"
SPEC = FakeSpec(max_num_seqs=2, step_seconds=0.05)
MAX_TOKENS = 10  # 2 sequences of 10 steps of 50 ms: 4 requests a second at best
AHEAD = 2  # that the gateway sends beyond those (admission.num_ahead)
QUEUE_TIMEOUT = 1.0
FACTOR = 10
MIN_GOODPUT = 0.9  # of the peak
RECOVERY_SECONDS = 2.0
PROBE_SECONDS = 0.5  # half of what can be served
_PATIENCE = 60.0
_BODY = b'{"model": "sluice-demo", "prompt": [20, 21, 22, 23], "max_tokens": %d}' % MAX_TOKENS
_REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
)


@dataclass(frozen=True)
class Answer:
    """One request, on the clock of time.monotonic."""

    status: int  # 0: none came
    started: float
    ended: float
    retry_after: str | None

    @property
    def seconds(self) -> float:
        return self.ended - self.started


@dataclass(frozen=True)
class Overload:
    """What came of it all. `ended`: of the overload, on the same clock."""

    peak: float  # requests a second
    seconds: float
    heavy: list[Answer]
    light: list[Answer]
    alone: list[Answer]  # of the light key, before
    probes: list[Answer]  # after it
    ended: float

    @property
    def goodput(self) -> float:
        """Of all that was served while the overload lasted."""
        served = [a for a in (*self.heavy, *self.light) if a.status == 200 and a.ended <= self.ended]
        return len(served) / self.seconds

    @property
    def recovery(self) -> float:
        """When the last request was sent that was refused, or took twice as long as one alone."""
        usual = 2 * statistics.median(answer.seconds for answer in self.alone)
        bad = [answer for answer in self.probes if answer.status != 200 or answer.seconds > usual]
        return max((answer.started - self.ended for answer in bad), default=0.0)


class Client:
    """Plain sockets, a connection a request: a client with more to do would be what is overloaded."""

    def __init__(self, server: Server) -> None:
        self._port = server.port

    async def ask(self, key: str) -> Answer:
        started = time.monotonic()
        try:
            async with asyncio.timeout(_PATIENCE):
                head = await self._exchange(key)
        except (OSError, TimeoutError):
            head = b""
        status = int(head.split(b" ", 2)[1]) if head else 0
        retry_after = re.search(rb"\r\nretry-after: ([^\r]*)", head)
        return Answer(status, started, time.monotonic(), retry_after[1].decode() if retry_after else None)

    async def _exchange(self, key: str) -> bytes:
        """The head of the answer, once all of it has come."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(_REQUEST % (key.encode(), len(_BODY), _BODY))
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            json.loads(body)  # it is whole
            return head
        finally:
            writer.close()

    async def one_after_another(self, key: str, until: float) -> list[Answer]:
        answers = []
        while time.monotonic() < until:
            answers.append(await self.ask(key))
        return answers

    async def at_rate(self, key: str, rate: float, until: float) -> list[Answer]:
        """So many a second, however long each of them takes."""
        tasks = []
        due = time.monotonic()
        while due < until:
            await asyncio.sleep(due - time.monotonic())
            tasks.append(asyncio.create_task(self.ask(key)))
            due += 1 / rate
        return await asyncio.gather(*tasks)


async def overload(server: Server, seconds: float) -> Overload:
    client = Client(server)
    alone = await client.one_after_another(LIGHT, time.monotonic() + min(seconds, 5))
    peak = await _peak(client, min(seconds, 10))
    ended = time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        heavy = tasks.create_task(client.at_rate(HEAVY, FACTOR * peak, ended))
        light = tasks.create_task(client.one_after_another(LIGHT, ended))
        await asyncio.sleep(seconds)
        probes = tasks.create_task(client.at_rate(HEAVY, 1 / PROBE_SECONDS, ended + 3 * RECOVERY_SECONDS))
    return Overload(peak, seconds, heavy.result(), light.result(), alone, probes.result(), ended)


async def _peak(client: Client, seconds: float) -> float:
    """Served a second with as many clients as the group takes: nobody waits in the gateway."""
    started = time.monotonic()
    clients = [client.one_after_another(HEAVY, started + seconds) for _ in range(SPEC.max_num_seqs + AHEAD)]
    answers = [answer for answers in await asyncio.gather(*clients) for answer in answers]
    assert {answer.status for answer in answers} == {200}
    ended = started + seconds
    return sum(answer.ended <= ended for answer in answers) / seconds


@contextmanager
def overloaded_server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as directory:
        spec = Path(directory) / "spec.json"
        spec.write_bytes(msgspec.json.encode(SPEC))
        arguments = ["--spec", str(spec), "--api-key", HEAVY, "--api-key", LIGHT]
        arguments += ["--queue-timeout", str(QUEUE_TIMEOUT)]
        with serving(*arguments, program=FAKE_SERVE) as server:
            yield server


def check(result: Overload) -> list[str]:
    """What must be true on any machine, however busy."""
    statuses = Counter(answer.status for answer in (*result.heavy, *result.light, *result.probes))
    refused = [a for a in (*result.heavy, *result.probes) if a.status != 200]
    return [
        problem
        for problem, is_so in {
            "the heavy key was not refused: this was no overload": not any(
                answer.status in (429, 503) for answer in result.heavy
            ),
            f"other statuses than 200, 429, 503: {statuses}": not statuses.keys() <= {200, 429, 503},
            "a refusal without a whole number of seconds": not all(
                (answer.retry_after or "").isdecimal() for answer in refused
            ),
            "nothing was served to the light key": not result.light,
        }.items()
        if is_so
    ]


def run(seconds: int) -> dict[str, object]:
    with overloaded_server() as server:
        result = asyncio.run(overload(server, seconds))
        server.client.headers["authorization"] = f"Bearer {HEAVY}"
        num_restarts = server.metric("sluice:group_restarts_total")
        said = [line for line in server.output().splitlines() if "died" in line or "ERROR" in line]
        cpu = psutil.Process(server.process.pid).cpu_times()
    problems = check(result)
    if result.goodput < MIN_GOODPUT * result.peak:
        problems.append(f"goodput below {MIN_GOODPUT:.0%} of the peak")
    if any(answer.status != 200 for answer in result.light):
        problems.append("the light key was refused")
    if result.recovery > RECOVERY_SECONDS:
        problems.append(f"not recovered within {RECOVERY_SECONDS:g} s")
    if num_restarts:
        problems += ["the group was restarted: nothing here asks for that", *said]
    light, alone = (sorted(answer.seconds for answer in them) for them in (result.light, result.alone))
    return {
        "seconds": seconds,
        "peak_per_second": round(result.peak, 2),
        "offered_per_second": round(len(result.heavy) / seconds, 1),
        "goodput_per_second": round(result.goodput, 2),
        "goodput_of_peak": round(result.goodput / result.peak, 3),
        "heavy_statuses": dict(Counter(str(answer.status) for answer in result.heavy)),
        "recovery_seconds": round(result.recovery, 2),
        "queue_timeout": QUEUE_TIMEOUT,
        "gateway_cpu_seconds": round(cpu.user + cpu.system, 1),
        "light_requests": len(light),
        "light_seconds_median": round(statistics.median(light), 2) if light else None,
        "light_seconds_worst": round(light[-1], 2) if light else None,
        "light_seconds_median_alone": round(statistics.median(alone), 2),
        "problems": problems,
        "failed": len(problems),
    }


if __name__ == "__main__":
    _figures.main("overload", __doc__, 60, run)
