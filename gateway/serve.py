"""The gateway's composition root: configurations to groups, an app and a listening server; and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines import config_devices, modelfit
from engines.config import ConfigError, ModelConfig
from engines.garbage import settle
from gateway import check, console, handover, logs, model_source
from gateway.keys import BadKeyFile, KeyRing
from gateway.listener import from_systemd, listen, notify_systemd, url_of
from gateway.options import Options
from gateway.workers.group import Group
from gateway.workers.protocol import GroupState
from gateway.workers.supervisor import Supervisor, torchrun_group

if TYPE_CHECKING:
    from gateway.http_server import Server
    from gateway.router import ServedModel
    from gateway.routes.common import Gateway

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 5  # for answers to reach their clients once every sequence has ended
_LOOK_SECONDS = 0.02
_FAILURE_LOOK_SECONDS = 1.0  # for as long as we serve


class CannotServe(ValueError):  # noqa: N818
    """What was asked for cannot be served here. The message says why and what to do."""


def run(configs: Sequence[ModelConfig], options: Options) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises ConfigError, DoesNotFit, CannotListen, CannotReplace and CannotServe, with nothing left running."""
    import uvloop

    logs.set_up(options.log_level, options.log_format)
    try:
        KeyRing(options.api_keys, options.api_key_file)  # errors in it are said before anything starts
    except BadKeyFile as error:
        raise CannotServe(str(error)) from None
    configs = [modelfit.with_fallback(config) for config in configs]
    if clashes := check.name_clashes(configs):
        raise ConfigError(clashes)
    placement = check.fit(configs, config_devices.this_machine())
    for warning in (*(w for config in configs for w in config.warnings), *placement.warnings):
        log.warning(warning)
    door = _open_door(options)
    specs = [torchrun_group(group.name, group.config, group.devices) for group in placement.groups]
    log_dir = options.log_dir or default_log_dir(door.listener.getsockname()[1])
    supervisor = Supervisor(specs, log_dir)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Service(configs, options, supervisor, door, log_dir).run())


@dataclass(frozen=True, slots=True)
class _Door:
    """Where clients come in. When others hold the listener too, or will, its queue is not ours alone: we do
    not accept from it before we can answer, nor once we are to end."""

    listener: socket.socket
    from_systemd: bool = False
    predecessor: handover.Predecessor | None = None

    @property
    def is_shared(self) -> bool:
        return self.from_systemd or self.predecessor is not None


def _open_door(options: Options) -> _Door:
    if (passed := from_systemd()) is not None:
        return _Door(passed, from_systemd=True)
    if options.replace and (found := handover.find_predecessor(options.host, options.port)) is not None:
        return _Door(found.listener, predecessor=found)
    return _Door(listen(options.host, options.port))


