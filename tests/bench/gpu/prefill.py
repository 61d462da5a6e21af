"""One long prompt in one step, beside the rate of the device's matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from engines.native import NativeEngine
from engines.runtime import kv_cache
from engines.runtime.mesh import single
from engines.runtime.plan import RowSampling, RowUse, StepKind, StepPlan
from engines.runtime.runner import ModelRunner
from tests.bench.gpu import model
from tests.bench.gpu.bench import Bench
from tests.bench.gpu.decode import GREEDY
from tests.bench.gpu.limits import limits_of
from tests.bench.gpu.timing import median_seconds


def measure(bench: Bench) -> None:
    bench.part("prompt", lambda: row(bench, bench.engine()))


def row(bench: Bench, engine: NativeEngine) -> dict[str, Any]:
    """The time of a step whose operations are those of all weights but the head's, which sees one token, and
    of each token's attention to those up to itself."""
    shape, length = bench.options.shape, min(bench.options.prefill, engine.max_model_len)
    block_size = bench.options.block_size
    caches = kv_cache.allocate(engine.kv_spec, -(-length // block_size), block_size)
    runner = ModelRunner(engine, single(bench.device), caches, num_slots=1)
    plan = prompt_plan(length, shape.vocab, block_size)
    seconds = median_seconds(lambda: runner.execute(plan), bench.device, rounds=5)
    products = 2 * (length * model.layer_weights(shape) + model.head_weights(shape))
    flops = products + model.attention_flops(shape, length * length / 2)
    return {
        "tokens": length,
        "seconds": round(seconds, 5),
        "tokens_per_s": round(length / seconds, 1),
        "tflop": round(flops / 1e12, 4),
        "tflop_per_s": round(flops / seconds / 1e12, 4),
        "of_matrix_rate": round(flops / seconds / limits_of(bench).matrix_rate, 3),
    }


def prompt_plan(length: int, vocab: int, block_size: int) -> StepPlan:
    """A sequence's whole prompt of random tokens; its next one is drawn."""
    tokens = np.arange(length, dtype=np.int32)
    return StepPlan(
        kind=StepKind.RUN,
        input_ids=np.random.default_rng(0).integers(16, vocab, length, dtype=np.int32),
        positions=tokens,
        slot_mapping=tokens,
        query_start=np.array([0, length], np.int32),
        context_lens=np.array([length], np.int32),
        slots=np.zeros(1, np.int32),
        logit_rows=np.array([length - 1], np.int32),
        row_use=np.array([RowUse.SAMPLE], np.int32),
        block_tables=np.arange(-(-length // block_size), dtype=np.int32)[None],
        sampling=(RowSampling(GREEDY),),
    )
