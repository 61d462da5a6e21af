"""Memory that is there before it is written: with real mappings, and what Linux says is resident of them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import time

import pytest
import torch

from engines.base import KVSpec
from engines.runtime import kv_cache, pages_ahead
from engines.runtime.pages_ahead import PagesAhead, Region
from tests.waiting import wait_until

BLOCK = 4 * mmap.PAGESIZE
NUM_BLOCKS = 64
AHEAD = 8

libc = ctypes.CDLL(None, use_errno=True)


class Mapping:
    """Blocks in a fresh private mapping."""

    def __init__(self, block_bytes: int = BLOCK) -> None:
        self.pages = mmap.mmap(-1, NUM_BLOCKS * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.pages.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page has all its blocks at once
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))
        self.region = Region(address, block_bytes)

    def num_resident(self) -> int:
        """Bytes of the mapping's pages that are in memory, from its start on without a gap."""
        count = -(-len(self.pages) // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * count)()
        assert (
            libc.mincore(ctypes.c_void_p(self.region.address), ctypes.c_size_t(len(self.pages)), states) == 0
        )
        first_absent = next((i for i, state in enumerate(states) if not state & 1), count)
        assert not any(state & 1 for state in states[first_absent:])
        return first_absent * mmap.PAGESIZE


@pytest.fixture(autouse=True)
def little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_ahead, "BYTES_AHEAD", 2 * AHEAD * BLOCK)  # of two regions
    monkeypatch.setattr(pages_ahead, "_HUGE_PAGE", 2 * BLOCK)
    monkeypatch.setattr(pages_ahead, "_IDLE_SECONDS", 0.01)


def test_memory_is_there_ahead_of_the_blocks_in_use_and_no_further() -> None:
    keys, values = Mapping(), Mapping()
    ahead = PagesAhead([keys.region, values.region], NUM_BLOCKS)
    wait_until(lambda: ahead.num_provided == AHEAD + 2, 10.0)  # the first block's own, and two at a time
    assert keys.num_resident() == values.num_resident() == (AHEAD + 2) * BLOCK
    ahead.use(20)
    ahead.rest()
    wait_until(lambda: ahead.num_provided >= 21 + AHEAD, 10.0)
    ahead.use(3)  # again
    ahead.rest()
    time.sleep(0.01)
    assert keys.num_resident() == values.num_resident() == 30 * BLOCK
    ahead.use(NUM_BLOCKS - 1)
    ahead.rest()
    wait_until(lambda: ahead.num_provided == NUM_BLOCKS, 10.0)
    assert keys.num_resident() == NUM_BLOCKS * BLOCK


def test_beside_a_step_it_waits_until_a_quarter_is_left() -> None:
    keys, values = Mapping(), Mapping()
    ahead = PagesAhead([keys.region, values.region], NUM_BLOCKS)
    wait_until(lambda: ahead.num_provided == AHEAD + 2, 10.0)
    ahead.use(AHEAD - AHEAD // 4)
    time.sleep(0.05)
    assert ahead.num_provided == AHEAD + 2
    ahead.use(20)
    wait_until(lambda: ahead.num_provided >= 21 + AHEAD // 4, 10.0)
    time.sleep(0.05)
    assert ahead.num_provided < 21 + AHEAD
    ahead.rest()
    wait_until(lambda: ahead.num_provided >= 21 + AHEAD, 10.0)


def test_what_was_written_stays() -> None:
    mapping = Mapping(BLOCK + 256)  # blocks that begin in the middle of a page
    mapping.pages[:] = bytes(range(256)) * (len(mapping.pages) // 256)
    before = bytes(mapping.pages)
    ahead = PagesAhead([mapping.region], NUM_BLOCKS)
    ahead.use(NUM_BLOCKS - 1)
    ahead.rest()
    wait_until(lambda: ahead.num_provided == NUM_BLOCKS, 10.0)
    assert bytes(mapping.pages) == before


def test_a_system_that_does_not_provide_it_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def refuse(start: object, size: object, advice: int) -> int:
        asked.append(advice)
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(pages_ahead, "_madvise", refuse)
    caplog.set_level("INFO")
    mapping = Mapping()
    ahead = PagesAhead([mapping.region], NUM_BLOCKS)
    wait_until(lambda: "as it is written" in caplog.text, 10.0)
    ahead.use(NUM_BLOCKS - 1)
    time.sleep(0.01)
    assert len(asked) == 1
    assert mapping.num_resident() == 0


def test_caches_on_a_processor_have_a_region_for_each_layer() -> None:
    spec = KVSpec(num_kv_heads=2, head_dim=16, dtype=torch.float32, devices=(torch.device("cpu"),) * 3)
    caches = kv_cache.allocate(spec, NUM_BLOCKS, 16)
    ahead = kv_cache.pages_ahead(caches)
    assert ahead is not None
    ahead.use(NUM_BLOCKS - 1)
    ahead.rest()
    wait_until(lambda: ahead.num_provided == NUM_BLOCKS, 10.0)
    assert all(not cache.data.any() for cache in caches)


def test_there_is_none_without_caches_or_on_a_device() -> None:
    assert kv_cache.pages_ahead([]) is None
    elsewhere = kv_cache.LayerCache(torch.empty(4, 2, 2, 16, 16, device="meta"), kv_cache.Layout.GATHER)
    assert kv_cache.pages_ahead([elsewhere]) is None