def default_log_dir(port: int) -> Path:
    """Where the ranks' logs go: a directory of the user's for each port, so that gateways do not mix."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "sluice" / str(port)


def admin_socket(log_dir: Path) -> Path:
    """Where the gateway that logs there can be administered."""
    return log_dir / "admin" / "socket"


class _Service:
    """One run of the gateway: start the groups, serve, drain, end."""

    def __init__(
        self,
        configs: Sequence[ModelConfig],
        options: Options,
        supervisor: Supervisor,
        door: _Door,
        log_dir: Path,
    ) -> None:
        self._configs, self._options, self._log_dir = configs, options, log_dir
        self._supervisor, self._door = supervisor, door
        self._gateway: Gateway | None = None  # until it has been made
        self._groups = supervisor.groups
        self._failures: list[str] = []
        self._say = console.teller(options.log_format)
        self._settled = asyncio.Event()  # every group is ready, or failed for good

    async def run(self) -> None:
        """Raises CannotServe when a model cannot be served here, or none of the groups can start."""
        ending = _Signals()
        for line in _banner(self._configs):
            self._say(line)
        self._start_groups()
        try:
            # The web framework is imported while the groups' processes start.
            server = await asyncio.to_thread(self._make_server)
            async with (
                handover.offer(self._door.listener) as taken,
                self._administered(ending),
                asyncio.TaskGroup() as tasks,
            ):
                serving = tasks.create_task(self._serve(server))
                announcing = tasks.create_task(self._announce(server, ending))
                await _first_of(ending.first.wait(), taken.wait())
                announcing.cancel()
                notify_systemd("STOPPING=1")
                await self._leave(server, ending, has_heir=taken.is_set() or self._door.from_systemd)
                server.should_exit = True
                if not server.started:
                    serving.cancel()
        except BaseException:
            await self._supervisor.stop(0.0)
            raise
        if self._failures:
            raise CannotServe("\n".join(self._failures))
        self._say("stopped")

    async def _serve(self, server: Server) -> None:
        """Answer, from the start on if nobody else can: a probe shall see how far the loading is."""
        if self._door.is_shared:
            await self._until_answers()
        await server.serve(sockets=[self._door.listener])

    async def _until_answers(self) -> None:
        """Until we have an answer for every model; to take over from a predecessor, with all our groups."""
        if self._door.predecessor is not None:
            await self._settled.wait()
        while not all(_has_answer(self._groups, config) for config in self._configs):
            await asyncio.sleep(_LOOK_SECONDS)

    def _start_groups(self) -> None:
        try:
            self._supervisor.start()
        except OSError as error:
            raise CannotServe(f"{error.filename}: {error.strerror}; choose another with --log-dir") from None

    def _make_server(self) -> Server:
        """Raises CannotServe when a model's tokenizer or template cannot be used."""
        from gateway.app import create_app
        from gateway.http_server import make_server

        try:
            models = [
                _served_model(config, self._groups, self._options.recovery_wait) for config in self._configs
            ]
            app = create_app(self._options, models)
        except (OSError, ValueError) as error:
            raise CannotServe(str(error)) from error
        self._gateway = app.state.gateway
        settle()
        return make_server(app, flush_seconds=_FLUSH_SECONDS)

    @contextlib.asynccontextmanager
    async def _administered(self, ending: _Signals) -> AsyncIterator[None]:
        """Within the context, `sluice admin` finds us."""
        from gateway import admin

        assert self._gateway is not None
        app = admin.create_admin_app(admin.Control(self._gateway, self._groups, ending.end))
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(admin.listening(app, admin_socket(self._log_dir)))
            except admin.CannotAdminister as error:
                log.warning("%s", error)
            yield

    async def _announce(self, server: Server, ending: _Signals) -> None:
        """Show the groups' progress; say when they are ready. When none is or will be, there is nothing to
        serve."""
        with console.display(self._options.log_format) as display:
            await console.watch(self._groups, display)
        failures = self._failures_now()
        if len(failures) == len(self._groups) or (failures and self._door.predecessor is not None):
            self._failures = failures
            ending.end()
            return
        for failure in failures:
            log.error(failure)
        if any(group.state is GroupState.READY for group in self._groups):
            self._settled.set()
            await self._take_over(server)
            names = ", ".join(_describe(config) for config in self._configs)
            url = url_of(self._door.listener)
            chat = f"; chat at {url.removesuffix('v1')}" if self._options.page else ""
            self._say(f"ready on {url} ({names}){chat}")
            self._failures = await self._until_all_failed()
            ending.end()

    async def _until_all_failed(self) -> list[str]:
        """Why each of them did. Whoever watches over this process can do what it cannot: start it anew."""
        while len(failures := self._failures_now()) < len(self._groups):
            await asyncio.sleep(_FAILURE_LOOK_SECONDS)
        return failures

    def _failures_now(self) -> list[str]:
        """Of the groups that have failed for good, why each did."""
        failed = (group for group in self._groups if group.state is GroupState.FAILED)
        return [f"{group.name}: {group.failure}" for group in failed]

    async def _take_over(self, server: Server) -> None:
        """Tell whoever waits for it that we accept."""
        while not server.started:
            await asyncio.sleep(_LOOK_SECONDS)
        if self._door.predecessor is not None:
            self._door.predecessor.dismiss()
        notify_systemd("READY=1")

    async def _leave(self, server: Server, ending: _Signals, *, has_heir: bool) -> None:
        """Until what runs has ended, the grace is over, or a second signal comes.

        With an heir to the listener, new connections are the heir's, and what comes over those that we have
        is answered. Without one we go on accepting, to refuse in words."""
        from gateway import leaving

        ends_at = time.monotonic() + self._options.grace
        self._say_what_runs("another gateway has taken over; " if has_heir else "")
        if server.started:
            leaving.close_after_answers(server)
        if server.started and has_heir:
            leaving.stop_accepting(server)
            unused = leaving.until_unused(server)
            await _first_of(unused, ending.second.wait(), timeout=self._options.grace)
        await _first_of(
            self._empty_queues(), ending.second.wait(), timeout=max(0.0, ends_at - time.monotonic())
        )
        grace = max(0.0, ends_at - time.monotonic())
        await _first_of(self._supervisor.stop(grace), ending.second.wait())

    async def _empty_queues(self) -> None:
        """Whoever waits for a place in a group still gets it; nobody new does."""
        admissions = self._gateway.admissions.values() if self._gateway is not None else ()
        for admission in admissions:
            admission.close()
        for admission in admissions:
            await admission.wait_until_empty()

    def _say_what_runs(self, why: str) -> None:
        running = sum(group.num_outstanding for group in self._groups)
        if running:
            running_ones = "1 sequence has" if running == 1 else f"{running} sequences have"
            log.info("%s%s %g s to end; signal again to hurry", why, running_ones, self._options.grace)


