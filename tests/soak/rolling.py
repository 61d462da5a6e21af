"""Rolling restarts of one server behind one port, under requests of plain clients that repeat nothing.

Two ways. `replace`: each successor is started with --replace beside the one that serves. `systemd`: the
listening socket is held by the parent, as systemd does; the server is ended and started again.
`--trials N` requests and ten restarts, each way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import psutil

from tests.e2e.server import FAKE_SERVE, MODEL, Server, free_port, wait_until
from tests.fake_group.spec import FakeSpec
from tests.soak import _figures

NUM_RESTARTS = 10
END_SECONDS = 300.0  # a bound for a machine that does a lot besides
STEP_SECONDS = 0.005
LONG_TOKENS = 600  # three seconds at least: longer than a handover takes
_PASS_SOCKET = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execvp(sys.argv[2], sys.argv[2:])
"""  # as systemd does: this process becomes the server


class Generations:
    """One port, and the servers that hold it one after another. Each has a fingerprint of its own."""

    def __init__(self, home: Path, activation: socket.socket | None = None) -> None:
        self.home, self._activation = home, activation
        self.port = activation.getsockname()[1] if activation else free_port()
        self.servers: list[Server] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/completions"

    def start(self, *arguments: str) -> Server:
        """The next one, not yet ready."""
        number = len(self.servers)
        home = self.home / f"{number:03}"
        home.mkdir()
        spec = home / "spec.json"
        spec.write_bytes(msgspec.json.encode(FakeSpec(fingerprint=f"fp_{number}", step_seconds=STEP_SECONDS)))
        argv = [*FAKE_SERVE, "--spec", str(spec), "--omp-threads", "1", *arguments]
        argv += ["--log-dir", str(home / "logs")]
        with (home / "output").open("wb") as output:
            server = Server(self._spawn(argv, output), self.port, home)
        self.servers.append(server)
        return server

    def _spawn(self, argv: list[str], output: object) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TMPDIR": str(self.home)}
        if self._activation is None:
            argv = [*argv, "--port", str(self.port)]
            return subprocess.Popen(argv, stdout=output, stderr=output, env=environment)  # type: ignore[call-overload]
        argv = [sys.executable, "-c", _PASS_SOCKET, str(self._activation.fileno()), *argv]
        passed = (self._activation.fileno(),)
        return subprocess.Popen(argv, stdout=output, stderr=output, env=environment, pass_fds=passed)  # type: ignore[call-overload]

    def until_ready(self, server: Server) -> None:
        def is_ready() -> bool:
            assert server.process.poll() is None, server.output()
            return "\nready on " in server.output()

        wait_until(is_ready, "ready", END_SECONDS, server.output)

    def close(self) -> None:
        for server in self.servers:
            if server.process.poll() is None:
                left = server.tree()
                server.process.kill()
                server.process.wait()
                psutil.wait_procs(left[1:], timeout=10)
            server.client.close()


@contextmanager
def generations(*, is_activated: bool = False) -> Iterator[Generations]:
    """With one that is ready."""
    home = Path(tempfile.mkdtemp(prefix="sluice-roll-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home)
        activation = stack.enter_context(socket.create_server(("127.0.0.1", 0))) if is_activated else None
        made = Generations(home, activation)
        stack.callback(made.close)
        made.until_ready(made.start())
        yield made


def replace(made: Generations) -> Server:
    """Start the next one beside the one that serves; the one that was replaced."""
    old = made.servers[-1]
    made.until_ready(made.start("--replace"))
    return old


def restart(made: Generations) -> Server:
    """End the one that serves, then start the next, as `systemctl restart` does."""
    old = made.servers[-1]
    old.process.send_signal(signal.SIGTERM)
    old.process.wait(END_SECONDS)
    made.until_ready(made.start())
    return old


@dataclass
class Tally:
    """What the clients saw."""

    num_done: int = 0
    failures: list[str] = field(default_factory=list)
    by_server: Counter[str] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)
    longest_seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, kind: str, seconds: float, failure: str | None, fingerprint: str | None) -> None:
        with self.lock:
            self.num_done += 1
            self.by_kind[kind] += 1
            if failure is not None:
                self.failures.append(f"{kind}: {failure}")
            elif fingerprint is not None:
                self.by_server[fingerprint] += 1
            self.longest_seconds = max(self.longest_seconds, seconds)


@dataclass(frozen=True)
class Kind:
    """How a client asks."""

    name: str
    num_clients: int
    keep_alive: bool
    stream: bool
    max_tokens: int = 8
    pause: float = 0.0


