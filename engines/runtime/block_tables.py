"""Where each running sequence's K/V lies, ready to be put into a plan."""

from __future__ import annotations

import numpy as np

from engines.runtime.plan import Int32


class BlockTables:
    """Block tables of all slots as one array, kept up to date, so that a plan's are one gather away."""

    def __init__(self, num_slots: int, max_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.version = 0
        """Another after each change."""
        self._tables = np.zeros((num_slots, max_blocks), np.int32)

    def write(self, slot: int, first: int, blocks: list[int]) -> None:
        self._tables[slot, first : first + len(blocks)] = blocks
        self.version += 1

    def gather(self, slots: Int32, context_lens: Int32) -> Int32:
        """[S, W], W just wide enough. Past its own context a table repeats its first block, so that what
        a kernel reads beyond what it needs is the sequence's own."""
        width = -(-int(context_lens.max()) // self.block_size)
        tables = self._tables[slots, :width]
        is_read = np.arange(0, width * self.block_size, self.block_size) < context_lens[:, None]
        return np.where(is_read, tables, tables[:, :1])

    def slot_mapping(self, token_slots: Int32, positions: Int32) -> Int32:
        """[T]: where in the K/V each token goes."""
        blocks = self._tables[token_slots, positions // self.block_size]
        return blocks * np.int32(self.block_size) + positions % np.int32(self.block_size)
