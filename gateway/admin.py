"""The admin surface: HTTP over a unix socket that only this user can reach. Nothing of it is on the TCP port.

The socket has mode 0600 and lies in a directory with mode 0700; whoever can connect may do everything here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.http_server import Server
from gateway.keys import BadKeyFile
from gateway.routes.common import Gateway
from gateway.workers.group import Group

log = logging.getLogger(__name__)

_BACKLOG = 16


class CannotAdminister(Exception):  # noqa: N818
    """There can be no admin socket at this path. The message says why."""


@dataclass(frozen=True, slots=True)
class Control:
    """What can be looked at and done. `drain` is what SIGTERM does."""

    gateway: Gateway
    groups: Sequence[Group]
    drain: Callable[[], None]


class GroupState(msgspec.Struct, frozen=True):
    name: str
    state: str
    outstanding: int
    restarts: int
    failure: str | None


class ModelState(msgspec.Struct, frozen=True):
    model: str
    ready: bool
    queued: int


class KeyState(msgspec.Struct, frozen=True):
    name: str
    requests: int


class Status(msgspec.Struct, frozen=True):
    pid: int
    models: list[ModelState]
    groups: list[GroupState]
    keys: list[KeyState]  # none: everybody may ask


class Done(msgspec.Struct, frozen=True):
    done: str


class Refused(msgspec.Struct, frozen=True):
    error: str


def create_admin_app(control: Control) -> Starlette:
    """GET /status; POST /drain, /reload-keys and /groups/NAME/restart."""

    async def status(_: Request) -> Response:
        return _json(_status(control))

    async def drain(_: Request) -> Response:
        control.drain()
        return _json(Done("drains: what runs may end, nothing new is taken"))

    async def reload_keys(_: Request) -> Response:
        try:
            control.gateway.keys.reload()
        except BadKeyFile as error:
            log.warning("%s; the keys stay as they were", error)
            return _json(Refused(f"{error}; the keys stay as they were"), 422)
        log.info("keys were read again: %d", len(control.gateway.keys))
        return _json(Done(f"{len(control.gateway.keys)} keys"))

    async def restart(request: Request) -> Response:
        name = request.path_params["name"]
        group = next((group for group in control.groups if group.name == name), None)
        if group is None:
            names = ", ".join(group.name for group in control.groups)
            return _json(Refused(f"no group is named {name}; there are: {names}"), 404)
        if not group.restart("restarted by the administrator"):
            states = "only one that is ready, or has failed for good, is restarted"
            return _json(Refused(f"{name} is {group.state.value}: {states}"), 409)
        return _json(Done(f"{name} restarts; its streams go on when it is ready, or elsewhere"))

    return Starlette(
        routes=[
            Route("/status", status),
            Route("/drain", drain, methods=["POST"]),
            Route("/reload-keys", reload_keys, methods=["POST"]),
            Route("/groups/{name:path}/restart", restart, methods=["POST"]),
        ]
    )


def _status(control: Control) -> Status:
    gateway = control.gateway
    models = [
        ModelState(model.name, model.is_ready, gateway.admissions[model.name].num_waiting)
        for model in gateway.router.models
    ]
    groups = [
        GroupState(group.name, group.state.value, group.num_outstanding, group.num_restarts, group.failure)
        for group in control.groups
    ]
    keys = [KeyState(tenant.name, tenant.num_requests) for tenant in gateway.keys.tenants]
    return Status(os.getpid(), models, groups, keys)


def _json(content: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


@contextlib.asynccontextmanager
async def listening(app: Starlette, path: Path) -> AsyncIterator[None]:
    """Serves `app` at `path` within the context. One that was there before is replaced, not waited for.

    Raises CannotAdminister."""
    listener = _listen(path)
    ours = os.stat(path).st_ino
    server = Server(uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.wait([serving])
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == ours:  # else it is our successor's
                os.unlink(path)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_directory(path.parent)
        new.unlink(missing_ok=True)
        listener.bind(os.fspath(new))
        new.chmod(0o600)
        listener.listen(_BACKLOG)
        new.replace(path)
    except OSError as error:
        listener.close()
        raise CannotAdminister(f"no admin socket at {path}: {error.strerror or error}") from None
    except CannotAdminister:
        listener.close()
        raise
    return listener


def _check_directory(directory: Path) -> None:
    status = directory.lstat()
    is_private = stat.S_IMODE(status.st_mode) == 0o700 and status.st_uid == os.geteuid()
    if not stat.S_ISDIR(status.st_mode) or not is_private:
        raise CannotAdminister(f"no admin socket: {directory} is not a directory for this user only (0700)")
