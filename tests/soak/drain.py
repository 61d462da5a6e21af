"""SIGTERM under running streams: each ends as if nothing had happened, and so does the server.

`--trials N` servers over fake groups, with 20 streams each; every other one gets the signal while some of the
streams still wait for their turn. A second signal is for tests/e2e/test_start_and_end.py.
"""

from __future__ import annotations

import json
import signal
import tempfile
import threading
import time

import httpx
import msgspec

from tests.e2e.server import FAKE_SERVE, MODEL, Server, serving, wait_until
from tests.fake_group.spec import FakeSpec
from tests.soak import _figures

NUM_STREAMS = 20
STEP_SECONDS = 0.005
MAX_TOKENS = 1200  # six seconds at least, so that they run when the signal comes
GRACE_SECONDS = 300


class Stream(threading.Thread):
    """One client; what it got, once it has ended."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.num_events = 0
        self.num_tokens = 0
        self.end = "nothing"

    def run(self) -> None:
        body = {
            "model": MODEL,
            "prompt": "Hello",
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with httpx.stream(
                "POST", f"{self._url}/v1/completions", json=body, timeout=GRACE_SECONDS
            ) as response:
                for line in response.iter_lines():
                    self._take(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            self.end = f"{type(error).__name__}: {error}"

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.end = "done"
        elif data.startswith("{"):
            self.num_events += 1
            event = json.loads(data)
            self.end = data if "error" in event else self.end
            if event.get("usage"):
                self.num_tokens = event["usage"]["completion_tokens"]

    @property
    def is_whole(self) -> bool:
        return self.end == "done" and self.num_tokens == MAX_TOKENS


def drain(max_num_seqs: int) -> tuple[list[str], float, int, int]:
    """What went wrong with one server, how long it took to end; streams at the signal: open, queued."""
    with tempfile.NamedTemporaryFile(suffix=".json") as spec:
        spec.write(msgspec.json.encode(FakeSpec(max_num_seqs=max_num_seqs, step_seconds=STEP_SECONDS)))
        spec.flush()
        arguments = ("--spec", spec.name, "--grace", str(GRACE_SECONDS))
        with serving(*arguments, program=FAKE_SERVE) as server:
            return _drain(server)


def _drain(server: Server) -> tuple[list[str], float, int, int]:
    num_tokens = server.complete().json()["usage"]["prompt_tokens"]
    streams = [Stream(server.url) for _ in range(NUM_STREAMS)]
    for stream in streams:
        stream.start()

    def num_known() -> float:
        """Streams that have been sent to the group or queue for it."""
        num_sent = server.metric("sluice:prompt_tokens_total") / num_tokens - 1
        return num_sent + server.metric("sluice:num_requests_queued")

    wait_until(lambda: num_known() >= NUM_STREAMS, "all are known", 120)
    num_queued = int(server.metric("sluice:num_requests_queued"))
    running = sum(stream.is_alive() for stream in streams)
    signalled_at = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    problems = []
    for stream in streams:
        stream.join()
        if not stream.is_whole:
            problems.append(f"{stream.num_tokens} tokens, then {stream.end}")
    code = server.process.wait(60)
    seconds = time.monotonic() - signalled_at
    if code != 0:
        problems.append(f"exit code {code}")
    if server.run_dirs():
        problems.append("a run directory is left")
    return problems, seconds, running, num_queued


def run(num_trials: int) -> dict[str, object]:
    outcomes = [drain(max_num_seqs=(64, 8)[trial % 2]) for trial in range(num_trials)]
    problems = [problem for found, *_ in outcomes for problem in found]
    return {
        "servers": num_trials,
        "streams": num_trials * NUM_STREAMS,
        "tokens_each": MAX_TOKENS,
        "streams_open_at_the_signal": sum(running for *_, running, _ in outcomes),
        "streams_queued_at_the_signal": sum(num_queued for *_, num_queued in outcomes),
        "failed": len(problems),
        "problems": problems[:10],
        "longest_seconds_from_signal_to_exit": round(max(seconds for _, seconds, *_ in outcomes), 1),
    }


if __name__ == "__main__":
    _figures.main("drain", __doc__, 50, run)
