"""Attention of decoding sequences alone: our kernel beside torch's, as bytes of K/V a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engines.gpu import support
from engines.runtime import attention_paged
from tests.bench.gpu.bench import Bench, Skipped
from tests.bench.gpu.decode import few, part_of
from tests.bench.gpu.limits import limits_of
from tests.bench.gpu.model import DTYPE
from tests.bench.gpu.timing import replayed_seconds

MakeKernel = Callable[[attention_paged._Sequences], attention_paged._Kernel]
CONTEXTS = (1024, 8192)
_NUM_BYTES = 1 << 30  # of K/V that a measurement goes through: far more than caches hold


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Queries, and K/V of so many steps that none of it is in a cache when it is read."""

    query: Tensor  # [S, Hq, D]
    keys: Tensor  # [num_blocks, block_size, Hkv, D]
    values: Tensor
    query_start: Tensor  # [S + 1] int32
    context_lens: Tensor  # [S] int32
    tables: tuple[Tensor, ...]  # of each step: [S, W] int32
    context: int

    def attend(self, make_kernel: MakeKernel, table: Tensor) -> Tensor:
        """As a layer does, [S, Hq, D]: each query over all of its sequence's context."""
        num_seqs, _, head_dim = self.query.shape
        sequences = attention_paged._Sequences(
            rows=None,
            query_lens=[1] * num_seqs,
            query_start=self.query_start,
            context_lens=self.context_lens,
            tables=table,
            contexts=[self.context] * num_seqs,
            max_context=self.context,
        )
        return make_kernel(sequences).attend(self.query, self.keys, self.values, head_dim**-0.5)


def measure(bench: Bench) -> None:
    for batch in few(bench.options.batches):
        for context in CONTEXTS:
            for name in ("ours", "torch's"):
                bench.part(
                    f"{part_of(batch)}, context {context}, {name}",
                    partial(_row, bench, batch, context, name),
                )


def _row(bench: Bench, batch: int, context: int, name: str) -> dict[str, Any]:
    make_kernel, case = _kernel(bench, name), make_case(bench, batch, context)

    def work() -> None:
        for table in case.tables:
            case.attend(make_kernel, table)

    seconds = replayed_seconds(work, bench.device) / len(case.tables)
    num_bytes = 2 * batch * context * case.keys.shape[2] * case.keys.shape[3] * DTYPE.itemsize
    rate = num_bytes / seconds
    return {
        "microseconds": round(1e6 * seconds, 2),
        "gb_per_s": round(rate / 1e9, 1),
        "of_copy": round(rate / limits_of(bench).bandwidth, 3),
    }


def _kernel(bench: Bench, name: str) -> MakeKernel:
    """One of those that attention_paged chooses from."""
    if not bench.options.is_cuda:
        raise Skipped("these kernels are for CUDA devices")
    if name == "ours":
        return attention_paged._Decode
    if not support.varlen_is_paged():
        raise Skipped("this torch's varlen_attn takes no block table")
    return attention_paged._Flash


def make_case(bench: Bench, batch: int, context: int, num_bytes: int = _NUM_BYTES) -> Case:
    """With about `num_bytes` of K/V, its blocks in no order."""
    shape, block_size, device = bench.options.shape, bench.options.block_size, bench.device
    width = -(-context // block_size)
    step_bytes = 2 * batch * width * block_size * shape.kv_heads * shape.head_dim * DTYPE.itemsize
    num_steps = max(1, num_bytes // step_bytes)
    num_blocks = num_steps * batch * width
    kv = torch.randn(2, num_blocks, block_size, shape.kv_heads, shape.head_dim, device=device, dtype=DTYPE)
    order = torch.randperm(num_blocks, device=device).to(torch.int32)
    return Case(
        query=torch.randn(batch, shape.heads, shape.head_dim, device=device, dtype=DTYPE),
        keys=kv[0],
        values=kv[1],
        query_start=torch.arange(batch + 1, dtype=torch.int32, device=device),
        context_lens=torch.full((batch,), context, dtype=torch.int32, device=device),
        tables=order.view(num_steps, batch, width).unbind(0),
        context=context,
    )
