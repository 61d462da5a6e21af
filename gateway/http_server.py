"""uvicorn, with its parser and loop chosen and its signal handling left to us."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

KEEP_ALIVE_SECONDS = 75


class Server(uvicorn.Server):
    """Ends when `should_exit` is set, never by a signal of its own."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def make_server(app: FastAPI, *, access_log: bool, flush_seconds: int) -> Server:
    """A server for `app`. After `should_exit`, answers have `flush_seconds` to end."""
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        log_config=None,
        access_log=access_log,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=flush_seconds,
    )
    return Server(config)
