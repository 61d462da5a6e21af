"""Decoding steps as a group has them: the real runner, plans that run ahead of their tokens, recordings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from engines.native import NativeEngine
from engines.runtime import kv_cache
from engines.runtime.mesh import single
from engines.runtime.plan import LAST_SAMPLED, RowSampling, RowUse, StepKind, StepPlan, StepResult
from engines.runtime.runner import ModelRunner
from engines.wire import SamplingParams
from tests.bench.gpu import model
from tests.bench.gpu.bench import Bench, Skipped
from tests.bench.gpu.limits import limits_of
from tests.bench.gpu.timing import timed

WARM_UP, RUNS = 10, 3
FEW = 32
"""Sequences at which also other ways of decoding are measured."""
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, seed=1)


def measure(bench: Bench) -> None:
    """The section. Recorded steps, then what recording and fused layers win, at up to FEW sequences."""
    engine, batches = bench.engine(), bench.options.batches
    decoder = Decoder(bench, engine, max(batches))
    recorded = decoder.runner(is_recorded=True)
    for batch in batches:
        bench.part(part_of(batch), partial(decoder.row, recorded, batch))
    for batch in few(batches):
        bench.part(f"{part_of(batch)}, sampled", partial(decoder.row, recorded, batch, SAMPLED))
    plain = decoder.runner(is_recorded=False)
    for batch in few(batches):
        bench.part(f"{part_of(batch)}, not recorded", partial(decoder.row, plain, batch))
    with model.plain_modules(engine):
        for batch in few(batches):
            bench.part(f"{part_of(batch)}, plain modules", partial(decoder.row, plain, batch))
    bench.part("first tokens as plain modules' have them", partial(_agreement, decoder, recorded, plain))


def few(batches: Sequence[int]) -> list[int]:
    """Those that are measured in other ways, too. Raises Skipped where there are none."""
    found = [batch for batch in batches if batch <= FEW]
    if not found:
        raise Skipped(f"no batch of at most {FEW} is asked for")
    return found


def part_of(batch: int) -> str:
    return f"batch {batch}"


def recorded_steps(bench: Bench) -> dict[int, float]:
    """Milliseconds of a step of the engine as it is, at few sequences: as the section has found them, else
    measured."""
    batches = few(bench.options.batches)
    known = {batch: bench.of("decode", part_of(batch), "step_ms") for batch in batches}
    if None in known.values():
        decoder = Decoder(bench, bench.engine(), max(batches))
        runner = decoder.runner(is_recorded=True)
        known = {batch: 1e3 * decoder.seconds(runner, batch) for batch in batches}
    return {batch: ms for batch, ms in known.items() if ms is not None}


class Decoder:
    """Steps of up to `most` sequences at the options' context, their K/V random numbers.

    `weight_bytes`: that the engine has for a number of a layer's weights.
    """

    def __init__(self, bench: Bench, engine: NativeEngine, most: int, weight_bytes: int = 2) -> None:
        self._bench, self._engine, self._weight_bytes = bench, engine, weight_bytes
        options = bench.options
        self._num_steps = options.steps
        # The steps that are timed have the options' context in their middle.
        self._first_context = max(1, options.context - options.steps // 2 - WARM_UP)
        longest = self._first_context + WARM_UP + options.steps
        self._blocks_per_seq = -(-longest // options.block_size)
        self._most, self._num_blocks = most, most * self._blocks_per_seq
        # One block more than sequences have, for what fills up recorded steps.
        self._caches = kv_cache.allocate(engine.kv_spec, self._num_blocks + 1, options.block_size)
        for cache in self._caches:
            cache.data.normal_()

    def runner(self, *, is_recorded: bool) -> ModelRunner:
        runner = ModelRunner(
            self._engine, single(self._bench.device), self._caches, self._most, runs_ahead=True
        )
        if is_recorded:
            record(runner, self._engine, self._num_blocks)
        return runner

    def plans(self, batch: int, params: SamplingParams = GREEDY) -> list[StepPlan]:
        """WARM_UP, and those to be timed."""
        num_plans, block_size = WARM_UP + self._num_steps, self._bench.options.block_size
        return decode_plans(batch, self._first_context, num_plans, block_size, self._blocks_per_seq, params)

    def seconds(self, runner: ModelRunner, batch: int, params: SamplingParams = GREEDY) -> float:
        """Of a step: the median of some runs, each of so many steps."""
        plans = self.plans(batch, params)
        runs = []
        for _ in range(RUNS):
            run_ahead(runner, plans[:WARM_UP])
            runs.append(timed(lambda: run_ahead(runner, plans[WARM_UP:]), self._bench.device))
        return median(runs) / self._num_steps

    def row(self, runner: ModelRunner, batch: int, params: SamplingParams = GREEDY) -> dict[str, Any]:
        """A step beside the bounds that reading and multiplying put to it."""
        seconds, limits, shape = (
            self.seconds(runner, batch, params),
            limits_of(self._bench),
            self._bench.options.shape,
        )
        context = self._first_context + WARM_UP + (self._num_steps - 1) / 2  # the mean
        num_weights = model.layer_weights(shape), model.head_weights(shape)
        weight_bytes = self._weight_bytes * num_weights[0] + model.DTYPE.itemsize * num_weights[1]
        num_bytes = weight_bytes + batch * context * model.kv_bytes(shape)
        flops = 2 * batch * sum(num_weights) + model.attention_flops(shape, batch * context)
        bound = num_bytes / limits.bandwidth
        roofline = max(bound, flops / limits.matrix_rate)
        return {
            "context": context,
            "step_ms": round(1e3 * seconds, 4),
            "bound_ms": round(1e3 * bound, 4),
            "of_bound": round(bound / seconds, 3),
            "roofline_ms": round(1e3 * roofline, 4),
            "of_roofline": round(roofline / seconds, 3),
            "tokens_per_s": round(batch / seconds, 1),
        }

    def first_tokens(self, runner: ModelRunner, batch: int) -> np.ndarray:
        """What each sequence draws in the first step."""
        return run_ahead(runner, self.plans(batch)[:1]).token_ids


def record(runner: ModelRunner, engine: NativeEngine, num_blocks: int) -> None:
    """From now on it replays decoding steps, where they can be recorded: not on a CPU. `num_blocks`: of its
    caches, but for one."""
    if engine.is_recordable:
        runner.record_graphs(num_blocks, engine.max_model_len)


def decode_plans(
    batch: int, context: int, num_plans: int, block_size: int, blocks_per_seq: int, params: SamplingParams
) -> list[StepPlan]:
    """Steps of a token of each of `batch` sequences; in the first the context is `context` long, that token
    included. Later ones do not know their tokens yet. What they share is one array, as PlanBuilder has it."""
    sequences = np.arange(batch, dtype=np.int32)
    tables = sequences[:, None] * blocks_per_seq + np.arange(blocks_per_seq, dtype=np.int32)  # [S, W]
    query_start = np.arange(batch + 1, dtype=np.int32)
    row_use = np.full(batch, RowUse.SAMPLE, np.int32)
    sampling = (RowSampling(params),) * batch
    return [
        StepPlan(
            kind=StepKind.RUN,
            input_ids=17 + sequences if last < context else np.full(batch, LAST_SAMPLED, np.int32),
            positions=np.full(batch, last, np.int32),
            slot_mapping=tables[:, last // block_size] * block_size + last % block_size,
            query_start=query_start,
            context_lens=np.full(batch, last + 1, np.int32),
            slots=sequences,
            logit_rows=sequences,
            row_use=row_use,
            block_tables=tables,
            sampling=sampling,
        )
        for last in range(context - 1, context - 1 + num_plans)
    ]


def run_ahead(runner: ModelRunner, plans: Sequence[StepPlan]) -> StepResult:
    """Each is submitted before the tokens of the one before are waited for. Returns what the last gave."""
    runner.submit(plans[0])
    for plan in plans[1:]:
        runner.submit(plan)
        _collect(runner)
    return _collect(runner)


def _collect(runner: ModelRunner) -> StepResult:
    _, result = runner.collect()
    if result.errors:
        raise RuntimeError(f"rows of a step failed: {next(iter(result.errors.values())).message}")
    return result


def _agreement(decoder: Decoder, recorded: ModelRunner, plain: ModelRunner) -> dict[str, float]:
    """The share of sequences that draw the same token in one step, which no two orders of sums make 1."""
    batch = max(few(decoder._bench.options.batches))
    drawn = {"recorded": decoder.first_tokens(recorded, batch), "fused": decoder.first_tokens(plain, batch)}
    with model.plain_modules(decoder._engine):
        expected = decoder.first_tokens(plain, batch)
    return {way: round(float(np.mean(tokens == expected)), 3) for way, tokens in drawn.items()}
