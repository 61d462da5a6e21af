"""The pool of K/V blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.runtime.blocks import BlockPool, Unaccounted
from engines.runtime.sequence import chain_hash, root_hash


def test_cached_blocks_are_used_again_and_evicted_least_recently_released_first() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks:
        pool.register(block, bytes([block]))
    pool.release([blocks[1]])
    pool.release([blocks[0]])
    pool.release([blocks[2]])
    assert (pool.num_free, pool.num_cached, pool.num_used) == (0, 3, 0)
    pool.share(blocks[1])  # now the most recently used
    pool.release([blocks[1]])
    assert [pool.allocate() for _ in range(3)] == [blocks[0], blocks[2], blocks[1]]
    assert all(pool.find(bytes([block])) is None for block in blocks), "evicted, so not to be found"
    pool.check([[block] for block in blocks])


def test_of_one_sequence_the_last_blocks_are_evicted_first() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks:
        pool.register(block, bytes([block]))
    pool.release(blocks)
    assert [pool.allocate() for _ in range(3)] == blocks[::-1]


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, b"first")
    pool.release([first, second])
    assert pool.allocate() == second
    assert pool.find(b"first") == first


def test_the_first_with_a_content_keeps_it() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert pool.find(b"same") == first
    pool.release([second])
    assert pool.num_free == 1, "a copy nobody can find is worth nothing"


def test_a_block_released_twice_is_an_error() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    pool.release([block])
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([block])


def test_check_sees_a_leak() -> None:
    pool = BlockPool(2)
    pool.allocate()
    with pytest.raises(Unaccounted, match="holders"):
        pool.check([])


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 99)), max_size=80))
def test_every_block_is_free_cached_or_used(moves: list[tuple[str, int]]) -> None:
    pool = BlockPool(4)
    tables: list[list[int]] = []
    for move, number in moves:
        block_hash = bytes([number % 6])
        found = pool.find(block_hash)
        if move == "share" and found is not None:
            pool.share(found)
            tables.append([found])
        elif move == "take" and pool.num_available:
            tables.append([pool.allocate()])
            pool.register(tables[-1][0], block_hash)
        elif move == "release" and tables:
            pool.release(tables.pop(number % len(tables)))
        pool.check(tables)
        assert pool.num_free + pool.num_cached + pool.num_used == pool.num_blocks


def test_hashes_tell_salts_groups_order_and_parents_apart() -> None:
    roots = {root_hash(b"", ""), root_hash(b"a", ""), root_hash(b"", "a"), root_hash(b"a", "a")}
    assert len(roots) == 4
    root = root_hash(b"", "")
    hashes = {
        chain_hash(root, [1, 2]),
        chain_hash(root, [2, 1]),
        chain_hash(chain_hash(root, [1, 2]), [1, 2]),
    }
    assert len(hashes) == 3
