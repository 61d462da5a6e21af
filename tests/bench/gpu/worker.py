"""A process that runs sections: one that hangs can be ended, and one whose device has failed be replaced."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

from tests.bench.gpu.bench import Bench, Found, reason
from tests.bench.gpu.options import Options
from tests.bench.gpu.timing import release

Put = Callable[[str, str, Any], None]
"""Of a section, a part and its value."""

_SPAWN = get_context("spawn")  # a process that was forked cannot use CUDA


@dataclass(frozen=True, slots=True)
class Section:
    """`where` names a function of a Bench, as "module:function". Sections of one `process` follow each other
    in one, and have at most so many `seconds`."""

    where: str
    process: str
    seconds: float


class Worker:
    """Runs one section after another, each when it is told to."""

    def __init__(self, options: Options, found: Found) -> None:
        self._pipe, other = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_work, args=(options, found, other))
        self._process.start()
        other.close()  # so that the end of the process is the end of the pipe

    def run(self, name: str, section: Section, seconds: float, put: Put) -> bool:
        """Whether the process can run others afterwards; else it is to be ended."""
        ends = monotonic() + seconds
        try:
            self._pipe.send((name, section, seconds))
            while self._pipe.poll(max(0.0, ends - monotonic())):
                message = self._pipe.recv()
                if isinstance(message, bool):
                    return message
                put(name, *message)
        except (EOFError, OSError):
            self._process.join(5)
            put(name, "error", f"its process has ended with status {self._process.exitcode}")
            return False
        put(name, "error", f"not done after {seconds:.0f} s")
        self._kill()
        return False

    def end(self) -> None:
        """Let it end, or make it."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        self._kill()
        self._pipe.close()

    def _kill(self) -> None:
        """It and the processes that it has started."""
        if self._process.is_alive() and self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()


def _work(options: Options, found: Found, pipe: Connection) -> None:
    os.setsid()
    bench = Bench(options, found, lambda *part: pipe.send(part))
    with suppress(EOFError):  # the command is gone
        while (told := pipe.recv()) is not None:
            pipe.send(_run(bench, *told))


def _run(bench: Bench, name: str, section: Section, seconds: float) -> bool:
    """Whether the device can be used further."""
    bench.begin(name, seconds)
    try:
        module, _, function = section.where.partition(":")
        getattr(importlib.import_module(module), function)(bench)
    except (Exception, SystemExit) as error:
        for kind, text in reason(error).items():
            bench.put(kind, text)
    try:
        release(bench.device)
    except Exception as error:  # of the device: whatever CUDA raises once a kernel has failed
        traceback.print_exception(error, file=sys.stderr)
        return False
    return True
