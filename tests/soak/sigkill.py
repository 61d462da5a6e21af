"""SIGKILL of the gateway, and of what launches a group's ranks, under a running stream; then what is left.

Over fake groups of two ranks, with the guard of the real ones; then over real torchrun groups of two ranks.
After three seconds there must be no process, listening port, unix socket, file in shared memory, run
directory or control socket of what was killed. `--trials N` over fake groups, half of them each victim;
N / 5 real ones.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from tests.e2e.server import FAKE_SERVE, Server, events, serving, wait_until
from tests.fake_group.spec import FakeSpec
from tests.soak import _figures

LIMIT_SECONDS = 3.0
MOST_A_SERVER = 5  # kills of one group: it is not tried for ever
SHARED_MEMORY = Path("/dev/shm")
_LISTENING = "0A"


@dataclass(frozen=True)
class Traces:
    """What processes of a server have on the machine."""

    processes: Sequence[psutil.Process]
    paths: Sequence[Path]  # run directories, and the gateway's control socket
    names: Sequence[str]  # of run directories: their shared memory carries them
    port: int | None  # None: it is to stay

    def left(self) -> list[str]:
        found = [f"process {process.pid}" for process in self.processes if _exists(process)]
        found += [f"{path}" for path in self.paths if path.exists()]
        found += [str(file) for name in self.names for file in SHARED_MEMORY.glob(f"*{name}*")]
        sockets = Path("/proc/net/unix").read_text()
        found += [f"unix socket under {path}" for path in self.paths if f"{path}" in sockets]
        if self.port is not None and is_listened_on(self.port):
            found.append(f"port {self.port}")
        return found

    def seconds_until_gone(self) -> tuple[float, list[str]]:
        """How long it took, and what is left after LIMIT_SECONDS."""
        started = time.monotonic()
        while (left := self.left()) and time.monotonic() < started + LIMIT_SECONDS:
            time.sleep(0.01)
        return time.monotonic() - started, left


def _exists(process: psutil.Process) -> bool:
    """A zombie holds nothing any more, and how soon it is reaped is up to the system's first process."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def is_listened_on(port: int) -> bool:
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == _LISTENING and int(local.rsplit(":", 1)[1], 16) == port:
                return True
    return False


def traces(server: Server, processes: Sequence[psutil.Process], *, with_gateway: bool) -> Traces:
    """Fails when there is nothing to leave behind."""
    run_dirs = server.run_dirs()
    control = list((server.home / "tmp").glob("sluice.*.sock")) if with_gateway else []
    names = [path.name for path in run_dirs]
    for name in names:  # the fake has no shared memory of its own
        with suppress(FileExistsError):
            (SHARED_MEMORY / f"soak-{name}").touch(exist_ok=False)
    found = Traces(processes, [*run_dirs, *control], names, server.port if with_gateway else None)
    kinds = ("process", f"{server.home}", f"{SHARED_MEMORY}", *(["port"] if with_gateway else []))
    left = found.left()
    assert all(any(trace.startswith(kind) for trace in left) for kind in kinds), left
    assert len(control) == with_gateway
    return found


@contextmanager
def server_of_two_ranks(*, real: bool) -> Iterator[Server]:
    if real:
        with serving("--tp", "2") as server:
            yield server
        return
    with tempfile.NamedTemporaryFile(suffix=".json") as spec:
        spec.write(msgspec.json.encode(FakeSpec(num_ranks=2)))
        spec.flush()
        with serving("--spec", spec.name, program=FAKE_SERVE) as server:
            yield server


def kill_gateway(*, real: bool) -> tuple[float, list[str]]:
    """One trial, of a server of its own."""
    with server_of_two_ranks(real=real) as server, server.stream(max_tokens=1900, ignore_eos=True) as lines:
        next(events(lines))
        tree = server.tree()
        assert len(tree) >= 5, tree  # gateway, guard, launcher, two ranks
        found = traces(server, tree, with_gateway=True)
        server.process.kill()
        server.process.wait()
        return found.seconds_until_gone()


def kill_launcher(server: Server) -> tuple[float, list[str]]:
    """One trial of many on a server, which starts the group again."""
    wait_until(server.is_ready, "ready", 120, server.output)
    with server.stream(max_tokens=1900, ignore_eos=True) as lines:
        next(events(lines))
        gateway, *below = server.tree()
        guard = next(process for process in below if "engines.guard" in process.cmdline())
        launcher, *ranks = guard.children(recursive=True)
        assert len(ranks) == 2
        found = traces(server, [guard, launcher, *ranks], with_gateway=False)
        launcher.kill()
        outcome = found.seconds_until_gone()
        assert gateway.is_running()
    return outcome


def trials(num_gateway: int, num_launcher: int, *, real: bool) -> dict[str, object]:
    """The figures of one bed."""
    gateway = [kill_gateway(real=real) for _ in range(num_gateway)]
    launcher = []
    while len(launcher) < num_launcher:
        with server_of_two_ranks(real=real) as server:
            count = min(MOST_A_SERVER, num_launcher - len(launcher))
            launcher += [kill_launcher(server) for _ in range(count)]
            wait_until(server.is_ready, "ready again", 120, server.output)
            assert server.stop() == 0
    figures = {"gateway": summary(gateway), "launcher": summary(launcher)}
    print("real:" if real else "fake:", figures, file=sys.stderr, flush=True)
    return figures


def summary(outcomes: Sequence[tuple[float, list[str]]]) -> dict[str, object]:
    seconds = sorted(seconds for seconds, _ in outcomes) or [0.0]
    left = [trace for _, traces in outcomes for trace in traces]
    return {
        "trials": len(outcomes),
        "with_anything_left_after_3_s": sum(bool(traces) for _, traces in outcomes),
        "left": left[:10],
        "median_seconds": round(seconds[len(seconds) // 2], 3),
        "longest_seconds": round(seconds[-1], 3),
    }


def num_failed(figures: dict[str, object]) -> int:
    return int(json.dumps(figures).count('"left": ["'))


def run(num_trials: int) -> dict[str, object]:
    num_real = num_trials // 5
    beds = {
        "fake": trials(num_trials // 2, num_trials - num_trials // 2, real=False),
        "real": trials(num_real // 2, num_real - num_real // 2, real=True),
    }
    return {**beds, "failed": num_failed(beds)}


if __name__ == "__main__":
    _figures.main("sigkill", __doc__, 200, run)
