"""Faults struck at real groups: one rank killed or stopped at a phase of its choice, and what must follow.

`strike` does one and asserts all of it: that the fault took effect in the phase wanted, that the group
noticed and every request in it ended with WorkerLost, that nothing is left of it, and that the group serves
again, with the same tokens. What took how long is returned.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from engines.config import ModelConfig
from engines.guard import SHARED_MEMORY, descendants
from engines.wire import Generate
from gateway.workers.group import Group
from gateway.workers.protocol import GroupState, WorkerLost
from gateway.workers.supervisor import Supervisor, torchrun_group
from tests.engines.layouts import Layout
from tests.engines.reference import request_of
from tests.models import GQA, Shape

Phase = Literal["load", "prefill", "decode", "idle"]
PHASES: tuple[Phase, ...] = ("load", "prefill", "decode", "idle")
BLOWS = (signal.SIGKILL, signal.SIGSTOP)
LAYOUTS = (
    Layout("native", tp=2),
    Layout("pipeline", pp=2),
    Layout("pipeline", tp=2, pp=2),
    Layout("deepspeed_tp", tp=2),
    Layout("accelerate"),
)
SECONDS = 240.0  # for what must come to pass at some time, on any machine

SHAPE: Shape = replace(GQA, max_positions=8192)
MAX_BATCHED = 16  # so that PROMPT takes 500 steps
PROMPT = [2 + i % 250 for i in range(8000)]
SHORT = PROMPT[:20]


@dataclass(frozen=True)
class Fault:
    """What happens to which rank, and when."""

    rank: int
    blow: signal.Signals
    phase: Phase

    def __str__(self) -> str:
        return f"{self.blow.name} rank {self.rank} {self.phase}"


@dataclass(frozen=True)
class Outcome:
    """Seconds after the blow."""

    ended: float  # until the last request had its error, or, without requests, the group was noticed
    gone: float  # until nothing was left of the old group
    served: float  # until the new one had answered
    reason: str


def faults_of(layout: Layout) -> list[Fault]:
    """Every rank, blow and phase."""
    ranks = range(layout.tp * layout.pp)
    return [Fault(rank, blow, phase) for phase in PHASES for rank in ranks for blow in BLOWS]


def config_for(layout: Layout, model: Path) -> ModelConfig:
    config = layout.config(model, num_blocks=600, block_size=16, max_batched=MAX_BATCHED)
    return config.model_copy(update={"startup_timeout": SECONDS, "max_retry_timeout": 1e6})


@asynccontextmanager
async def supervised(config: ModelConfig) -> AsyncIterator[tuple[Group, Path]]:
    """The group, started again at once whenever it dies, and the directory of its run directories."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "t").mkdir()
        spec = torchrun_group("model/0", config, [])
        supervisor = Supervisor(
            [spec], work / "logs", temp_dir=work / "t", grace_seconds=0.0, backoff_seconds=lambda _: 0.0
        )
        async with supervisor:
            yield supervisor.groups[0], work / "t"
        assert list((work / "t").iterdir()) == []


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {SECONDS} s for {what}"
        await asyncio.sleep(0.002)


async def until_ready(group: Group) -> None:
    await until(lambda: group.state is GroupState.READY, f"a group that is ready, not {group.failure}")


async def answer(group: Group, max_tokens: int = 8) -> list[int]:
    stream = group.generate(_request(SHORT, max_tokens))
    return [id async for batch in stream for delta in batch for id in delta.token_ids]


