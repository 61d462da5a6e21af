"""A chat template's rendering, bounded in time, memory and size: the gateway's end of a render process."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence

from gateway.prompt.render_process import LENGTH
from gateway.prompt.template import ChatTemplate, TemplateRefused

RENDER_SECONDS = 1.0
"""Processor time for one conversation; templates take milliseconds."""
_STUCK_SECONDS = 60.0  # by the clock: the process does not even get to run
_MAX_REPLY = 256 << 20


class Renderer:
    """Renders one template. Its process starts with the first conversation, or with `start`, and ends with
    this object; when a conversation kills it, the next one has another."""

    def __init__(self, template: ChatTemplate, seconds: float = RENDER_SECONDS) -> None:
        self._template, self._seconds = template, seconds
        self._process: _Process | None = None
        self._lock = asyncio.Lock()

    def start(self) -> None:
        """So that the first conversation need not wait."""
        self._process = self._process or self._new_process()

    async def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that asks for the next message. Raises TemplateRefused."""
        async with self._lock:
            process = self._process or self._new_process()
            self._process = None  # unless it is fit for another one
            try:
                async with asyncio.timeout(_STUCK_SECONDS):
                    result = await process.ask(list(messages))
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                process.end()
                raise TemplateRefused(
                    f"the model's chat template took more than {self._seconds:g} s or too much memory"
                    " on these messages"
                ) from error
            except BaseException:
                process.end()
                raise
            self._process = process
        if "refused" in result:
            raise TemplateRefused(result["refused"])
        return result["text"]

    def _new_process(self) -> _Process:
        template = self._template
        job = {"source": template.source, "special_tokens": template.special_tokens, "seconds": self._seconds}
        return _Process(_frame(job))


class _Process:
    def __init__(self, job: bytes) -> None:
        self._sock, theirs = socket.socketpair()
        with theirs:
            popen = subprocess.Popen(
                [sys.executable, "-m", "gateway.prompt.render_process"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the gateway's
            )
        self.end = weakref.finalize(self, _end, popen, self._sock)
        self._sock.setblocking(False)
        self._unsent = job  # goes out with the first question: here nobody can wait

    async def ask(self, messages: list[Mapping[str, str]]) -> dict[str, str]:
        """Raises OSError or EOFError when the process has been killed, ValueError when it babbles."""
        loop = asyncio.get_running_loop()
        question, self._unsent = self._unsent + _frame(messages), b""
        await loop.sock_sendall(self._sock, question)
        (length,) = LENGTH.unpack(await self._read(LENGTH.size))
        if length > _MAX_REPLY:
            raise ValueError("an endless reply")
        result = json.loads(await self._read(length))
        if not isinstance(result, dict):
            raise ValueError("no reply of ours")
        return result

    async def _read(self, num_bytes: int) -> bytes:
        loop = asyncio.get_running_loop()
        content = bytearray()
        while len(content) < num_bytes:
            part = await loop.sock_recv(self._sock, min(num_bytes - len(content), 1 << 20))
            if not part:
                raise EOFError
            content += part
        return bytes(content)


def _frame(content: object) -> bytes:
    body = json.dumps(content, ensure_ascii=False).encode()
    return LENGTH.pack(len(body)) + body


def _end(popen: subprocess.Popen[bytes], sock: socket.socket) -> None:
    sock.close()
    popen.kill()
    popen.wait()
