"""Work on what somebody else wrote, bounded in time and memory: the gateway's end of a helper process.

A thread could not be stopped; a process can, and the kernel does it. See gateway/helper_process.py.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import weakref
from typing import Any

from gateway.helper_process import LENGTH

_STUCK_SECONDS = 60.0  # by the clock: the process does not even get to run
_MAX_REPLY = 256 << 20


class HelperKilled(Exception):  # noqa: N818
    """A question took more time or memory than the helper has."""


class HelperUnavailable(Exception):  # noqa: N818
    """The helper process could not be started, or did not get to run: no fault of the question's."""


class Helper:
    """Asks a process that runs `module`, one question at a time. The process starts with the first one, or
    with `start`, and ends with this object; when a question kills it, the next one has another."""

    def __init__(self, module: str, job: object) -> None:
        """`job` is what the process is told first, as JSON."""
        self._module, self._job = module, _frame(job)
        self._process: _Process | None = None
        self._lock = asyncio.Lock()

    def start(self) -> None:
        """So that the first question need not wait."""
        self._process = self._process or self._new_process()

    async def ask(self, question: object) -> dict[str, Any]:
        """The answer. Raises HelperKilled, HelperUnavailable."""
        async with self._lock:
            process = self._process or self._new_process()
            self._process = None  # unless it is fit for another one
            try:
                async with asyncio.timeout(_STUCK_SECONDS):
                    answer = await process.ask(question)
            except TimeoutError as error:
                process.end()
                raise HelperUnavailable(f"{self._module} did not run for {_STUCK_SECONDS:g} s") from error
            except (OSError, EOFError, ValueError) as error:
                process.end()
                raise HelperKilled from error
            except BaseException:
                process.end()
                raise
            self._process = process
        return answer

    def _new_process(self) -> _Process:
        try:
            return _Process(self._module, self._job)
        except OSError as error:
            raise HelperUnavailable(f"{self._module} cannot be started: {error}") from error


class _Process:
    def __init__(self, module: str, job: bytes) -> None:
        self._sock, theirs = socket.socketpair()
        try:
            popen = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the gateway's
            )
        except OSError:
            self._sock.close()
            raise
        finally:
            theirs.close()
        self.end = weakref.finalize(self, _end, popen, self._sock)
        self._sock.setblocking(False)
        self._unsent = job  # goes out with the first question: here nobody can wait

    async def ask(self, question: object) -> dict[str, Any]:
        """Raises OSError or EOFError when the question has killed the process, ValueError when it babbles,
        HelperUnavailable when it ended before it was ready for any."""
        if self._unsent:
            await self._begin()
        await asyncio.get_running_loop().sock_sendall(self._sock, _frame(question))
        return await self._answer()

    async def _begin(self) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self._sock, self._unsent)
            await self._answer()
        except (OSError, EOFError, ValueError) as error:
            raise HelperUnavailable("the helper process has ended while it started") from error
        self._unsent = b""

    async def _answer(self) -> dict[str, Any]:
        """One reply, which mostly is there in one piece: each read waits for a turn of a busy loop."""
        loop, content, end = asyncio.get_running_loop(), bytearray(), LENGTH.size
        while len(content) < end:
            part = await loop.sock_recv(self._sock, 1 << 20)
            if not part:
                raise EOFError
            content += part
            if len(content) >= LENGTH.size:
                end = LENGTH.size + LENGTH.unpack_from(content)[0]
                if end > _MAX_REPLY:
                    raise ValueError("an endless reply")
        answer = json.loads(content[LENGTH.size :])
        if not isinstance(answer, dict):
            raise ValueError("no reply of ours")
        return answer


def _frame(content: object) -> bytes:
    body = json.dumps(content, ensure_ascii=False).encode()
    return LENGTH.pack(len(body)) + body


def _end(popen: subprocess.Popen[bytes], sock: socket.socket) -> None:
    sock.close()
    popen.kill()
    popen.wait()
