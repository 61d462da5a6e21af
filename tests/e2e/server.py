"""A real `sluice serve` as a child process, and what the tests look at: its tree, its files, its sockets."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

MODEL = "sluice-demo"
READY_SECONDS = 240.0  # a bound, not an expectation: the machine may be busy


def free_port() -> int:
    """Below those that the kernel gives to clients: one of these may be a connection's by the time it is
    listened on."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_until(
    condition: Callable[[], bool], what: str, seconds: float = 15.0, why: Callable[[], str] = str
) -> None:
    """Fails with `what`, and what `why` tells, when the condition does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:g} s, still not: {what}\n{why()}"
        time.sleep(0.02)


@dataclass
class Server:
    """One `sluice serve`. `home` is its temporary directory: run directories and logs are in there."""

    process: subprocess.Popen[bytes]
    port: int
    home: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def output(self) -> str:
        return (self.home / "output").read_text()

    def is_ready(self) -> bool:
        assert self.process.poll() is None, f"sluice serve ended:\n{self.output()}"
        with suppress(httpx.TransportError):
            return self.client.get("/readyz").status_code == 200
        return False

    def wait_until_ready(self) -> None:
        wait_until(self.is_ready, "ready", READY_SECONDS, self.output)

    def tree(self) -> list[psutil.Process]:
        """The gateway and everything below it."""
        gateway = psutil.Process(self.process.pid)
        return [gateway, *gateway.children(recursive=True)]

    def group_processes(self) -> list[psutil.Process]:
        """The guards of the groups and everything below them."""
        children = psutil.Process(self.process.pid).children()
        guards = [child for child in children if "engines.guard" in _command(child)[:3]]
        return [process for guard in guards for process in (guard, *guard.children(recursive=True))]

    def workers(self) -> dict[int, psutil.Process]:
        """The ranks by number."""
        programs = {"engines.worker", "tests.fake_group.process"}
        ranks = {}
        for process in self.tree():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # it ends just now
                if programs & set(process.cmdline()[:4]):
                    ranks[int(process.environ().get("RANK", "0"))] = process
        return ranks

    def torchrun(self) -> psutil.Process:
        found = [process for process in self.tree() if "torch.distributed.run" in _command(process)[:3]]
        assert len(found) == 1
        return found[0]

    def run_dirs(self) -> list[Path]:
        return list((self.home / "tmp").glob("sluice-*"))

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all series of that name that have these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        text = self.client.get("/metrics").text
        series = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        assert f"# HELP {name} " in text  # a series itself comes with the first heartbeat
        found = [line for line in series if all(label in line for label in wanted)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def groups(self) -> list[dict[str, object]]:
        """The groups of the first model, as /readyz tells."""
        groups = self.client.get("/readyz").json()["models"][0]["groups"]
        assert isinstance(groups, list)
        return groups

    @contextmanager
    def stream(self, **body: object) -> Iterator[Iterator[str]]:
        """The lines of a streamed completion."""
        request = {"model": MODEL, "prompt": "Hello", "stream": True, "temperature": 0, **body}
        with self.client.stream("POST", "/v1/completions", json=request) as response:
            assert response.status_code == 200, response.read()
            yield response.iter_lines()

    def complete(self, **body: object) -> httpx.Response:
        request = {"model": MODEL, "prompt": "Hello", "temperature": 0, "max_tokens": 4, **body}
        return self.client.post("/v1/completions", json=request)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


SERVE = (str(Path(sys.executable).with_name("sluice")), "serve")
FAKE_SERVE = (sys.executable, "-m", "tests.fake_group.serve")
"""Over groups without torch."""


@contextmanager
def serving(*arguments: str, wait: bool = True, program: Sequence[str] = SERVE) -> Iterator[Server]:
    """`sluice serve ARGUMENTS` on a free port. Whatever happens, nothing of it is left afterwards."""
    home = Path(tempfile.mkdtemp(prefix="sluice-e2e-"))  # short: a unix socket's path has 107 characters
    (home / "tmp").mkdir()
    port = free_port()
    argv = [*program, *arguments]
    argv += ["--omp-threads", "1", "--port", str(port), "--log-dir", str(home / "logs")]
    environment = {**os.environ, "TMPDIR": str(home / "tmp")}
    with (home / "output").open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env=environment)
    server = Server(process, port, home)
    try:
        if wait:
            server.wait_until_ready()
        yield server
    finally:
        _end(server)
        server.client.close()
        shutil.rmtree(home)


def _end(server: Server) -> None:
    if server.process.poll() is None:
        left = server.tree()
        server.process.kill()
        server.process.wait()
        psutil.wait_procs(left[1:], timeout=10)


def events(lines: Iterator[str]) -> Iterator[dict[str, object]]:
    """The JSON of each event, up to the end of the stream or [DONE], which comes as {"done": True}."""
    for line in lines:
        if line == "data: [DONE]":
            yield {"done": True}
        elif line.startswith("data: "):
            yield json.loads(line[6:])
