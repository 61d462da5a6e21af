"""Attention over pages without our kernels. A plain function of its documented meaning stands in for torch's
paged FlashAttention."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from torch import Tensor

from engines.gpu import support
from engines.runtime.attention_paged import PagedStep
from engines.runtime.kv_cache import LayerCache, Layout
from tests.engines.driver import Row, make_batch

HEADS, KV_HEADS, DIM, BLOCK, SCALE = 4, 2, 8, 4, 0.3
REAL = inspect.signature(varlen.varlen_attn)


def fake_varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
    """What the documentation of varlen_attn says of paged, causal attention, sequence by sequence."""
    call = REAL.bind(*args, **kwargs).arguments  # a TypeError if the real one would not take it
    assert call["window_size"] == (-1, 0)
    assert call["enable_gqa"]
    assert call["num_splits"] == 1, "with more, sequences after the first are not written (pytorch#194167)"
    assert call["cu_seq_k"].shape == call["cu_seq_q"].shape, "FlashAttention-2 wants both, whatever it reads"
    assert call["block_table"].dtype == call["seqused_k"].dtype == call["cu_seq_q"].dtype == torch.int32
    outs = []
    starts = call["cu_seq_q"].tolist()
    assert call["max_q"] == max(b - a for a, b in pairwise(starts))
    assert call["max_k"] == call["seqused_k"].max()
    for s, context in enumerate(call["seqused_k"].tolist()):
        query = call["query"][starts[s] : starts[s + 1]].transpose(0, 1)
        pages = call["block_table"][s].long()
        key, value = (call[name][pages].flatten(0, 1)[:context].transpose(0, 1) for name in ("key", "value"))
        length = query.shape[1]
        seen = torch.ones(length, context, dtype=torch.bool).tril(context - length)
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=seen, scale=call["scale"], enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


fake_varlen_attn.__signature__ = REAL  # type: ignore[attr-defined]  # by which it is seen what it takes


@pytest.fixture(params=["flash", "one by one"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", fake_varlen_attn)
    monkeypatch.setattr(support, "has_flash", lambda *_: request.param == "flash")


@pytest.mark.usefixtures("kernel")
def test_a_chunk_and_a_decode_in_one_call() -> None:
    cache = LayerCache(torch.full((2, 8, BLOCK, KV_HEADS, DIM), torch.nan), Layout.PAGED)
    qkv = torch.randn(2, 11, HEADS + 2 * KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
    rows = [Row([0] * 11, [6, 0, 3], 0), Row([0] * 11, [1, 7, 2], 0)]

    def step(counts: list[int]) -> list[Tensor]:
        fresh = [
            qkv[i, row.num_computed :][:count] for i, row, count in zip((0, 1), rows, counts, strict=True)
        ]
        query, key, value = torch.cat(fresh).tensor_split((HEADS, HEADS + KV_HEADS), dim=1)
        attention = PagedStep(make_batch(rows, counts, BLOCK), cache)
        attention.write(key, value, cache)
        out = attention.attend(query, cache, SCALE)
        for row, count in zip(rows, counts, strict=True):
            row.num_computed += count
        return list(torch.split(out, counts))

    steps = [step([5, 10]), step([6, 1])]
    used = cache.data[:, [6, 0, 3, 1, 7, 2]]
    assert used.isfinite().all(), "a kernel may read a block whole: nothing is left of its last owner"
    for i in range(2):
        query, key, value = qkv[i].transpose(0, 1)[None].tensor_split((HEADS, HEADS + KV_HEADS), dim=1)
        expected = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=SCALE, enable_gqa=True
        )
        torch.testing.assert_close(torch.cat([out[i] for out in steps]), expected[0].transpose(0, 1))
