"""One start of a group, from the spawning of its processes to the last trace of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

from engines.config import ModelConfig
from engines.wire import Failed, Ready
from gateway.workers.connection import GROUP_DIED, Connection, Report, accept, listen
from gateway.workers.group import Group
from gateway.workers.hang import LOOK_SECONDS, Evidence, Look, Watch, verdict
from gateway.workers.lastwords import describe_exit, is_echo, last_words, names_a_rank
from gateway.workers.process import Command, GuardedProcess
from gateway.workers.progress import COMPILE, phase
from gateway.workers.protocol import GroupState
from gateway.workers.pulse import Pulse, ranks
from gateway.workers.rundir import run_directory

log = logging.getLogger(__name__)

_EOF_SECONDS = 1.0  # a guard that is gone has killed the group: its socket ends at once, or something is off
_WORD_SECONDS = 0.5  # for torchrun to write which rank died, and of what: it looks ten times a second
_LOOK_SECONDS = 0.02
_COMPILE_SECONDS = 1800.0
_ENDED_BY_US = 128 + signal.SIGTERM


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What to start: `command(run_dir, log_dir)` gives argv (the guard in front) and environment for one
    start. `name` is MODEL/REPLICA."""

    name: str
    config: ModelConfig
    command: Callable[[Path, Path], Command]


@dataclass(frozen=True, slots=True)
class Death:
    """Why a group ended, in one line; `permanent`: a restart would end the same way."""

    reason: str
    permanent: bool
    ready_seconds: float  # how long it had served; 0: never


