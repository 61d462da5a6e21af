"""The first passes, made before anybody waits for them: kernels chosen, memory touched, pages faulted in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from engines.runtime.plan import RowSampling, RowUse, StepKind, StepPlan, StepResult
from engines.wire import SamplingParams

_SHAPES = ((1, 16), (1, 1), (4, 1), (2, 8))
"""(sequences, new tokens of each): a prompt, decoding alone, decoding together, prompts together."""


class _Config(Protocol):
    @property
    def kv_block_size(self) -> int: ...

    @property
    def max_num_seqs(self) -> int: ...


class _Runner(Protocol):
    def submit(self, plan: StepPlan) -> None: ...

    def collect(self) -> tuple[StepPlan, StepResult]: ...


def run(runner: _Runner, num_blocks: int, config: _Config, report: Callable[[float], None]) -> None:
    """Run a few plans whose K/V nobody will read: no block is in use yet. `report` hears the share done."""
    for i, (num_seqs, query_len) in enumerate(_SHAPES):
        report(i / len(_SHAPES))
        if num_seqs <= min(config.max_num_seqs, num_blocks):
            runner.submit(dummy_plan(num_seqs, query_len, config.kv_block_size))
            runner.collect()


def largest_plan(num_seqs: int, num_tokens: int, block_size: int) -> StepPlan:
    """About `num_tokens` tokens of `num_seqs` sequences, which all draw at random; all in block 0: what they
    compute means nothing, what memory it takes does."""
    query_len = -(-num_tokens // num_seqs)
    plan = _plan(num_seqs, query_len, query_len)
    drawn = RowSampling(SamplingParams(temperature=1.0, top_p=0.9, seed=0))
    return replace(
        plan,
        slot_mapping=plan.positions % np.int32(block_size),
        block_tables=np.zeros((num_seqs, -(-query_len // block_size)), np.int32),
        sampling=(drawn,) * num_seqs,
    )


def run_static(runner: _Runner, batch_size: int, max_model_len: int) -> None:
    """One pass over prompts, as large as batches get: an engine with K/V of its own sizes it by this."""
    runner.submit(dummy_plan(batch_size, min(16, max_model_len), max_model_len))
    runner.collect()


def dummy_plan(num_seqs: int, query_len: int, block_size: int) -> StepPlan:
    """`num_seqs` sequences of `query_len` tokens 0, or as many as fit, each in a block of its own."""
    return _plan(num_seqs, min(query_len, block_size), block_size)


def _plan(num_seqs: int, query_len: int, block_size: int) -> StepPlan:
    blocks = np.arange(num_seqs, dtype=np.int32)
    offsets = np.arange(query_len, dtype=np.int32)
    ends = np.arange(1, num_seqs + 1, dtype=np.int32) * query_len
    return StepPlan(
        kind=StepKind.RUN,
        input_ids=np.zeros(num_seqs * query_len, np.int32),
        positions=np.tile(offsets, num_seqs),
        slot_mapping=(blocks[:, None] * block_size + offsets).reshape(-1),
        query_start=np.concatenate([np.zeros(1, np.int32), ends]),
        context_lens=np.full(num_seqs, query_len, np.int32),
        slots=blocks,
        logit_rows=ends - 1,
        row_use=np.full(num_seqs, RowUse.SAMPLE, np.int32),
        block_tables=blocks[:, None],
        sampling=(RowSampling(SamplingParams(temperature=0.0)),) * num_seqs,
    )
