"""Sizes of the K/V cache, its layouts."""

from __future__ import annotations

import pytest
import torch

from engines.base import KVSpec
from engines.gpu import support
from engines.runtime.kv_cache import (
    Layout,
    TooLittleMemory,
    allocate,
    cuda_budget,
    layout_for,
    num_blocks_for,
)

CPU = torch.device("cpu")
SPEC = KVSpec(num_kv_heads=2, head_dim=8, dtype=torch.bfloat16, devices=(CPU,) * 3)


def test_a_budget_holds_whole_blocks() -> None:
    block_bytes = 2 * 3 * 2 * 8 * 2 * 16  # keys and values, layers, heads, dims, bytes, tokens
    assert num_blocks_for(SPEC, 10 * block_bytes, 16) == 10
    assert num_blocks_for(SPEC, 10 * block_bytes - 1, 16) == 9


def test_a_budget_below_one_block_is_refused_with_the_sums() -> None:
    with pytest.raises(TooLittleMemory, match=r"0\.0 MiB are left.* block of 16 tokens"):
        num_blocks_for(SPEC, 100, 16)


def test_allocated_bytes_are_the_budgeted_ones() -> None:
    caches = allocate(SPEC, 5, 16)
    assert [cache.block_size for cache in caches] == [16] * 3
    assert [cache.num_kv_heads for cache in caches] == [2] * 3
    assert sum(cache.data.nbytes for cache in caches) == 5 * 16 * SPEC.bytes_per_token()
    assert not any(cache.data.any() for cache in caches)


def test_the_share_is_of_the_total_not_of_what_is_free() -> None:
    assert cuda_budget(0.9, 100, 30) == 60
    assert cuda_budget(0.2, 100, 30) == 0


def test_pages_where_a_kernel_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert support.varlen_is_paged()  # of the torch that we pin
    assert layout_for(cuda, torch.float32, 128, 16) is Layout.PAGED
    assert layout_for(CPU, torch.bfloat16, 128, 256) is Layout.GATHER
    monkeypatch.setattr(support, "has_kernels", lambda _: False)  # as without Triton
    assert layout_for(cuda, torch.bfloat16, 128, 256) is Layout.PAGED
    assert layout_for(cuda, torch.float32, 128, 256) is Layout.GATHER
    assert layout_for(cuda, torch.bfloat16, 512, 256) is Layout.GATHER
    assert layout_for(CPU, torch.bfloat16, 128, 256) is Layout.GATHER
    assert layout_for(cuda, torch.bfloat16, 128, 512) is Layout.PAGED
    assert layout_for(cuda, torch.bfloat16, 128, 16) is Layout.GATHER, "its pages are multiples of 256"
