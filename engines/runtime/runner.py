"""Executes plans on this rank: plan to batch, forward, logits, sample. The same code on every rank.

On the leader, `submit` hands the plan to the followers at once and `collect` computes this rank's part.
So with k plans in flight the stages before the last work on the next plan while this one is collected.

A runner that runs ahead, for a device that queues its work (CUDA), starts its part at `submit`, and `collect`
waits for the tokens: the next plan, which names them LAST_SAMPLED, is queued before they are known here.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engines.base import Batch, Engine
from engines.runtime import sampler
from engines.runtime.channel import PlanSender
from engines.runtime.context import ForwardContext, forward_context
from engines.runtime.decode_graphs import DecodeGraphs, Record
from engines.runtime.kv_cache import LayerCache
from engines.runtime.mesh import Mesh
from engines.runtime.pages_ahead import PagesAhead
from engines.runtime.plan import LAST_SAMPLED, RowUse, StepPlan, StepResult
from engines.runtime.transfer import Arriving, staged, to_device
from engines.wire import RequestError

log = logging.getLogger("sluice.worker")

MAX_LOGIT_ROWS = 256
"""Rows of logits in memory at once: prompt log-probabilities of long chunks come in slices of this."""
NO_MEMORY = "the device has no memory left for it"
"""How the error of a sequence that was refused for that begins."""
_SAMPLE = int(RowUse.SAMPLE)  # to compare an array with an enum's member is slow


class Started(Protocol):
    """A plan, or a part of one, whose work is under way."""

    def result(self) -> StepResult:
        """Waits for it."""


class ModelRunner:
    """`num_slots` bounds `plan.slots`. Without a `sender` there are no followers to send to.

    With `runs_ahead` every rank remembers what each slot sampled last; only for groups of one stage.
    """

    def __init__(
        self,
        engine: Engine,
        mesh: Mesh,
        caches: Sequence[LayerCache],
        num_slots: int,
        sender: PlanSender | None = None,
        pages_ahead: PagesAhead | None = None,
        *,
        runs_ahead: bool = False,
    ) -> None:
        assert not runs_ahead or mesh.pp_size == 1, "the stages of a pipeline do not know what was sampled"
        self._engine = engine
        self._mesh = mesh
        self._caches = caches
        self._sender = sender
        self._pages_ahead = pages_ahead
        self._submitted: deque[tuple[StepPlan, Started | None]] = deque()
        self._runs_ahead = runs_ahead
        self._last_sampled = torch.zeros(num_slots + 1, dtype=torch.int64, device=mesh.device)
        self._graphs: DecodeGraphs | None = None
        self._on_device: dict[str, tuple[np.ndarray, Tensor]] = {}
        self.hidden_size = 0  # of the model, once the last stage has executed a plan

    @property
    def num_in_flight(self) -> int:
        return len(self._submitted)

    def submit(self, plan: StepPlan) -> None:
        """Start `plan` on every other rank, and here if this runs ahead. Does not wait for it."""
        if self._sender is not None:
            self._sender.send(plan.pack())
        self._submitted.append((plan, self._start(plan) if self._runs_ahead else None))

    def collect(self) -> tuple[StepPlan, StepResult]:
        """The oldest plan that was submitted, and what its rows gave."""
        plan, started = self._submitted.popleft()
        started = started or self._start(plan)
        assert started is not None, "only the leader collects"
        return plan, started.result()

    def execute(self, plan: StepPlan) -> StepResult | None:
        """This rank's part of `plan`. The result on the leader; elsewhere None, and nothing is waited for."""
        started = self._start(plan)
        return None if started is None else started.result()

    @torch.inference_mode()
    def record_graphs(self, num_blocks: int, max_context: int, record: Record | None = None) -> None:
        """From now on replay steps that decode. `num_blocks` of the caches are for sequences, one more for
        what fills a step up. On every rank at once, for an engine that `is_recordable`."""
        self._graphs = DecodeGraphs(
            self._engine, self._caches, self._last_sampled, num_blocks, max_context, record
        )
        self.hidden_size = self._graphs.hidden_size

    @torch.inference_mode()
    def _start(self, plan: StepPlan) -> Started | None:
        started = perf_counter()
        if self._pages_ahead is not None:
            self._pages_ahead.use(int(plan.slot_mapping.max()) // self._caches[0].block_size)
        result = self._launch_or_refuse(plan)
        if self._pages_ahead is not None:
            self._pages_ahead.rest()
        self._mesh.clock.add(perf_counter() - started)
        return result

    def _launch_or_refuse(self, plan: StepPlan) -> Started | None:
        """Where its memory does not suffice, the halves of `plan`, down to the sequence that is refused.

        Not where others take part: they wait in a collective, and their group ends.
        """
        try:
            return self._launch(plan)
        except torch.OutOfMemoryError as error:
            if self._mesh.world_size > 1:
                raise
            reason = str(error).split(". ")[0]
        if self._mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("no memory for a step of %d tokens: %s", plan.num_tokens, reason)
        if plan.num_seqs == 1:
            return _Refused(len(plan.logit_rows), reason)
        middle = plan.num_seqs // 2
        parts = (plan.part(0, middle), plan.part(middle, plan.num_seqs))
        return _Parts([self._launch_or_refuse(part) for part in parts])

    def _launch(self, plan: StepPlan) -> Started | None:
        if self._graphs is not None and self._graphs.takes(plan):
            drawn = [self._draw(plan, self._graphs.logits(plan), slice(None))]
            self._remember(plan, drawn)
            return _Parts(drawn) if self._mesh.is_leader else None
        batch = self._to_batch(plan)
        with forward_context(ForwardContext(batch, self._caches)):
            hidden = self._engine.forward(batch)
        if hidden is None:
            return None
        self.hidden_size = hidden.shape[1]
        wanted = hidden if plan.has_a_row_for_each_token else hidden.index_select(0, batch.logit_rows)
        drawn = [
            self._draw(plan, self._engine.logits(wanted[rows]), rows) for rows in _slices(len(plan.row_use))
        ]
        self._remember(plan, drawn)
        return _Parts(drawn, _pooled(plan, hidden)) if self._mesh.is_leader else None

    def _draw(self, plan: StepPlan, logits: Tensor | None, rows: slice) -> sampler.Drawn | None:
        """`logits` [L, V]: of `rows` of the plan's logit rows. None where this rank draws nothing."""
        if logits is None or not self._mesh.is_leader:
            return None
        uses: list[int] = plan.row_use[rows].tolist()
        return sampler.sample(logits, plan.sampling[rows], uses, lambda: plan.drawn_positions[rows])

    def _remember(self, plan: StepPlan, drawn: Sequence[sampler.Drawn | None]) -> None:
        """What each slot sampled last, on every rank, for plans made before this one was collected."""
        if not self._runs_ahead:
            return
        sampled = np.flatnonzero(plan.row_use == _SAMPLE)
        if not len(sampled):
            return
        device, num_rows = self._mesh.device, len(plan.row_use)
        own = [each.tokens for each in drawn if each is not None]
        tokens = torch.cat(own) if own else torch.empty(num_rows, dtype=torch.int64, device=device)
        self._mesh.from_leader(tokens)
        if len(sampled) < num_rows:
            tokens = tokens.index_select(0, to_device(sampled, device, torch.int64))
        slots = plan.slots[plan.sequences_of(plan.logit_rows[sampled])]
        self._last_sampled.index_copy_(0, to_device(slots, device, torch.int64), tokens)

    def _input_ids(self, plan: StepPlan) -> Tensor:
        device = self._mesh.device
        ids = _tensor(plan.input_ids, device, np.int64)
        if not self._runs_ahead:
            return ids
        unknown = np.flatnonzero(plan.input_ids == LAST_SAMPLED)
        if len(unknown):
            slots = to_device(plan.slots[plan.sequences_of(unknown)], device, torch.int64)
            last = self._last_sampled.index_select(0, slots)
            ids.index_copy_(0, to_device(unknown, device, torch.int64), last)
        return ids

    def _to_batch(self, plan: StepPlan) -> Batch:
        context_lens = plan.context_lens.tolist()
        if plan.num_tokens == plan.num_seqs:
            query_start, max_query_len = list(range(plan.num_seqs + 1)), 1
        else:
            query_start = plan.query_start.tolist()
            max_query_len = max(end - start for start, end in pairwise(query_start))
        return Batch(
            input_ids=self._input_ids(plan),
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
            reads_all=plan.reads_all,
        )

    def _kept(self, name: str, array: np.ndarray, dtype: type[np.integer]) -> Tensor:
        """As `_tensor`; the last one again if this is the array that it was made of."""
        kept = self._on_device.get(name)
        if kept is None or kept[0] is not array:
            kept = self._on_device[name] = (array, _tensor(array, self._mesh.device, dtype))
        return kept[1]


class _Parts:
    """Of one plan, in order."""

    def __init__(self, parts: Sequence[Started | None], pooled: dict[int, Arriving] | None = None) -> None:
        self._parts = [part for part in parts if part is not None]
        self._pooled = pooled or {}

    def result(self) -> StepResult:
        result = _joined([part.result() for part in self._parts])
        result.pooled.update({row: states.get() for row, states in self._pooled.items()})
        return result


class _Refused:
    """A sequence for whose step there is no memory: it ends, the others go on."""

    def __init__(self, num_rows: int, reason: str) -> None:
        self._num_rows = num_rows
        self._error = RequestError("internal", f"{NO_MEMORY}: {reason}")

    def result(self) -> StepResult:
        tokens = np.full(self._num_rows, -1, np.int32)
        return StepResult(tokens, errors=dict.fromkeys(range(self._num_rows), self._error))


def _pooled(plan: StepPlan, hidden: Tensor) -> dict[int, Arriving]:
    """For the rows that want it the sum of hidden states ([T, H], of the whole plan), in float32."""
    pooled: dict[int, Arriving] = {}
    if not any(row.num_pooled for row in plan.sampling):
        return pooled
    for row in np.flatnonzero(plan.row_use == RowUse.POOL).tolist():
        end = int(plan.logit_rows[row]) + 1
        states = hidden[end - plan.sampling[row].num_pooled : end]
        pooled[row] = Arriving(states.sum(0, dtype=torch.float32))
    return pooled


def _tensor(array: np.ndarray, device: torch.device, dtype: type[np.integer]) -> Tensor:
    """A copy: the plan's arrays may be read-only views of what was received."""
    tensor = staged(array.astype(dtype), device)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, start + MAX_LOGIT_ROWS) for start in range(0, count, MAX_LOGIT_ROWS))


def _joined(results: Sequence[StepResult]) -> StepResult:
    """The parts of one plan as one result."""
    if len(results) == 1:
        return results[0]
    joined = StepResult(np.concatenate([np.empty(0, np.int32), *(r.token_ids for r in results)]))
    first = 0
    for result in results:
        joined.logprobs.update({first + row: value for row, value in result.logprobs.items()})
        joined.errors.update({first + row: error for row, error in result.errors.items()})
        joined.pooled.update({first + row: states for row, states in result.pooled.items()})
        first += len(result.token_ids)
    return joined