class Life:
    """Call `run` once. Tells `group` what happens."""

    def __init__(self, spec: GroupSpec, group: Group, *, temp_dir: Path, log_dir: Path) -> None:
        self._spec, self._group = spec, group
        self._temp_dir, self._log_dir = temp_dir, log_dir
        self._launcher_log = log_dir / "launcher.log"
        self._death: asyncio.Future[Failed] = asyncio.get_running_loop().create_future()
        self._look_in_logs = False
        self._ready_at: float | None = None
        self._connection = Connection(self._on_report, self._on_lost)

    async def run(self) -> Death:
        """Until the group is dead and nothing of it is left, also when cancelled."""
        self._group.start(self._connection)
        try:
            with run_directory(self._temp_dir) as run_dir:
                async with self._processes(run_dir) as process:
                    failed = await self._death
                    if self._look_in_logs:
                        await self._wait_for_words(process)
        except OSError as error:
            reason = f"cannot start the workers: {error}"
            self._group.die(reason)
            return Death(reason, False, 0.0)
        return Death(
            self._explain(failed.reason, process.exited.result()), failed.permanent, self._ready_seconds()
        )

    @contextlib.asynccontextmanager
    async def _processes(self, run_dir: Path) -> AsyncIterator[GuardedProcess]:
        """The group's processes and its connection, for as long as the context lasts."""
        (run_dir / "launch.json").write_text(self._spec.config.model_dump_json())
        path = run_dir / "gateway.sock"
        listener = listen(path)
        try:
            process = self._spawn(run_dir)
            accepting = asyncio.create_task(accept(listener, path, self._connection))
            accepting.add_done_callback(self._on_accepted)
            starting = asyncio.create_task(self._limit_start())
            watching = asyncio.create_task(self._watch(process.pid))
            watching.add_done_callback(self._on_watched)
            try:
                yield process
            finally:
                for task in (accepting, starting, watching):
                    task.cancel()
                self._connection.close("the worker group is being stopped")
                await _to_its_end(process.end())
        finally:
            listener.close()

    def _spawn(self, run_dir: Path) -> GuardedProcess:
        self._log_dir.mkdir(parents=True)
        command = self._spec.command(run_dir, self._log_dir)
        process = GuardedProcess(command, self._launcher_log)
        process.exited.add_done_callback(self._on_exit)
        log.info("%s: starting under guard %d, logs in %s", self._spec.name, process.pid, self._log_dir)
        return process

    async def _limit_start(self) -> None:
        """Compiling is not counted, within reason: it happens once, and takes what the machine takes."""
        timeout = self._spec.config.startup_timeout
        left, left_to_compile, before = timeout, _COMPILE_SECONDS, time.monotonic()
        while left > 0 and left_to_compile > 0 and self._ready_at is None:
            await asyncio.sleep(min(left, LOOK_SECONDS))
            now = time.monotonic()
            if phase(self._group) == COMPILE:
                left_to_compile -= now - before
            else:
                left -= now - before
            before = now
        if self._ready_at is None:
            progress = self._group.progress
            where = f" (in {progress.phase}, at {progress.fraction:.0%})" if progress else ""
            self._die(f"not ready within startupTimeout, {timeout:g} s{where}")

    async def _watch(self, guard: int) -> None:
        """Until the group hangs."""
        pulse, watch = Pulse(guard), Watch(self._spec.config.response_timeout)
        evidence = Evidence()
        while (reason := verdict(evidence)) is None:
            await asyncio.sleep(LOOK_SECONDS)
            evidence = watch.see(self._look(pulse, closely=evidence.stood > 0))
        log.warning("%s: hangs: %s; %s", self._spec.name, reason, evidence)
        self._die(f"hangs: {reason}")

    def _look(self, pulse: Pulse, closely: bool) -> Look:
        now, info = time.monotonic(), self._group.info
        if self._ready_at is None or info is None:
            return Look(now, pulse.is_any_stopped(has_loaded=False))
        return Look(
            now=now,
            is_stopped=pulse.is_any_stopped(has_loaded=True),
            ranks=ranks(info.pids, closely),
            num_signs=self._connection.num_signs,
            stats=self._group.stats,
        )

    def _on_accepted(self, accepting: asyncio.Task[None]) -> None:
        if not accepting.cancelled() and (error := accepting.exception()) is not None:
            self._die(f"cannot accept the connection of the workers: {error}")

    def _on_watched(self, watching: asyncio.Task[None]) -> None:
        """A watch that fails must not leave the group unwatched."""
        if not watching.cancelled() and (error := watching.exception()) is not None:
            self._die(f"cannot watch the workers: {error!r}")

    def _on_report(self, message: Report) -> None:
        self._group.report(message)
        if isinstance(message, Ready):
            self._ready_at = time.monotonic()
            # Of a first start the console tells, and `ready on`.
            log.log(logging.INFO if self._group.num_restarts else logging.DEBUG, "%s: ready", self._spec.name)
        elif isinstance(message, Failed):
            if is_echo(message.reason):  # another rank died first, and this one missed it
                self._on_lost(GROUP_DIED)
            else:
                self._die(message.reason, permanent=message.permanent)

    def _on_lost(self, reason: str) -> None:
        self._die(reason, look_in_logs=True)

    def _on_exit(self, _: asyncio.Future[int]) -> None:
        if self._connection.is_connected:  # its end is on the way
            asyncio.get_running_loop().call_later(_EOF_SECONDS, self._on_lost, "the launcher is gone")
        else:
            self._on_lost("the worker group ended before it had connected")

    def _die(self, reason: str, *, permanent: bool = False, look_in_logs: bool = False) -> None:
        """The first reason counts. Ends the open streams at once; `run` does the rest."""
        if self._death.done():
            return
        self._look_in_logs = look_in_logs
        self._death.set_result(Failed(reason, permanent))
        if not (permanent and self._group.state is GroupState.STARTING):  # else it will have failed, not died
            self._group.die(reason)
        self._connection.close(reason)
        if num_lost := self._connection.num_lost:
            streams = f"{num_lost} sequence{'s' * (num_lost != 1)} in it"
            log.info(
                "%s: died with %s; to go on elsewhere, or here once it is back", self._spec.name, streams
            )

    async def _wait_for_words(self, process: GuardedProcess) -> None:
        """Until the launcher has named the rank that died, or has ended, or takes too long to."""
        deadline = time.monotonic() + _WORD_SECONDS
        while time.monotonic() < deadline and not process.exited.done():
            if names_a_rank(self._launcher_log):
                return
            await asyncio.sleep(_LOOK_SECONDS)

    def _explain(self, reason: str, exit_code: int) -> str:
        """The reason, and more where the dead left word. The guard's code says something unless it is we who
        ended it, or the launcher, whose rank had failed."""
        if not self._look_in_logs:
            return reason
        words = last_words(self._log_dir, self._launcher_log)
        if words:
            said = words if reason == GROUP_DIED else f"{reason}: {words}"
            return f"{said} (logs: {self._log_dir})"
        ended = f" ({describe_exit(exit_code)})" if exit_code != _ENDED_BY_US else ""
        return f"{reason}{ended} (logs: {self._log_dir})"

    def _ready_seconds(self) -> float:
        return time.monotonic() - self._ready_at if self._ready_at is not None else 0.0


async def _to_its_end(work: Coroutine[None, None, None]) -> None:
    """Await `work` even if cancelled meanwhile, however often; then be cancelled."""
    task, cancelled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError
