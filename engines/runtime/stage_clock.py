"""How long each rank of a pipeline computes, where the leader can read it: numbers in a shared page.

Each is written by one rank only, and read whole: nothing is sent, and nobody waits for it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

_BYTES = 8  # a float64


class StageClock:
    """Seconds that a rank has computed: what the runner times, less the engine's waits for other stages.

    Host time: on a device that queues its work (CUDA) it says nothing about the device.
    """

    def __init__(self, cell: memoryview[float] | None = None) -> None:
        self._cell = memoryview(bytearray(_BYTES)).cast("d") if cell is None else cell

    @property
    def busy_seconds(self) -> float:
        return self._cell[0]

    def add(self, seconds: float) -> None:
        self._cell[0] += seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within what is added afterwards: this time does not count."""
        started = perf_counter()
        yield
        self._cell[0] -= perf_counter() - started


class StageClocks:
    """The clocks of all ranks of a group on this machine, in the file `path`, which any rank makes."""

    def __init__(self, path: Path, world_size: int) -> None:
        with path.open("a+b") as file:
            file.truncate(world_size * _BYTES)
            self._cells = memoryview(mmap.mmap(file.fileno(), world_size * _BYTES)).cast("d")

    def of(self, rank: int) -> StageClock:
        return StageClock(self._cells[rank : rank + 1])

    def of_stages(self, tp_size: int) -> Callable[[], list[float]]:
        """Reads the seconds of each stage, first to last, since this call: its tensor-parallel rank 0's."""
        before = self._cells.tolist()
        stages = range(len(before) - tp_size, -1, -tp_size)
        return lambda: [self._cells[rank] - before[rank] for rank in stages]
