"""What a conversion tells while it runs: bars for people, JSON lines for programs, plain lines for files."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Protocol, TextIO

from conversion.sizes import shown_bytes, shown_speed


class Progress(Protocol):
    """Called from several threads."""

    def start(self, file: str, num_bytes: int) -> None: ...

    def advance(self, file: str, num_bytes: int) -> None: ...

    def finish(self, file: str, sha256: str) -> None: ...


class Silent:
    """Says nothing."""

    def start(self, file: str, num_bytes: int) -> None:
        """Nothing."""

    def advance(self, file: str, num_bytes: int) -> None:
        """Nothing."""

    def finish(self, file: str, sha256: str) -> None:
        """Nothing."""


class JsonLines:
    """An object a line: the plan, file started, file finished; progress of all at most once a second."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream, self._lock, self._total = stream, Lock(), total
        self._begin, self._done, self._last = time.monotonic(), 0, 0.0
        self._say(event="plan", bytes=total)

    def start(self, file: str, num_bytes: int) -> None:
        self._say(event="start", file=file, bytes=num_bytes)

    def advance(self, file: str, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if now - self._last < 1:
                return
            self._last = now
            seconds, done = now - self._begin, self._done
        left = (self._total - done) * seconds / done
        self._say(event="progress", bytes=done, seconds=round(seconds, 3), seconds_left=round(left, 3))

    def finish(self, file: str, sha256: str) -> None:
        self._say(event="finish", file=file, sha256=sha256)

    def _say(self, **what: object) -> None:
        with self._lock:
            print(json.dumps(what), file=self._stream, flush=True)


class Lines:
    """Plain lines of all: every ten seconds, or every tenth of it where that takes longer than a second."""

    def __init__(self, stream: TextIO, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._lock, self._total, self._clock = stream, Lock(), total, clock
        self._begin = self._last = clock()
        self._done = self._shown = 0

    def start(self, file: str, num_bytes: int) -> None:
        """Nothing: there may be hundreds of files."""

    def advance(self, file: str, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            now = self._clock()
            is_tenth = 10 * (self._done - self._shown) >= self._total and now - self._last >= 1
            if self._done and (is_tenth or now - self._last >= 10):
                self._show(now)

    def finish(self, file: str, sha256: str) -> None:
        """Nothing."""

    def _show(self, now: float) -> None:
        self._last, self._shown = now, self._done
        done, total, seconds = self._done, self._total, now - self._begin
        left = (total - done) * seconds / done
        written = f"{shown_bytes(done)} of {shown_bytes(total)}, {shown_speed(done, seconds)}"
        print(f"  {done / total:.0%}: {written}, {left:.0f} s left", file=self._stream, flush=True)


class Bars:
    """A bar for each file that is being written and one for all, with time left and speed."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self.bars = Progress(*columns, transient=True, console=Console(stderr=True))
        self._all = self.bars.add_task("all", total=total)
        self._tasks = {"": self._all}

    def start(self, file: str, num_bytes: int) -> None:
        self._tasks[file] = self.bars.add_task(file, total=num_bytes)

    def advance(self, file: str, num_bytes: int) -> None:
        self.bars.advance(self._tasks[file], num_bytes)
        self.bars.advance(self._all, num_bytes)

    def finish(self, file: str, sha256: str) -> None:
        self.bars.remove_task(self._tasks.pop(file))


@contextmanager
def shown(total: int, as_json: bool) -> Iterator[Progress]:
    """The progress that fits: JSON where asked for, bars on a terminal, else plain lines."""
    if as_json:
        yield JsonLines(sys.stdout, total)
    elif sys.stderr.isatty():
        bars = Bars(total)
        with bars.bars:
            yield bars
    else:
        yield Lines(sys.stderr, total)