KINDS = (
    Kind("kept alive", 2, True, False),
    Kind("kept alive, streamed", 2, True, True),
    Kind("a connection each", 2, False, False),
    Kind("a connection each, streamed", 2, False, True),
    Kind("kept alive, rarely used", 2, True, False, pause=3.5),
    Kind("long streams", 2, True, True, max_tokens=LONG_TOKENS, pause=2.0),
)


class Client:
    """Asks the same again and again; every answer must be that of the first server."""

    def __init__(self, kind: Kind, url: str, tally: Tally, stop: threading.Event) -> None:
        self._kind, self._url, self._tally, self._stop = kind, url, tally, stop
        limits = httpx.Limits() if kind.keep_alive else httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(timeout=END_SECONDS, limits=limits)
        self._body = {
            "model": MODEL,
            "prompt": "Hello",
            "temperature": 0,
            "max_tokens": kind.max_tokens,
            "stream": kind.stream,
        }
        _, self._expected = self._ask()

    def run(self) -> None:
        while not self._stop.is_set():
            started, failure, fingerprint = time.monotonic(), None, None
            try:
                fingerprint, text = self._ask()
                if text != self._expected:
                    failure = f"{text!r} instead of {self._expected!r}"
            except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                failure = f"{type(error).__name__}: {error}"
            self._tally.count(self._kind.name, time.monotonic() - started, failure, fingerprint)
            self._stop.wait(self._kind.pause)
        self._http.close()

    def _ask(self) -> tuple[str, str]:
        """The server's fingerprint, and the text."""
        if not self._kind.stream:
            response = self._http.post(self._url, json=self._body)
            if response.status_code != 200:
                raise ValueError(f"{response.status_code} {response.text}")
            answer = response.json()
            return answer["system_fingerprint"], answer["choices"][0]["text"]
        with self._http.stream("POST", self._url, json=self._body) as response:
            if response.status_code != 200:
                raise ValueError(f"{response.status_code} {response.read()!r}")
            return _read_stream(response.iter_lines())


def _read_stream(lines: Iterator[str]) -> tuple[str, str]:
    fingerprint, text, data = "", "", ""
    for line in lines:
        if line.startswith("data: {"):
            data = line.removeprefix("data: ")
            chunk = json.loads(data)
            fingerprint = chunk["system_fingerprint"]
            text += chunk["choices"][0]["text"]
        elif line == "data: [DONE]":
            return fingerprint, text
    raise ValueError(f"the stream ended without [DONE], after {data[:500]}")


def run(step: Callable[[Generations], Server], num_restarts: int, num_requests: int) -> dict[str, object]:
    """Under clients of all kinds, `num_restarts` restarts and at least `num_requests` requests."""
    with generations(is_activated=step is restart) as made:
        tally, stop = Tally(), threading.Event()
        clients = [Client(kind, made.url, tally, stop) for kind in KINDS for _ in range(kind.num_clients)]
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        try:
            codes = _restarts(made, step, num_restarts, num_requests, tally)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        leavings = [path.name for path in made.home.glob("sluice*")]
        return {
            "way": step.__name__,
            "restarts": num_restarts,
            "requests": tally.num_done,
            "num_failed": len(tally.failures),
            "failures": tally.failures[:10],
            "by_kind": dict(tally.by_kind),
            "answered_by": {server: tally.by_server[server] for server in sorted(tally.by_server)},
            "exit_codes": codes,
            "longest_request_seconds": round(tally.longest_seconds, 2),
            "left_of_old_servers": len(leavings) - 2,  # the last one's run directory and control socket
        }


def _restarts(
    made: Generations,
    step: Callable[[Generations], Server],
    num_restarts: int,
    num_requests: int,
    tally: Tally,
) -> list[int]:
    """The exit codes of all that were replaced, under an even share of the requests each."""
    codes = []
    for number in range(1, num_restarts + 1):
        codes.append(step(made).process.wait(END_SECONDS))
        share = num_requests * number // num_restarts
        wait_until(lambda share=share: tally.num_done >= share, "the requests are done", 1200)  # type: ignore[misc]
    return codes


def run_both(num_requests: int) -> dict[str, object]:
    ways = []
    for step in (replace, restart):
        ways.append(run(step, NUM_RESTARTS, num_requests))
        print(ways[-1], file=sys.stderr, flush=True)
    return {"ways": ways, "failed": sum(len(way["failures"]) for way in ways)}  # type: ignore[arg-type]


if __name__ == "__main__":
    _figures.main("rolling", __doc__, 10_000, run_both)
