"""uvicorn, with its parser and loop chosen, our bounds on connections, and its signal handling left to us."""

from __future__ import annotations

import functools
import logging
import resource
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from gateway.errors import APIError
from gateway.http_connection import ClientConnection
from gateway.routes.common import Gateway

log = logging.getLogger(__name__)

_OTHER_DESCRIPTORS = 256
"""Descriptors for what is not a client: groups, logs, the loop."""


class Server(uvicorn.Server):
    """Ends when `should_exit` is set, never by a signal of its own."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def make_server(app: FastAPI, *, flush_seconds: int) -> Server:
    """A server for `app`, with the limits of its settings. After `should_exit`, answers have `flush_seconds`
    to end."""
    gateway: Gateway = app.state.gateway
    settings = gateway.settings
    make_room(settings.max_connections)

    def count(error: APIError) -> None:
        gateway.metrics.errors[error.label] += 1

    config = uvicorn.Config(
        app,
        http=functools.partial(ClientConnection, settings=settings, on_refusal=count),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,  # it has clients' addresses and queries; ours is in auth.py
        server_header=False,
        timeout_keep_alive=settings.idle_timeout,  # type: ignore[arg-type]
        timeout_graceful_shutdown=flush_seconds,
    )
    return Server(config)


def make_room(max_connections: int) -> None:
    """Raise this process's limit on descriptors so far as the system allows and the connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + max_connections // 8 + _OTHER_DESCRIPTORS
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft not in (resource.RLIM_INFINITY, possible) and soft < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < wanted:
        log.warning(
            "the system allows %d open files: too few for %d connections; raise it (ulimit -n %d) or"
            " lower --max-connections",
            possible,
            max_connections,
            wanted,
        )