async def strike(group: Group, temp_dir: Path, fault: Fault, expected: list[int]) -> Outcome:
    """One fault at a group that starts or is ready; for the phase "load", the latter is started again."""
    requests = await _reach(group, fault.phase)
    num_restarts = group.num_restarts
    run_dir = _only(temp_dir)
    tree = _tree()
    pid = _pid_of(fault.rank, tree)
    struck = time.monotonic()
    os.kill(pid, fault.blow)
    await until(lambda: _has_effect(pid, fault.blow), f"{fault} to take effect")
    assert group.num_restarts == num_restarts, "the group had died before it was struck"
    if fault.phase == "load":
        assert group.state is not GroupState.READY, "it was ready before it was struck"
    results = await asyncio.wait_for(asyncio.gather(*(one.ended for one in requests)), SECONDS)
    await until(lambda: group.num_restarts > num_restarts or group.failure, "the death to be noticed")
    ended = time.monotonic() - struck
    assert all(isinstance(result, WorkerLost) for result in results), results
    for one in requests:
        assert bool(one.num_tokens) == (fault.phase == "decode"), "it was in another phase"
    await until(lambda: _left(run_dir, tree) == [], f"nothing of it to be left, but {_left(run_dir, tree)}")
    gone = time.monotonic() - struck
    await until(lambda: group.num_restarts > num_restarts, "a new start")
    reason = group.failure or ""
    await until_ready(group)
    assert group.num_restarts == num_restarts + 1
    assert await answer(group) == expected
    return Outcome(ended, gone, time.monotonic() - struck, reason)


class _Reader:
    """Reads one stream; `ended` resolves to what ended it."""

    def __init__(self, group: Group, request: Generate) -> None:
        self.num_tokens = 0
        self.ended = asyncio.create_task(self._read(group, request))

    async def _read(self, group: Group, request: Generate) -> Exception | None:
        try:
            async for batch in group.generate(request):
                self.num_tokens += sum(len(delta.token_ids) for delta in batch)
        except Exception as error:
            return error
        return None


def _request(prompt: list[int], max_tokens: int) -> Generate:
    return request_of(f"r{random.getrandbits(64)}", prompt, max_tokens)


async def _reach(group: Group, phase: Phase) -> list[_Reader]:
    """Bring the group into the phase; the requests in it."""
    if phase == "load":
        if group.state is GroupState.READY:
            num_restarts = group.num_restarts
            os.kill(_pid_of(0, _tree()), signal.SIGKILL)
            await until(lambda: group.num_restarts > num_restarts, "a new start")
        await until(lambda: group.state is GroupState.STARTING and group.progress, "a start to begin")
        return []
    await until_ready(group)
    if phase == "idle":
        await until(lambda: group.stats and not group.stats.num_running, "a heartbeat of an idle group")
        return []
    if phase == "decode":
        readers = [_Reader(group, _request(SHORT, 8000)) for _ in range(3)]
        await until(lambda: all(one.num_tokens > 2 for one in readers), "tokens")
        return readers
    before = group.stats.num_computed_tokens if group.stats else 0
    readers = [_Reader(group, _request(PROMPT, 8)) for _ in range(2)]
    await until(
        lambda: group.stats and group.stats.num_computed_tokens >= before + 2 * MAX_BATCHED,
        "steps over a prompt",
    )
    return readers


def _only(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def _tree() -> list[int]:
    """The guard and all that is below it."""
    own = psutil.Process(os.getpid())
    (guard,) = [child.pid for child in own.children() if "engines.guard" in child.cmdline()]
    return [guard, *descendants(guard)]


def _pid_of(rank: int, tree: list[int]) -> int:
    for pid in tree:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            command, environment = process.cmdline(), process.environ()
            is_rank = "engines.worker" in command and "torch.distributed.run" not in command
            if is_rank and "engines.guard" not in command and environment.get("RANK") == str(rank):
                return pid
    raise AssertionError(f"no process of rank {rank}")


def _has_effect(pid: int, blow: signal.Signals) -> bool:
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return blow == signal.SIGKILL
    return bool(status == (psutil.STATUS_ZOMBIE if blow == signal.SIGKILL else psutil.STATUS_STOPPED))


def _left(run_dir: Path, tree: list[int]) -> list[str]:
    """Traces of a group: processes, its run directory, shared memory, sockets."""
    processes = [f"process {pid}" for pid in tree if psutil.pid_exists(pid)]
    files = [str(path) for path in (run_dir, *SHARED_MEMORY.glob(f"*{run_dir.name}*")) if path.exists()]
    sockets = [line for line in Path("/proc/net/unix").read_text().splitlines() if run_dir.name in line]
    return [*processes, *files, *sockets]
