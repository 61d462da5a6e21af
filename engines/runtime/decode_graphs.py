"""Decoding steps that are recorded once and replayed: a step then costs the host one launch, not hundreds.

A recording is of one number of sequences; a step takes the next larger one, filled up with sequences of one
token whose K/V goes into a block that nobody reads. Everything that differs between steps is in tensors
that keep their place.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engines.base import Batch, Engine
from engines.runtime.context import ForwardContext, forward_context
from engines.runtime.kv_cache import LayerCache, begun_places, clear_blocks
from engines.runtime.plan import RowUse, StepPlan
from engines.runtime.transfer import staged, to_device

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sequences of each recording. Reading the weights is most of a step: some rows more cost little."""
_POOL = int(RowUse.POOL)
_INPUT_IDS, _POSITIONS, _SLOT_MAPPING, _CONTEXT_LENS, _SLOTS = range(5)


class Recording(Protocol):
    """A piece of work that can be done again on the same tensors."""

    @property
    def output(self) -> Tensor | None: ...

    def replay(self) -> None: ...


Record = Callable[[Callable[[], Tensor | None]], Recording]


class CudaRecorder:
    """Records pieces of work as CUDA graphs. They share their memory: one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None  # of CUDAGraph.pool
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], Tensor | None]) -> Recording:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # kernels are compiled and chosen
            work()
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = work()
        self._pool = graph.pool()
        return _CudaRecording(graph, output)


@dataclass(frozen=True, slots=True, eq=False)
class _CudaRecording:
    graph: torch.cuda.CUDAGraph
    output: Tensor | None

    def replay(self) -> None:
        self.graph.replay()


class DecodeGraphs:
    """Recordings of `engine` over `caches`, whose block `num_blocks` is nobody's.

    `last_sampled`: what each slot sampled last, and one more entry, which nobody reads. `max_context`: of a
    sequence, in tokens. `record`: a CudaRecorder without.
    """

    def __init__(
        self,
        engine: Engine,
        caches: Sequence[LayerCache],
        last_sampled: Tensor,
        num_blocks: int,
        max_context: int,
        record: Record | None = None,
    ) -> None:
        record = record or CudaRecorder()
        self._engine, self._caches, self._last_sampled = engine, caches, last_sampled
        self.hidden_size = 0  # of the model
        num_slots, self._device = len(last_sampled) - 1, last_sampled.device
        self._block_size = caches[0].block_size
        self._sizes = sorted({min(size, num_slots) for size in SIZES})
        width = -(-max_context // self._block_size)
        self._tables = torch.zeros(self._sizes[-1], width, dtype=torch.int32, device=self._device)
        self._tables_of: np.ndarray | None = None  # the plan's, as they were copied last
        self._padding = np.array([[0], [0], [num_blocks * self._block_size], [1], [num_slots]], np.int32)
        self._logits: Tensor | None = None
        self._fields: dict[int, Tensor] = {}
        self._recordings: dict[int, Recording] = {}
        for size in reversed(self._sizes):  # the largest first, for the others fit into its memory
            self._fields[size] = to_device(self._padding.repeat(size, 1), self._device, torch.int32)
            self._recordings[size] = record(self._work(size))

    def takes(self, plan: StepPlan) -> bool:
        """Whether `plan` only decodes, so many sequences at most as there is a recording for.

        By what every rank knows of it, for all take the same way.
        """
        if np.count_nonzero(plan.row_use == _POOL):  # hidden states are wanted
            return False
        return (
            plan.num_seqs <= self._sizes[-1]
            and plan.has_a_row_for_each_token
            and plan.num_tokens == plan.num_seqs
        )

    def logits(self, plan: StepPlan) -> Tensor | None:
        """[S, V] float32, until the next call; None where Engine.logits is. Queued, not waited for."""
        size = self._sizes[bisect_left(self._sizes, plan.num_seqs)]
        self._fill(plan, size)
        recording = self._recordings[size]
        recording.replay()
        return None if recording.output is None else recording.output[: plan.num_seqs]

    def _fill(self, plan: StepPlan, size: int) -> None:
        fields = self._padding.repeat(size, 1)
        own = (plan.input_ids, plan.positions, plan.slot_mapping, plan.context_lens, plan.slots)
        fields[:, : plan.num_seqs] = own
        self._fields[size].copy_(staged(fields, self._device), non_blocking=True)
        tables = plan.block_tables
        if tables is not self._tables_of:
            self._tables_of = tables
            self._tables[: plan.num_seqs, : tables.shape[1]] = to_device(tables, self._device, torch.int32)
        begun, columns = begun_places(1, plan.context_lens, self._block_size)
        if len(begun):
            clear_blocks(self._caches, to_device(tables[begun, columns], self._device, torch.int64))

    def _logits_of(self, size: int, vocab_size: int) -> Tensor:
        """Where the logits of so many rows go: the same for all recordings, for one runs at a time."""
        if self._logits is None:
            shape = (self._sizes[-1], vocab_size)
            self._logits = torch.empty(shape, dtype=torch.float32, device=self._device)
        return self._logits[:size]

    def _work(self, size: int) -> Callable[[], Tensor | None]:
        """A step of `size` sequences: from the tensors that `_fill` writes to logits."""
        fields, device = self._fields[size], self._device
        tables = self._tables[:size]
        rows = torch.arange(size + 1, dtype=torch.int32, device=device)

        def work() -> Tensor | None:
            last = self._last_sampled.index_select(0, fields[_SLOTS])
            batch = Batch(
                input_ids=torch.where(fields[_INPUT_IDS] < 0, last, fields[_INPUT_IDS]),
                positions=fields[_POSITIONS],
                slot_mapping=fields[_SLOT_MAPPING],
                query_start=rows,
                context_lens=fields[_CONTEXT_LENS],
                block_tables=tables,
                logit_rows=rows[:size],
                query_start_list=list(range(size + 1)),
                context_lens_list=[0] * size,  # no host knows them, and `_fill` clears what a step begins
                max_query_len=1,
                max_context_len=tables.shape[1] * self._block_size,
            )
            with forward_context(ForwardContext(batch, self._caches)):
                hidden = self._engine.forward(batch)
            assert hidden is not None, "a pipeline's stages are not recorded"
            self.hidden_size = hidden.shape[1]
            logits = self._engine.logits(hidden)
            return None if logits is None else self._logits_of(size, logits.shape[1]).copy_(logits)

        return work
