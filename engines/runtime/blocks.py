"""Paged K/V blocks: who uses which, and which finished ones can be used again.

Every block is in exactly one of three states. *Free*: its content means nothing. *Cached*: nobody uses
it, but its content is known by a hash, and it is the least recently released of these that is
taken when no free one is left. *Used*: one or more sequences hold it. So free + cached + used = total.
"""

from __future__ import annotations

from collections import OrderedDict


class Unaccounted(Exception):  # noqa: N818
    """A block, a slot or a sequence was lost or counted twice."""


def require(condition: bool, otherwise: str) -> None:
    """What holds of the accounts at any time. Not an assert: it is checked in production, too."""
    if not condition:
        raise Unaccounted(otherwise)


class BlockPool:
    """All operations take constant time."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._num_holders = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """How many times allocate() would succeed now."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    def allocate(self) -> int:
        """A block for one holder. Only while num_available > 0."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._num_holders[block] = 1
        return block

    def find(self, block_hash: bytes) -> int | None:
        """The block with this content, used or cached."""
        return self._by_hash.get(block_hash)

    def is_used(self, block: int) -> bool:
        return self._num_holders[block] > 0

    def share(self, block: int) -> None:
        """One holder more for a block that find() gave."""
        if self._num_holders[block] == 0:
            del self._cached[block]
        self._num_holders[block] += 1

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a used block, full and computed, findable. No effect if another has the same content."""
        assert self._num_holders[block] > 0, "only a used block can be registered"
        if self._hash_of[block] is None and block_hash not in self._by_hash:
            self._hash_of[block] = block_hash
            self._by_hash[block_hash] = block

    def release(self, blocks: list[int]) -> None:
        """One holder less for each of a sequence's blocks. Its last ones are the first to be evicted:
        without them the ones before are still of use."""
        for block in reversed(blocks):
            assert self._num_holders[block] > 0, "a block was released twice"
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                self._retire(block)

    def check(self, tables: list[list[int]]) -> None:
        """Raise Unaccounted unless `tables` (those of all sequences) hold every used block as often as is
        counted, and free, cached and used are disjoint and complete. Linear in the blocks."""
        holders = [0] * self.num_blocks
        for table in tables:
            for block in table:
                holders[block] += 1
        require(holders == self._num_holders, "block holders differ from the block tables")
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(holders) if count}
        require(len(free) == len(self._free), "a block is free twice")
        require(len(free) + len(cached) + len(used) == self.num_blocks, "blocks were lost or counted twice")
        require(free | cached | used == set(range(self.num_blocks)), "blocks were lost")
        require(all(self._hash_of[block] is None for block in free), "a free block has a hash")
        hashed = {h: block for block, h in enumerate(self._hash_of) if h is not None}
        require(hashed == self._by_hash, "hashes and blocks disagree")

    def _retire(self, block: int) -> None:
        if self._hash_of[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        assert block_hash is not None, "a cached block has a hash"
        del self._by_hash[block_hash]
        self._hash_of[block] = None
