"""Has the system provide the memory of blocks before tokens are written there.

A mapping takes memory page by page, as each is first written, and K/V blocks are first used in order. The
first write to a huge page waits until its two megabytes are there and cleared: milliseconds, in a virtual
machine that has to be given them first. A step that goes on to new blocks meets such a page in each layer.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Condition, Thread
from time import monotonic, perf_counter, sleep

log = logging.getLogger(__name__)

BYTES_AHEAD = 256 << 20
"""Beyond the last block in use, of all regions together."""
_IDLE_SECONDS = 0.1
"""Without a step."""
_HUGE_PAGE = 2 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14


@dataclass(frozen=True, slots=True)
class Region:
    """Memory of blocks, which lie one after another."""

    address: int
    block_bytes: int


class PagesAhead:
    """A thread that keeps `BYTES_AHEAD` ahead of the blocks in use, with the same blocks of each region.

    It works while no step does, which wants the processor, and beside steps if less than a quarter is left.
    Where the system does not provide memory when asked, it comes as it is written.
    """

    def __init__(self, regions: Sequence[Region], num_blocks: int) -> None:
        self._regions, self._num_blocks = tuple(regions), num_blocks
        self._blocks_ahead = BYTES_AHEAD // sum(region.block_bytes for region in regions)
        self._blocks_at_once = max(1, _HUGE_PAGE // max(region.block_bytes for region in regions))
        self._wanted = self._provided = 0
        self._rests_since = 0.0
        self._more_wanted = Condition()
        self.use(0)
        self.rest()
        Thread(target=self._run, name="pages-ahead", daemon=True).start()

    @property
    def num_provided(self) -> int:
        """Blocks, from the first on, whose memory is there."""
        return self._provided

    def use(self, block: int) -> None:
        """Tell that a step begins, which writes to blocks up to this one."""
        self._rests_since = math.inf
        wanted = min(self._num_blocks, block + 1 + self._blocks_ahead)
        if wanted > self._wanted:
            with self._more_wanted:
                self._wanted = wanted
                self._more_wanted.notify()

    def rest(self) -> None:
        """Tell that the step has ended."""
        self._rests_since = monotonic()

    def _run(self) -> None:
        try:
            while self._provided < self._num_blocks:
                with self._more_wanted:
                    self._more_wanted.wait_for(lambda: self._wanted > self._provided)
                    self._more_wanted.wait_for(self._is_short, timeout=_IDLE_SECONDS)
                if self._is_short() or monotonic() - self._rests_since >= _IDLE_SECONDS:
                    self._provide(min(self._num_blocks, self._provided + self._blocks_at_once))
        except OSError as error:
            log.info("K/V memory comes as it is written: the system does not provide it ahead (%s)", error)

    def _is_short(self) -> bool:
        return self._wanted - self._provided > self._blocks_ahead - self._blocks_ahead // 4

    def _provide(self, end: int) -> None:
        for region in self._regions:
            started = perf_counter()
            _populate(
                region.address + self._provided * region.block_bytes,
                region.address + end * region.block_bytes,
            )
            sleep(perf_counter() - started)  # half of the time
        self._provided = end


def _populate(start: int, end: int) -> None:
    """Whole pages, as a write to each of them would, without changing what is there."""
    start -= start % mmap.PAGESIZE
    if _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_POPULATE_WRITE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


_madvise = ctypes.CDLL(None, use_errno=True).madvise  # Python's own keeps all its threads waiting meanwhile
