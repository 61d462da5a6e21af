"""A command under the guard (engines/guard.py), as a child of the gateway."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_END_SECONDS = 10.0  # a tree that SIGKILL does not end within this is stuck in the kernel


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute, the guard in front, and its whole environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


class GuardedProcess:
    """Started when made; `exited` resolves to the guard's exit code (that of the command, or 128 + n for a
    signal n; -n when the guard itself was killed). In a session of its own: Ctrl-C is the gateway's."""

    def __init__(self, command: Command, output: Path) -> None:
        with output.open("ab") as file:
            self._popen = subprocess.Popen(
                command.argv,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=dict(command.env),
                start_new_session=True,
            )
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._pidfd = os.pidfd_open(self._popen.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)

    @property
    def pid(self) -> int:
        """The guard's."""
        return self._popen.pid

    async def end(self) -> None:
        """Kill whatever is left and wait until it is gone."""
        if not self.exited.done():
            self._popen.terminate()
            self._popen.send_signal(signal.SIGCONT)  # a guard that somebody has stopped shall hear it
            await asyncio.wait([self.exited], timeout=_END_SECONDS)
        if not self.exited.done():
            log.error("processes under pid %d do not end after SIGKILL; left to the system", self.pid)
            self._popen.kill()
            await self.exited
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.exited.set_result(self._popen.wait())
