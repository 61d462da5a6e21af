"""A helper process's own end: it answers questions within bounds that the kernel enforces.

Its standard input is a socket. Frames are a 4-byte big-endian length and JSON. The first is the job; then
questions come in and answers, JSON objects, go out, one each.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any

MAX_MEMORY = 1 << 30
LENGTH = struct.Struct(">I")


def answer_questions(begin: Callable[[Any], Callable[[Any], dict[str, Any]]]) -> None:
    """`begin(job)` gives the function that answers; an empty answer says that it has. A question may take the
    job's "seconds" of processor time, then SIGPROF ends the process. Returns when the gateway ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with socket.socket(fileno=0) as sock, sock.makefile("rb") as questions:
        job = _read(questions)
        answer = begin(job)
        _write(sock, {})
        while (question := _read(questions)) is not None:
            # of this process's own time: a busy machine kills nobody
            signal.setitimer(signal.ITIMER_PROF, job["seconds"])
            content = answer(question)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _write(sock, content)


def _write(sock: socket.socket, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    sock.sendall(LENGTH.pack(len(body)) + body)


def _read(questions: Any) -> Any:
    head = questions.read(LENGTH.size)
    return json.loads(questions.read(*LENGTH.unpack(head))) if len(head) == LENGTH.size else None
