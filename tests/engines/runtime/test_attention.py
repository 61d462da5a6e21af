"""Paged attention against a plain one, sequence by sequence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import Batch, KVSpec
from engines.runtime import attention_gather
from engines.runtime.attention import paged_attention
from engines.runtime.attention_gather import MAX_SCORES, plan_spans
from engines.runtime.context import ForwardContext, forward_context
from engines.runtime.kv_cache import LayerCache, allocate
from tests.engines.driver import Row, make_batch

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 8, 0.3

Sequences = list[tuple[int, int]]
"""(tokens computed before, tokens of this step) of each sequence."""


def attend_paged(sequences: Sequences, block_size: int, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Feeds what was computed before sequence by sequence, then the step in one batch."""
    spec = KVSpec(KV_HEADS, DIM, torch.float32, (torch.device("cpu"),))
    num_blocks = sum(-(-(past + new) // block_size) for past, new in sequences)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    caches, rows = allocate(spec, num_blocks, block_size), []
    for cache in caches:
        cache.data.fill_(torch.nan)  # whatever the blocks' last owners left, nobody reads it
    for past, new in sequences:
        blocks = [order.pop() for _ in range(-(-(past + new) // block_size))]
        rows.append(Row([0] * (past + new), blocks, 0))
    for row, (past, _), qkv in zip(rows, sequences, tensors, strict=True):
        if past:
            run(make_batch([row], [past], block_size), caches, qkv[:past])
            row.num_computed = past
    fresh = [qkv[past:] for qkv, (past, _) in zip(tensors, sequences, strict=True)]
    return run(make_batch(rows, [new for _, new in sequences], block_size), caches, torch.cat(fresh))


def run(batch: Batch, caches: list[LayerCache], qkv: torch.Tensor) -> torch.Tensor:
    query, key, value = qkv.tensor_split((HEADS, HEADS + KV_HEADS), dim=1)
    with forward_context(ForwardContext(batch, caches)):
        return paged_attention(query, key, value, 0, SCALE)


def attend_plainly(sequences: Sequences, tensors: list[torch.Tensor]) -> torch.Tensor:
    outs = []
    for (past, _), qkv in zip(sequences, tensors, strict=True):
        query, key, value = (t.transpose(0, 1) for t in qkv.tensor_split((HEADS, HEADS + KV_HEADS), dim=1))
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=SCALE, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1)[past:])
    return torch.cat(outs)


def check(sequences: Sequences, block_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (HEADS + 2 * KV_HEADS, DIM)
    tensors = [torch.randn((past + new, *shape), generator=generator) for past, new in sequences]
    expected = attend_plainly(sequences, tensors)
    torch.testing.assert_close(attend_paged(sequences, block_size, tensors), expected, rtol=1e-5, atol=1e-5)


STEP = st.lists(
    st.tuples(st.integers(0, 150), st.sampled_from([1, 1, 1, 2, 3, 17, 40])), min_size=1, max_size=7
)


@settings(max_examples=40)
@given(STEP, st.sampled_from([1, 3, 16, 64]))
def test_any_mixture_of_sequences(sequences: Sequences, block_size: int) -> None:
    check(sequences, block_size)


def test_long_chunks_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gather, "MAX_SCORES", 4000)
    check([(0, 100), (33, 90), (50, 1), (0, 7)], 16)


def test_decodes_of_like_length_are_one_call_in_order() -> None:
    starts, contexts = list(range(5)), [100, 180, 90, 120]
    (group,) = plan_spans(starts, contexts, HEADS)
    assert [span.sequence for span in group] == [0, 1, 2, 3]


def test_a_long_context_does_not_pad_short_ones() -> None:
    groups = plan_spans(list(range(6)), [100, 4000, 90, 3000, 10], HEADS)
    assert [[span.context for span in group] for group in groups] == [[4000, 3000], [100, 90], [10]]


@given(STEP)
def test_each_query_is_in_one_span_and_sees_what_it_should(sequences: Sequences) -> None:
    starts = [0]
    for _, new in sequences:
        starts.append(starts[-1] + new)
    spans = [s for group in plan_spans(starts, [p + n for p, n in sequences], 4096) for s in group]
    seen = {}
    for span in spans:
        for i in range(span.length):
            assert span.start + i not in seen
            seen[span.start + i] = (span.sequence, span.context - span.length + i + 1)
    expected = [(s, past + i + 1) for s, (past, new) in enumerate(sequences) for i in range(new)]
    assert [seen[row] for row in range(starts[-1])] == expected


def test_a_large_prefill_stays_within_the_bound() -> None:
    groups = plan_spans([0, 2048, 4096], [2048, 9000], 32)
    sizes = [len(g) * g[0].length * max(s.context for s in g) * 32 for g in groups]
    assert max(sizes) <= max(MAX_SCORES, 16 * 9000 * 32)
