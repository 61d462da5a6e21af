"""Renders one chat template in a process of its own: `python -m gateway.prompt.render_process`, on a socket
as standard input.

A template is a program of whoever made the model, so it gets a share of time and memory that the kernel
enforces: a thread could not be stopped, and a sandbox cannot tell what `10 ** 10 ** 8` will take.

Frames are a 4-byte big-endian length and JSON. The first says what to render; then conversations come in and
results go out, one each: {"text": ...} or {"refused": ...}.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import struct
from typing import Any

from gateway.prompt.template import ChatTemplate, TemplateRefused

MAX_MEMORY = 1 << 30
LENGTH = struct.Struct(">I")


def main() -> None:
    """Ends when the gateway does, or killed by SIGPROF when a rendering takes too long."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with socket.socket(fileno=0) as sock, sock.makefile("rb") as requests:
        job = _read(requests)
        template = ChatTemplate(job["source"], job["special_tokens"])
        while (messages := _read(requests)) is not None:
            result = _render(template, messages, job["seconds"])
            body = json.dumps(result).encode()
            sock.sendall(LENGTH.pack(len(body)) + body)


def _read(requests: Any) -> Any:
    head = requests.read(LENGTH.size)
    return json.loads(requests.read(*LENGTH.unpack(head))) if len(head) == LENGTH.size else None


def _render(template: ChatTemplate, messages: list[dict[str, str]], seconds: float) -> dict[str, str]:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of this process's own time: a busy machine kills nobody
    try:
        return {"text": template.render(messages)}
    except TemplateRefused as error:
        return {"refused": str(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
