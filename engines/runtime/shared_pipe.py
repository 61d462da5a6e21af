"""Hidden states from a stage to the next on the same CPU, through memory that both have.

gloo asks the receiver before it sends, and its threads, which answer, wait for a core while both ranks
compute: up to 4 ms, a tick of the system's clock, in steps of 14. Here the sender writes and goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engines.runtime.shared_memory import LINE, PAGE, comes_true, map_file

_CAPACITY = 4 << 20
"""Bytes on the way, at most: whoever sends more waits for the receiver to take them piece by piece."""
_SENT, _TAKEN = 0, LINE


class SharedPipe:
    """One end. What one process sends the other receives, in that order. Either counts the bytes that it has
    sent or taken so far, after it has written or read them: see shared_memory.is_supported.

    `path` is a file that both open and the first creates; who started the group removes it. Raises OSError
    when it cannot be made, TimeoutError when the other end does nothing for `timeout` seconds.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        memory = map_file(path, PAGE + _CAPACITY)
        self._counters = memoryview(memory)[:PAGE].cast("q")
        self._ring = torch.frombuffer(memory, dtype=torch.uint8, offset=PAGE)
        self._timeout = timeout

    def send(self, x: Tensor) -> None:
        """`x` must be contiguous."""
        data, done = x.view(-1).view(torch.uint8), 0
        while done < len(data):
            self._wait(lambda: self._num_on_the_way < _CAPACITY)
            sent, room = self._counters[_SENT], _CAPACITY - self._num_on_the_way
            piece = self._piece(sent, min(room, len(data) - done))
            piece.copy_(data[done : done + len(piece)])
            done += len(piece)
            self._counters[_SENT] = sent + len(piece)

    def receive(self, out: Tensor) -> None:
        """Fill `out`, contiguous, of the size of what was sent."""
        data, done = out.view(-1).view(torch.uint8), 0
        while done < len(data):
            self._wait(lambda: self._num_on_the_way > 0)
            taken = self._counters[_TAKEN]
            piece = self._piece(taken, min(self._num_on_the_way, len(data) - done))
            data[done : done + len(piece)].copy_(piece)
            done += len(piece)
            self._counters[_TAKEN] = taken + len(piece)

    @property
    def _num_on_the_way(self) -> int:
        """Bytes. It only falls for the sender meanwhile, and only grows for the receiver."""
        return self._counters[_SENT] - self._counters[_TAKEN]

    def _piece(self, position: int, size: int) -> Tensor:
        """From there on, as far as it goes without a turn of the ring."""
        start = position % _CAPACITY
        return self._ring[start : start + size]

    def _wait(self, condition: Callable[[], bool]) -> None:
        if not comes_true(condition, self._timeout):
            raise TimeoutError(f"the other stage neither sent nor took anything for {self._timeout:g} s")
