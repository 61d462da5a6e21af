"""Executes plans on this rank: plan to batch, forward, logits, sample. The same code on every rank.

On the leader, `submit` hands the plan to the followers at once and `collect` computes this rank's part.
So with k plans in flight the stages before the last work on the next plan while this one is collected,
and a device that queues its own work (CUDA) is not waited for before `collect` reads the tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from engines.base import Batch, Engine
from engines.runtime import sampler
from engines.runtime.channel import PlanSender
from engines.runtime.context import ForwardContext, forward_context
from engines.runtime.kv_cache import LayerCache
from engines.runtime.mesh import Mesh
from engines.runtime.pages_ahead import PagesAhead
from engines.runtime.plan import LAST_SAMPLED, Float32, RowUse, StepPlan, StepResult

MAX_LOGIT_ROWS = 256
"""Rows of logits in memory at once: prompt log-probabilities of long chunks come in slices of this."""
_SAMPLE = int(RowUse.SAMPLE)  # to compare an array with an enum's member is slow


class ModelRunner:
    """`num_slots` bounds `plan.slots`. Without a `sender` there are no followers to send to."""

    def __init__(
        self,
        engine: Engine,
        mesh: Mesh,
        caches: Sequence[LayerCache],
        num_slots: int,
        sender: PlanSender | None = None,
        pages_ahead: PagesAhead | None = None,
    ) -> None:
        self._engine = engine
        self._mesh = mesh
        self._caches = caches
        self._sender = sender
        self._pages_ahead = pages_ahead
        self._submitted: deque[StepPlan] = deque()
        self._last_sampled = np.full(num_slots, -1, np.int32)
        self._on_device: dict[str, tuple[np.ndarray, Tensor]] = {}
        self.hidden_size = 0  # of the model, once the last stage has executed a plan

    @property
    def num_in_flight(self) -> int:
        return len(self._submitted)

    def submit(self, plan: StepPlan) -> None:
        """Start `plan` on every other rank. Does not wait for it."""
        if self._sender is not None:
            self._sender.send(plan.pack())
        self._submitted.append(plan)

    def collect(self) -> tuple[StepPlan, StepResult]:
        """The oldest plan that was submitted, and what its rows gave."""
        plan = self._submitted.popleft()
        result = self.execute(plan)
        assert result is not None, "only the leader collects"
        return plan, result

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult | None:
        """This rank's part of `plan`. The result on the leader, None elsewhere."""
        started = perf_counter()
        if self._pages_ahead is not None:
            self._pages_ahead.use(int(plan.slot_mapping.max()) // self._caches[0].block_size)
        result = self._execute(plan)
        if self._pages_ahead is not None:
            self._pages_ahead.rest()
        self._mesh.clock.add(perf_counter() - started)
        return result

    def _execute(self, plan: StepPlan) -> StepResult | None:
        batch = self._to_batch(plan)
        with forward_context(ForwardContext(batch, self._caches)):
            hidden = self._engine.forward(batch)
        if hidden is None:
            return None
        self.hidden_size = hidden.shape[1]
        uses: list[int] = plan.row_use.tolist()
        wanted = hidden if plan.has_a_row_for_each_token else hidden.index_select(0, batch.logit_rows)
        results = [self._sample(plan, uses, wanted[rows], rows) for rows in _slices(len(uses))]
        if not self._mesh.is_leader:
            return None
        result = _joined([r for r in results if r is not None])
        if RowUse.POOL in uses:
            result.pooled.update(_pooled(plan, hidden))
        self._remember(plan, result)
        return result

    def _sample(self, plan: StepPlan, uses: list[int], hidden: Tensor, rows: slice) -> StepResult | None:
        """`hidden` [L, H]: those of `rows` of the plan's logit rows."""
        logits = self._engine.logits(hidden)
        if logits is None or not self._mesh.is_leader:
            return None
        return sampler.sample(logits, plan.sampling[rows], uses[rows], lambda: plan.drawn_positions[rows])

    def _remember(self, plan: StepPlan, result: StepResult) -> None:
        """What each slot sampled last, for plans made before this one was collected."""
        sampled = plan.row_use == _SAMPLE
        sequences = plan.sequences_of(plan.logit_rows[sampled])
        self._last_sampled[plan.slots[sequences]] = result.token_ids[sampled]

    def _input_ids(self, plan: StepPlan) -> np.ndarray:
        unknown = plan.input_ids == LAST_SAMPLED
        if not np.count_nonzero(unknown):
            return plan.input_ids
        assert self._mesh.world_size == 1, "running ahead needs the sampled tokens on this rank"
        sequences = plan.sequences_of(np.flatnonzero(unknown))
        ids = plan.input_ids.copy()
        ids[unknown] = self._last_sampled[plan.slots[sequences]]
        return ids

    def _to_batch(self, plan: StepPlan) -> Batch:
        context_lens = plan.context_lens.tolist()
        if plan.num_tokens == plan.num_seqs:
            query_start, max_query_len = list(range(plan.num_seqs + 1)), 1
        else:
            query_start = plan.query_start.tolist()
            max_query_len = max(end - start for start, end in pairwise(query_start))
        return Batch(
            input_ids=_tensor(self._input_ids(plan), self._mesh.device, np.int64),
            positions=_tensor(plan.positions, self._mesh.device, np.int64),
            slot_mapping=_tensor(plan.slot_mapping, self._mesh.device, np.int64),
            query_start=self._kept("query_start", plan.query_start, np.int32),
            context_lens=_tensor(plan.context_lens, self._mesh.device, np.int32),
            block_tables=self._kept("block_tables", plan.block_tables, np.int32),
            logit_rows=self._kept("logit_rows", plan.logit_rows, np.int64),
            query_start_list=query_start,
            context_lens_list=context_lens,
            max_query_len=max_query_len,
            max_context_len=max(context_lens),
        )

    def _kept(self, name: str, array: np.ndarray, dtype: type[np.integer]) -> Tensor:
        """As `_tensor`; the last one again if this is the array that it was made of."""
        kept = self._on_device.get(name)
        if kept is None or kept[0] is not array:
            kept = self._on_device[name] = (array, _tensor(array, self._mesh.device, dtype))
        return kept[1]


def _pooled(plan: StepPlan, hidden: Tensor) -> Iterator[tuple[int, Float32]]:
    """For the rows that want it the sum of hidden states ([T, H], of the whole plan), in float32."""
    for row in np.flatnonzero(plan.row_use == RowUse.POOL).tolist():
        end = int(plan.logit_rows[row]) + 1
        states = hidden[end - plan.sampling[row].num_pooled : end]
        yield row, states.sum(0, dtype=torch.float32).cpu().numpy()


def _tensor(array: np.ndarray, device: torch.device, dtype: type[np.integer]) -> Tensor:
    """A copy: the plan's arrays may be read-only views of what was received."""
    tensor = torch.from_numpy(array.astype(dtype))
    return tensor if device.type == "cpu" else tensor.to(device)


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, start + MAX_LOGIT_ROWS) for start in range(0, count, MAX_LOGIT_ROWS))


def _joined(results: Sequence[StepResult]) -> StepResult:
    """The slices of one plan as one result."""
    if len(results) == 1:
        return results[0]
    joined = StepResult(np.concatenate([np.empty(0, np.int32), *(r.token_ids for r in results)]))
    for i, result in enumerate(results):
        joined.logprobs.update({i * MAX_LOGIT_ROWS + row: v for row, v in result.logprobs.items()})
        joined.errors.update({i * MAX_LOGIT_ROWS + row: e for row, e in result.errors.items()})
    return joined
