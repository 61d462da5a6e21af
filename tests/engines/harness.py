"""A real worker group for synchronous tests: the gateway's supervisor in a thread, torchrun below it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from engines.config import ModelConfig
from engines.wire import Generate, Ready, RequestError, Stats, TokenDelta, TokenLogprob
from gateway.workers import group as workers
from gateway.workers.launcher import environment, guarded_argv
from gateway.workers.life import GroupSpec
from gateway.workers.process import Command
from gateway.workers.protocol import GroupState
from gateway.workers.supervisor import Supervisor

START_SECONDS = 60.0
ROOT = Path(__file__).parents[2]
INJECTING = """
import sys

if sys.orig_argv[sys.orig_argv.index("-m") + 1] == "engines.worker":
    from tests.engines.injected import Injector

    Injector().install(setattr)
"""
"""Run by every process of a group as it starts; torchrun and the guard are none of its ranks."""


class StartFailed(Exception):  # noqa: N818
    def __init__(self, reason: str, is_permanent: bool) -> None:
        super().__init__(reason)
        self.is_permanent = is_permanent


@dataclass
class Ended:
    """All that one sequence gave, or has given so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int | None = None
    embedding: bytes = b""
    finish_reason: str | None = None
    error: RequestError | None = None

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def take(self, delta: TokenDelta) -> None:
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason, self.error = delta.finish_reason, delta.error
        if delta.prompt_logprobs:
            self.prompt_logprobs = [*(self.prompt_logprobs or []), *delta.prompt_logprobs]
        self.embedding += delta.embedding
        if delta.num_cached_tokens is not None:
            self.num_cached_tokens = delta.num_cached_tokens


class Group:
    """The group from a thread that is not the event loop's."""

    def __init__(self, group: workers.Group, loop: asyncio.AbstractEventLoop) -> None:
        self._group, self._loop = group, loop

    @property
    def info(self) -> Ready:
        assert self._group.info is not None
        return self._group.info

    def start(self, request: Generate) -> Future[Ended]:
        return self._submit(_collect(self._group, request))

    def run(self, requests: Sequence[Generate], timeout: float = 60) -> list[Ended]:
        """All at once; their ends in the order of the requests."""
        futures = [self.start(request) for request in requests]
        return [future.result(timeout) for future in futures]

    def abort_after(self, request: Generate, num_tokens: int) -> list[int]:
        """Close the stream once it has given that many tokens, which are returned."""
        return self._submit(_collect_some(self._group, request, num_tokens)).result(60)

    def stats(self) -> Stats:
        """Fresher than this call."""
        before = self._group.stats
        _until(lambda: self._group.stats is not before, "a heartbeat")
        assert self._group.stats is not None
        return self._group.stats

    def idle_stats(self) -> Stats:
        """Once nothing runs or waits."""
        _until(lambda: not self.stats().num_running + self.stats().num_waiting, "an idle group")
        return self.stats()

    def wait_until_failed(self) -> None:
        """Once nothing of it is left, where the configuration allows no restart."""
        _until(lambda: self._group.state is GroupState.FAILED, "the end of the group")

    def _submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def _until(condition: Any, what: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


async def _collect(group: workers.Group, request: Generate) -> Ended:
    ended = Ended()
    async for batch in group.generate(request):
        for delta in batch:
            ended.take(delta)
    return ended


async def _collect_some(group: workers.Group, request: Generate, num_tokens: int) -> list[int]:
    token_ids: list[int] = []
    stream = group.generate(request)
    async for batch in stream:
        token_ids += [id for delta in batch for id in delta.token_ids]
        if len(token_ids) >= num_tokens:
            break
    await stream.aclose()
    return token_ids[:num_tokens]  # under load two may come at once


@contextmanager
def running(config: ModelConfig, *, injecting: bool = False) -> Iterator[Group]:
    """A group that is ready. Raises StartFailed when it ends instead.

    `injecting`: its ranks have the sites of tests/engines/injected.py, for requests whose seed names one."""
    if config.engine == "deepspeed_tp":
        compile_all_reduce()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    stop = asyncio.Event()
    started: Future[workers.Group] = Future()

    async def serve(work: Path) -> None:
        try:
            async with _supervised(config, work, injecting) as group:
                started.set_result(group)
                await stop.wait()
        except StartFailed as failure:
            started.set_exception(failure)

    with tempfile.TemporaryDirectory() as work:
        serving = asyncio.run_coroutine_threadsafe(serve(Path(work)), loop)
        try:
            yield Group(started.result(START_SECONDS + 30), loop)
        finally:
            loop.call_soon_threadsafe(stop.set)
            serving.result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()


@cache
def compile_all_reduce() -> None:
    """DeepSpeed's, once an environment, where it can be: it would take most of the time that a group has to
    start."""
    from engines.models.deepspeed_comm import ALL_REDUCE

    has_tools = find_spec("deepspeed") is not None and shutil.which("g++") and shutil.which("ninja")
    if has_tools and not ALL_REDUCE.is_compiled:
        command = [sys.executable, "-m", "engines.models.deepspeed_comm"]
        subprocess.run(command, cwd=ROOT, check=True, timeout=900)


@asynccontextmanager
async def _supervised(config: ModelConfig, work: Path, injecting: bool) -> AsyncIterator[workers.Group]:
    plugins = _write_plugins(work)
    if injecting:
        (plugins / "sitecustomize.py").write_text(INJECTING)

    devices = [str(i) for i in range(torch.cuda.device_count())] if config.device == "cuda" else []

    def command(run_dir: Path, log_dir: Path) -> Command:
        env = environment(config, devices, os.environ) | {"PYTHONPATH": f"{plugins}:{ROOT}"}
        return Command(tuple(guarded_argv(config, run_dir, log_dir)), env)

    spec = GroupSpec(f"{config.model_name}/0", config, command)
    async with Supervisor([spec], work / "logs", grace_seconds=0.1) as supervisor:
        (group,) = supervisor.groups
        deadline = time.monotonic() + START_SECONDS
        while group.state is GroupState.STARTING and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if group.state is not GroupState.READY:
            await asyncio.sleep(0.5)  # from dead to failed for good takes the supervisor a moment
            raise StartFailed(group.failure or "not ready in time", group.state is GroupState.FAILED)
        yield group


def _write_plugins(work: Path) -> Path:
    """The test engines as an installed distribution offers them: metadata with entry points."""
    info = work / "plugins" / "two_stage-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: two-stage\nVersion: 1.0\n")
    entries = (
        "two-stage = tests.engines.two_stage:TwoStageEngine",
        "fake-inject = tests.engines.fake_injected:FakeInjectEngine",
        "fake-ahead = tests.engines.fake_ahead:FakeAheadEngine",
        "injected = tests.engines.injected:InjectedEngine",
    )
    (info / "entry_points.txt").write_text("\n".join(["[sluice.engines]", *entries, ""]))
    return info.parent
