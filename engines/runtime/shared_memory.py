"""Sums and gathers between the tensor-parallel ranks of one machine's CPU, through memory they share.

gloo's all-reduce of a decode step's few KB goes through the loopback's sockets, twice a layer; here a rank
writes its part, raises its counter, waits for the others' counters and adds all parts itself. Parts are
added in order of rank, so every rank has the same sum to the bit. Between operations of these a kernel that
runs whole layers does the same by itself (engines/kernels/ranks.h).

Operation s uses half s % 2 of the memory. A rank writes for s only when every counter has reached s - 1,
which a rank raises after it has read what operation s - 2 left in that half.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

CAPACITY = 2 << 20
"""Bytes of one rank's part; larger tensors go piece by piece."""

LINE = 8
"""int64 of a cache line: counters do not share one."""
PAGE = 4096
"""Bytes, for the counters."""
_SPINS_BEFORE_YIELD = 2_000
_YIELDS_BEFORE_SLEEP = 2_000
_NAPS_SECONDS, _SHORT_NAP, _LONG_NAP = 1.0, 100e-6, 2e-3
"""Short naps for a second. Whoever waits longer shall look asleep to those who look for groups that hang."""


class SharedGroup:
    """One rank's end. Every rank of the group calls the same operations in the same order.

    `path` is a file that all ranks open and the first creates; who started the group removes it. Raises
    OSError when it cannot be made, TimeoutError when a rank does not come within `timeout` seconds.
    """

    def __init__(self, path: Path, rank: int, size: int, timeout: float) -> None:
        memory = map_file(path, PAGE + 2 * size * CAPACITY)
        assert size * LINE * 8 <= PAGE, "the counters have one page"
        self._counters = memoryview(memory)[:PAGE].cast("q")
        halves = torch.frombuffer(memory, dtype=torch.uint8, offset=PAGE)
        self._halves = halves.view(2, size, CAPACITY)
        self.rank, self.size, self.timeout = rank, size, timeout
        self.num_operations = 0  # so far, the same on every rank

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the counters and of the halves."""
        halves = self._halves.data_ptr()
        return halves - PAGE, halves

    def all_reduce(self, x: Tensor) -> None:
        """Sum over the ranks, in place. `x` must be contiguous."""
        for piece in torch.split(x.view(-1), CAPACITY // x.itemsize):
            parts = self._exchange(piece)
            if self.size == 2:
                torch.add(parts[0], parts[1], out=piece)
            else:
                torch.sum(parts, dim=0, out=piece)

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """[L, C] of each rank to [L, size * C] float32 on rank 0, None on the others."""
        shape = x.shape[0], self.size, x.shape[1]
        whole = torch.empty(shape, dtype=torch.float32) if self.rank == 0 else None
        width = max(1, CAPACITY // (x.shape[1] * x.itemsize))  # rows of a piece
        assert x.shape[1] * x.itemsize <= CAPACITY, "a row must fit"
        for start in range(0, x.shape[0], width):
            piece = x[start : start + width]
            parts = self._exchange(piece.reshape(-1), wait=whole is not None)
            if whole is not None:
                rows = parts.view(self.size, *piece.shape)
                whole[start : start + width].copy_(rows.transpose(0, 1))
        return None if whole is None else whole.view(x.shape[0], -1)

    def _exchange(self, piece: Tensor, wait: bool = True) -> Tensor:
        """[n] of each rank to [size, n]: a view, valid until the next operation but one."""
        self.num_operations += 1
        self._wait_for(self.num_operations - 1)
        half = self._halves[self.num_operations % 2]
        parts = half[:, : piece.nbytes].view(piece.dtype)
        parts[self.rank].copy_(piece)
        self._counters[self.rank * LINE] = self.num_operations  # seen after the part: see is_supported
        if wait:
            self._wait_for(self.num_operations)
        return parts

    def _wait_for(self, operation: int) -> None:
        """Until every rank's counter is there."""
        counters = self._counters
        for line in range(0, self.size * LINE, LINE):
            if not comes_true(lambda line=line: counters[line] >= operation, self.timeout):  # type: ignore[misc]
                raise self.late(operation)

    def late(self, operation: int) -> TimeoutError:
        """That a rank did not come to it."""
        return TimeoutError(f"a rank did not come to operation {operation} within {self.timeout:g} s")


def map_file(path: Path, num_bytes: int) -> mmap.mmap:
    """The file's bytes, shared with whoever maps it, zeros at first. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)  # a write where there is no room later would be a SIGBUS
        return mmap.mmap(descriptor, num_bytes)
    except OSError as error:
        what = f"{error.strerror}: {num_bytes >> 20} MiB for what ranks share"
        raise OSError(error.errno, what, str(path)) from error
    finally:
        os.close(descriptor)


def comes_true(condition: Callable[[], bool], timeout: float) -> bool:
    """Waits for what another process does: spins, then yields the core, then sleeps in short naps. False when
    the time is up."""
    for _ in range(_SPINS_BEFORE_YIELD):
        if condition():
            return True
    for _ in range(_YIELDS_BEFORE_SLEEP):
        if condition():
            return True
        os.sched_yield()
    started = time.monotonic()
    while not condition():
        waited = time.monotonic() - started
        if waited > timeout:
            return False
        time.sleep(_SHORT_NAP if waited < _NAPS_SECONDS else _LONG_NAP)
    return True


def is_supported(device: torch.device) -> bool:
    """Whether it is a processor that makes stores visible in their order, which the counters rely on. x86
    does."""
    return device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")


def path_for(run_dir: Path, name: str) -> Path:
    """In memory where the system has a place for that, under a name that the guard removes."""
    shm = Path("/dev/shm")
    parent = shm if os.access(shm, os.W_OK) else run_dir
    return parent / f"{run_dir.name}-{name}"
