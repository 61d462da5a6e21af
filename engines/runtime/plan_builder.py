"""From what the scheduler chose to the flat arrays of a StepPlan."""

from __future__ import annotations

from collections import deque
from functools import lru_cache

import numpy as np

from engines.runtime.block_tables import BlockTables
from engines.runtime.chunk import Chunk
from engines.runtime.faults import failed
from engines.runtime.plan import LAST_SAMPLED, Int32, RowSampling, RowUse, StepKind, StepPlan
from engines.runtime.sequence import Sequence
from engines.wire import SamplingParams

_NONE = np.empty(0, np.int32)
_CHECKING = SamplingParams(temperature=0.0)


class _Decoding:
    """What one step has in common with the next in which these sequences decode a token each."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.query_start = np.arange(len(sequences) + 1, dtype=np.int32)
        self.logit_rows = np.arange(len(sequences), dtype=np.int32)
        self.row_use = np.full(len(sequences), RowUse.SAMPLE, np.int32)
        self.sampling = tuple(sequence.sampling for sequence in sequences)
        self._version = -1  # of the block tables from which the following are
        self._block_index = _NONE  # within its sequence's table, of the block that the token goes to
        self.slots = self.slot_offsets = self.block_tables = _NONE

    def look_up(self, tables: BlockTables, positions: Int32) -> None:
        """Have the parts that depend on where the K/V lies right for these positions."""
        block_index = positions // np.int32(tables.block_size)
        if self._version == tables.version and not np.count_nonzero(block_index != self._block_index):
            return
        self._version, self._block_index = tables.version, block_index
        self.slots = np.array([sequence.slot for sequence in self.sequences], np.int32)
        self.slot_offsets = tables.slot_mapping(self.slots, positions) - positions
        self.block_tables = tables.gather(self.slots, positions + np.int32(1))


class PlanBuilder:
    """Makes the plans of a scheduler that has up to `max_plans_in_flight` of them out.

    Most steps are decoding steps of the sequences of the step before. What they share is the same object in
    both plans, so that it need not be copied to a device twice.
    """

    def __init__(self, tables: BlockTables, max_plans_in_flight: int = 1) -> None:
        self._tables = tables
        self._decoding: deque[_Decoding] = deque(maxlen=max_plans_in_flight)

    def build(self, chunks: list[Chunk]) -> StepPlan:
        """The plan that computes `chunks`, its tag from now on. Sets their first_row and num_prompt_rows."""
        if all(chunk.decodes_alike for chunk in chunks):
            return self._decode(chunks)
        return _build(chunks, self._tables)

    def _decode(self, chunks: list[Chunk]) -> StepPlan:
        sequences = [chunk.sequence for chunk in chunks]
        for row, chunk in enumerate(chunks):
            chunk.first_row = row
        positions = np.array([chunk.start for chunk in chunks], np.int32)
        kept = self._kept(sequences)
        kept.look_up(self._tables, positions)
        return StepPlan(
            kind=StepKind.RUN,
            input_ids=np.array([_first_id(chunk) for chunk in chunks], np.int32),
            positions=positions,
            slot_mapping=positions + kept.slot_offsets,
            query_start=kept.query_start,
            context_lens=positions + np.int32(1),
            slots=kept.slots,
            logit_rows=kept.logit_rows,
            row_use=kept.row_use,
            block_tables=kept.block_tables,
            sampling=kept.sampling,
            tag=chunks,
        )

    def _kept(self, sequences: list[Sequence]) -> _Decoding:
        for kept in self._decoding:
            if kept.sequences == sequences:
                return kept
        self._decoding.append(_Decoding(sequences))
        return self._decoding[-1]


def _first_id(chunk: Chunk) -> int:
    known, start = chunk.sequence.token_ids, chunk.start
    return known[start] if start < len(known) else LAST_SAMPLED


def _build(chunks: list[Chunk], tables: BlockTables) -> StepPlan:
    input_ids: list[int] = []
    rows = _Rows()
    for chunk in chunks:
        sequence = chunk.sequence
        chunk.first_row = len(rows.index)
        if sequence.num_scored is not None:
            _add_prompt_rows(rows, chunk, offset=len(input_ids) - chunk.start)
        if chunk.num_tokens == 1:
            input_ids.append(_first_id(chunk))
        else:
            input_ids += sequence.token_ids[chunk.start : chunk.end]
            input_ids += chunk.drafts
        _add_last_rows(rows, chunk, last=len(input_ids) - 1)
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    lengths = np.array([chunk.num_tokens for chunk in chunks], np.int32)
    slots = np.array([chunk.sequence.slot for chunk in chunks], np.int32)
    query_start = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(lengths, out=query_start[1:])
    offsets = np.repeat(starts - query_start[:-1], lengths)
    positions = np.arange(len(input_ids), dtype=np.int32) + offsets
    places = positions.copy()
    places[[query_start[i] for i, chunk in enumerate(chunks) if chunk.is_reread]] += 1
    context_lens = starts + lengths
    return StepPlan(
        kind=StepKind.RUN,
        input_ids=np.array(input_ids, np.int32),
        positions=positions,
        slot_mapping=tables.slot_mapping(np.repeat(slots, lengths), places),
        query_start=query_start,
        context_lens=context_lens,
        slots=slots,
        logit_rows=np.array(rows.index, np.int32),
        row_use=np.array(rows.use, np.int32),
        block_tables=tables.gather(slots, context_lens),
        sampling=tuple(rows.sampling),
        tag=chunks,
    )


class _Rows:
    """The logit rows of a plan while it is being built."""

    def __init__(self) -> None:
        self.index: list[int] = []
        self.use: list[RowUse] = []
        self.sampling: list[RowSampling] = []

    def add(self, index: int, use: RowUse, sampling: RowSampling) -> None:
        self.index.append(index)
        self.use.append(use)
        self.sampling.append(sampling)


def _add_prompt_rows(rows: _Rows, chunk: Chunk, offset: int) -> None:
    """Rows for the prompt positions of this chunk whose log-probabilities are asked for and not yet had."""
    request, num_scored = chunk.sequence.request, chunk.sequence.num_scored
    assert num_scored is not None, "prompt rows without a request for them"
    params = _scoring_params(request.prompt_logprobs or 0)
    first = max(chunk.start, num_scored - 1)
    last = min(chunk.end, len(request.prompt_ids) - 1)
    for position in range(first, last):
        target = request.prompt_ids[position + 1]
        rows.add(offset + position, RowUse.PROMPT_LOGPROBS, RowSampling(params, target_id=target))
    chunk.num_prompt_rows = max(0, last - first)


def _add_last_rows(rows: _Rows, chunk: Chunk, last: int) -> None:
    """A row for each draft, and one for the token after them; a row that is checked where none is drawn."""
    uses: list[RowUse]
    if chunk.samples and chunk.sequence.draws_alike and not chunk.drafts:
        samplings, uses = [chunk.sequence.sampling], [RowUse.SAMPLE]
    elif chunk.samples:
        try:
            samplings = [_row_sampling(chunk, i, draft) for i, draft in enumerate((*chunk.drafts, -1))]
        except Exception as error:  # in its history: its own
            chunk.sequence.error = failed("its sampling parameters", error)
            samplings = [RowSampling(_CHECKING)] * (len(chunk.drafts) + 1)
        uses = [RowUse.VERIFY] * len(chunk.drafts) + [RowUse.SAMPLE]
    elif chunk.sequence.is_finished:  # of a static batch, carried on
        return
    else:
        num_pooled = chunk.num_pooled
        samplings = [RowSampling(_CHECKING, num_pooled=num_pooled)]
        uses = [RowUse.POOL if num_pooled else RowUse.CHECK]
    first = last + 1 - len(uses)
    for index, (use, sampling) in enumerate(zip(uses, samplings, strict=True), first):
        rows.add(index, use, sampling)


def _row_sampling(chunk: Chunk, num_drafts: int, target_id: int) -> RowSampling:
    """How to draw the token that follows the first `num_drafts` drafts."""
    sequence, request = chunk.sequence, chunk.sequence.request
    num_generated = chunk.end - len(chunk.drafts) + num_drafts - len(request.prompt_ids)
    banned = tuple(sequence.stop_ids) if num_generated < request.min_tokens else ()
    if sequence.constraint is not None:
        sequence.constraint.follow(sequence.token_ids, len(request.prompt_ids))
    history = _NONE
    if sequence.needs_history:
        history = sequence.history(chunk.drafts[:num_drafts])
    return RowSampling(
        request.sampling,
        request.choice,
        len(request.prompt_ids),
        history,
        banned,
        target_id,
        sequence.constraint,
    )


@lru_cache(maxsize=64)
def _scoring_params(num_top: int) -> SamplingParams:
    """Params for rows that draw nothing: the model's own distribution."""
    return SamplingParams(temperature=0.0, logprobs=num_top)