async def _first_of(*waits: Coroutine[Any, Any, object], timeout: float | None = None) -> None:
    """Until one of them returns, or the time is up; the others are cancelled, and have ended on return."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _has_answer(groups: Sequence[Group], config: ModelConfig) -> bool:
    """The model can be asked, or it is certain that it never can."""
    states = [group.state for group in groups if group.config.model_name == config.model_name]
    return GroupState.READY in states or all(state is GroupState.FAILED for state in states)


class _Signals:
    """`first` and `second` are set as SIGTERM or SIGINT come."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)

    def end(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def _served_model(config: ModelConfig, groups: Sequence[Group], recovery_wait: float) -> ServedModel:
    from gateway.router import load_served_model

    name, *aliases = config.served_model_names
    model = load_served_model(
        Path(config.model_path),
        name=name,
        aliases=tuple(aliases),
        groups=[group for group in groups if group.config.model_name == config.model_name],
        created=int(time.time()),
        max_queued=config.job_queue_size,
        recovery_wait=recovery_wait,
        chat_template=Path(config.chat_template) if config.chat_template else None,
        tool_format=config.tool_format,
        reasoning_format=config.reasoning_format,
        pooling=config.pooling,
    )
    if model.template is not None:
        model.template.start()
    return model


def _banner(configs: Sequence[ModelConfig]) -> Iterator[str]:
    yield f"Sluice {version('sluice')}"
    for config in configs:
        sizes = f"{config.parallel_type}, {config.world_size} rank{'s' if config.world_size > 1 else ''}"
        groups = f"{config.num_replicas} x " if config.num_replicas > 1 else ""
        names = ", ".join(config.served_model_names)
        yield f"  {names}: {groups}{config.engine} engine, {sizes} on {config.device}"
        if model_source.is_demo(config):
            yield "  This is a demo model, made for trying Sluice. A real one: sluice serve MODEL_DIR"


def _describe(config: ModelConfig) -> str:
    demo = "; demo model" if model_source.is_demo(config) else ""
    return config.served_model_names[0] + demo
