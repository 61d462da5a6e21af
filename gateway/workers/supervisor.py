"""Keeps the worker groups alive: starts them, watches them, starts them again, and ends them.

Nothing of a group outlives this process, however it ends: see engines/guard.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from engines.config import ModelConfig
from gateway.workers import backoff
from gateway.workers.group import Group
from gateway.workers.launcher import environment, guarded_argv
from gateway.workers.life import GroupSpec, Life
from gateway.workers.process import Command
from gateway.workers.protocol import GroupState
from gateway.workers.rundir import remove_stale

log = logging.getLogger(__name__)

GRACE_SECONDS = 30.0
_NUM_KEPT_LOGS = 10  # starts of one group whose logs are kept


def torchrun_group(name: str, config: ModelConfig, devices: Sequence[str]) -> GroupSpec:
    """A real group on `devices` (as CUDA_VISIBLE_DEVICES names them)."""

    def command(run_dir: Path, log_dir: Path) -> Command:
        argv = guarded_argv(config, run_dir, log_dir)
        return Command(tuple(argv), environment(config, devices, os.environ))

    return GroupSpec(name, config, command)


class Supervisor:
    """`async with Supervisor(...)` starts every group on entering, and drains and ends them on leaving.

    `log_dir` gets a directory a start. `backoff_seconds` maps deaths in a row to seconds. Raises OSError
    on entering when log_dir or the temporary directory cannot be used.
    """

    def __init__(
        self,
        specs: Sequence[GroupSpec],
        log_dir: Path,
        *,
        temp_dir: Path | None = None,
        grace_seconds: float = GRACE_SECONDS,
        backoff_seconds: Callable[[int], float] = backoff.backoff_seconds,
    ) -> None:
        self.groups = tuple(Group(spec.name, spec.config) for spec in specs)
        self._specs = tuple(specs)
        self._log_dir = log_dir
        self._temp_dir = temp_dir or Path(tempfile.gettempdir())
        self._grace_seconds = grace_seconds
        self._backoff_seconds = backoff_seconds
        self._keepers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start every group and return; they tell of themselves in `groups`."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for path in remove_stale(self._temp_dir):
            log.info("removed %s, which a killed gateway left", path)
        for spec, group in zip(self._specs, self.groups, strict=True):
            self._keepers.append(asyncio.create_task(self._keep(spec, group), name=spec.name))

    def drain(self) -> None:
        """Take nothing new; what runs goes on."""
        for group in self.groups:
            group.drain()

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Drain for at most `grace_seconds`, then end every group; what runs still gets WorkerLost. Nothing
        of them is left on return. Cancelled (a second SIGTERM), it cuts the grace short."""
        self.drain()
        grace = self._grace_seconds if grace_seconds is None else grace_seconds
        try:
            if any(group.num_outstanding for group in self.groups):
                await self._wait_until_idle(grace)
        finally:
            for keeper in self._keepers:
                keeper.cancel()
            await asyncio.gather(*self._keepers, return_exceptions=True)
            for group in self.groups:
                group.stop()

    async def _wait_until_idle(self, grace: float) -> None:
        try:
            async with asyncio.timeout(grace):
                await asyncio.gather(*(group.wait_until_idle() for group in self.groups))
        except TimeoutError:
            log.warning("requests still run after a grace of %g s; ending them", grace)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(None if error is None else 0.0)

    async def _keep(self, spec: GroupSpec, group: Group) -> None:
        try:
            while group.state is not GroupState.DRAINING:
                await self._restart_until_failed(spec, group)
                await group.wanted.wait()
                group.num_restarts += 1
        except Exception as error:  # a mistake of ours must not look like a group that starts for ever
            log.exception("%s: the supervisor failed", spec.name)
            group.fail(f"internal error: {error}")

    async def _restart_until_failed(self, spec: GroupSpec, group: Group) -> None:
        num_failures, first_failure_at, has_served = 0, 0.0, False
        while True:
            log_dir = _new_log_dir(self._log_dir / _file_name(spec.name))
            death = await Life(spec, group, temp_dir=self._temp_dir, log_dir=log_dir).run()
            has_served |= death.ready_seconds > 0
            if num_failures == 0 or death.ready_seconds >= backoff.HEALTHY_SECONDS:
                num_failures, first_failure_at = 0, time.monotonic()
            num_failures += 1
            is_hopeless = death.permanent and not has_served  # what could be loaded once may come back
            failing_seconds = time.monotonic() - first_failure_at
            reason = _final(death.reason, is_hopeless, failing_seconds, spec.config.max_retry_timeout)
            if reason is not None:
                if has_served:  # of one that never did, whoever waits for it to be ready tells
                    log.error("%s: failed for good: %s", spec.name, reason)
                group.fail(reason)
                return
            if group.state is GroupState.DRAINING:
                return
            delay = self._backoff_seconds(num_failures)
            log.warning("%s: died: %s; starting again in %g s", spec.name, death.reason, delay)
            group.die(death.reason)
            group.wait_for_restart(delay)
            await asyncio.sleep(delay)
            group.num_restarts += 1


def _final(reason: str, is_hopeless: bool, failing_seconds: float, limit: float) -> str | None:
    """Why there will be no restart; None when there will."""
    if is_hopeless:
        return reason
    if failing_seconds > limit:
        return f"failing for {failing_seconds:.0f} s (maxRetryTimeoutInSec is {limit:g}): {reason}"
    return None


def _file_name(name: str) -> str:
    """A group's name as one directory name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".") or "group"


def _new_log_dir(parent: Path) -> Path:
    """The name of the next start's directory, not made yet. The oldest beyond _NUM_KEPT_LOGS go."""
    starts = sorted(int(path.name) for path in parent.glob("*") if path.name.isdecimal())
    for number in starts[: 1 - _NUM_KEPT_LOGS]:
        shutil.rmtree(parent / f"{number:06}", ignore_errors=True)
    return parent / f"{starts[-1] + 1 if starts else 1:06}"
