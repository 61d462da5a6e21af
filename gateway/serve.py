"""The gateway's composition root: configurations to groups, an app and a listening server; and its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from engines import config_devices
from engines.config import ConfigError, ModelConfig
from gateway import check, console, model_source
from gateway.workers.group import Group
from gateway.workers.protocol import GroupState
from gateway.workers.supervisor import Supervisor, torchrun_group

if TYPE_CHECKING:
    from gateway.http_server import Server
    from gateway.router import ServedModel

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 5  # for answers to reach their clients once every sequence has ended
_BACKLOG = 2048
_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class CannotServe(ValueError):  # noqa: N818
    """What was asked for cannot be served here. The message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is not about a model. `grace` in seconds; port 0 is any free one."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    grace: float = 30.0
    log_level: str = "info"
    log_dir: Path | None = None
    access_log: bool = False


def run(configs: Sequence[ModelConfig], options: Options) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises ConfigError, DoesNotFit and CannotServe, with nothing left running."""
    import uvloop

    _set_up_logging(options)
    if clashes := check.name_clashes(configs):
        raise ConfigError(clashes)
    placement = check.fit(configs, config_devices.this_machine())
    for warning in (*(w for config in configs for w in config.warnings), *placement.warnings):
        log.warning(warning)
    listener = listen(options.host, options.port)
    specs = [torchrun_group(group.name, group.config, group.devices) for group in placement.groups]
    supervisor = Supervisor(specs, options.log_dir or default_log_dir(listener.getsockname()[1]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Service(configs, options, supervisor, listener).run())


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Clients that come early wait in its queue until the app is there.

    Raises CannotServe."""
    remedy = "choose another with --port (0: any free one) or --host"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise CannotServe(f"cannot listen on {host}:{port}: {error.strerror}; {remedy}") from None
    sock = socket.socket(family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise CannotServe(f"cannot listen on {host}:{port}: {error.strerror}; {remedy}") from None
    return sock


def default_log_dir(port: int) -> Path:
    """Where the ranks' logs go: a directory of the user's for each port, so that gateways do not mix."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "sluice" / str(port)


def url_of(listener: socket.socket) -> str:
    """The API's base address, as a client on this machine would write it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class _Service:
    """One run of the gateway: start the groups, serve, drain, end."""

    def __init__(
        self,
        configs: Sequence[ModelConfig],
        options: Options,
        supervisor: Supervisor,
        listener: socket.socket,
    ) -> None:
        self._configs, self._options = configs, options
        self._supervisor, self._listener = supervisor, listener
        self._groups = supervisor.groups
        self._failures: list[str] = []

    async def run(self) -> None:
        """Raises CannotServe when a model cannot be served here, or none of the groups can start."""
        ending = _Signals()
        _print_banner(self._configs)
        self._start_groups()
        try:
            # The web framework is imported while the groups' processes start.
            server = await asyncio.to_thread(self._make_server)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(server.serve(sockets=[self._listener]))
                announcing = tasks.create_task(self._announce(ending))
                await ending.first.wait()
                announcing.cancel()
                await self._drain(ending)
                server.should_exit = True
        except BaseException:
            await self._supervisor.stop(0.0)
            raise
        if self._failures:
            raise CannotServe("\n".join(self._failures))
        print("stopped", flush=True)

    def _start_groups(self) -> None:
        try:
            self._supervisor.start()
        except OSError as error:
            raise CannotServe(f"{error.filename}: {error.strerror}; choose another with --log-dir") from None

    def _make_server(self) -> Server:
        """Raises CannotServe when a model's tokenizer or template cannot be used."""
        from gateway.app import create_app
        from gateway.http_server import make_server
        from gateway.settings import Settings

        settings = Settings(api_keys=self._options.api_keys)
        try:
            models = [_served_model(config, self._groups) for config in self._configs]
            app = create_app(settings, models)
        except (OSError, ValueError) as error:
            raise CannotServe(str(error)) from error
        return make_server(app, access_log=self._options.access_log, flush_seconds=_FLUSH_SECONDS)

    async def _announce(self, ending: _Signals) -> None:
        """Show the groups' progress; say when they are ready. When none can be, there is nothing to serve."""
        with console.display() as display:
            await console.watch(self._groups, display)
        failed = [group for group in self._groups if group.state is GroupState.FAILED]
        failures = [f"{group.name}: {group.failure}" for group in failed]
        if len(failed) == len(self._groups):
            self._failures = failures
            ending.end()
            return
        for failure in failures:
            log.error(failure)
        if any(group.state is GroupState.READY for group in self._groups):
            names = ", ".join(_describe(config) for config in self._configs)
            print(f"ready on {url_of(self._listener)} ({names})", flush=True)

    async def _drain(self, ending: _Signals) -> None:
        """Until every sequence has ended, the grace is over, or a second signal comes."""
        running = sum(group.num_outstanding for group in self._groups)
        if running:
            running_ones = "1 sequence has" if running == 1 else f"{running} sequences have"
            log.info("%s %g s to end; signal again to hurry", running_ones, self._options.grace)
        stopping = asyncio.create_task(self._supervisor.stop(self._options.grace))
        hurry = asyncio.create_task(ending.second.wait())
        await asyncio.wait([stopping, hurry], return_when=asyncio.FIRST_COMPLETED)
        for task in (stopping, hurry):
            task.cancel()
        await asyncio.wait([stopping, hurry])


class _Signals:
    """`first` and `second` are set as SIGTERM or SIGINT come."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)

    def end(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def _served_model(config: ModelConfig, groups: Sequence[Group]) -> ServedModel:
    from gateway.router import load_served_model

    name, *aliases = config.served_model_names
    return load_served_model(
        Path(config.model_path),
        name=name,
        aliases=tuple(aliases),
        groups=[group for group in groups if group.config.model_name == config.model_name],
        created=int(time.time()),
        max_queued=config.job_queue_size,
        chat_template=Path(config.chat_template) if config.chat_template else None,
    )


def _print_banner(configs: Sequence[ModelConfig]) -> None:
    print(f"Sluice {version('sluice')}")
    for config in configs:
        sizes = f"{config.parallel_type}, {config.world_size} rank{'s' if config.world_size > 1 else ''}"
        groups = f"{config.num_replicas} x " if config.num_replicas > 1 else ""
        names = ", ".join(config.served_model_names)
        print(f"  {names}: {groups}{config.engine} engine, {sizes} on {config.device}")
        if model_source.is_demo(config):
            print("  This is a demo model, made for trying Sluice. A real one: sluice serve MODEL_DIR")
    sys.stdout.flush()


def _describe(config: ModelConfig) -> str:
    demo = "; demo model" if model_source.is_demo(config) else ""
    return config.served_model_names[0] + demo


class _CurrentStderr:
    """Standard error as it is at each write: the progress bar puts itself in front of it for a while."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _set_up_logging(options: Options) -> None:
    handler = logging.StreamHandler(_CurrentStderr())
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler])
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
