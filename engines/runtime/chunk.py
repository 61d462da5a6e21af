"""From what the scheduler chose to the flat arrays of a StepPlan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from engines.runtime.faults import failed
from engines.runtime.plan import LAST_SAMPLED, Int32, RowSampling, RowUse, StepKind, StepPlan
from engines.runtime.sequence import Sequence
from engines.wire import SamplingParams


@dataclass(slots=True, eq=False)
class Chunk:
    """The consecutive tokens of one sequence that one plan computes, and the rows of logits it wants: first
    those of `num_prompt_rows` prompt positions; then, if it `samples`, one for each draft and one more, else
    one that tells whether what it computed is finite.
    """

    sequence: Sequence
    start: int  # position of its first token
    num_tokens: int  # drafts included
    samples: bool
    drafts: tuple[int, ...] = ()
    first_row: int = 0
    num_prompt_rows: int = 0

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def num_rows(self) -> int:
        return self.num_prompt_rows + len(self.drafts) + 1

    @property
    def num_pooled(self) -> int:
        """Of how many of its tokens, the last ones, the hidden states are pooled."""
        pooling = self.sequence.request.pooling
        if pooling is None:
            return 0
        is_last = self.end == self.sequence.num_prompt_tokens
        return self.num_tokens if pooling.method == "mean" else int(is_last)


class BlockTables:
    """Block tables of all slots as one array, kept up to date, so that a plan's are one gather away."""

    def __init__(self, num_slots: int, max_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._tables = np.zeros((num_slots, max_blocks), np.int32)

    def write(self, slot: int, first: int, blocks: list[int]) -> None:
        self._tables[slot, first : first + len(blocks)] = blocks

    def gather(self, slots: Int32, context_lens: Int32) -> Int32:
        """[S, W], W just wide enough. Past its own context a table repeats its first block, so that what
        a kernel reads beyond what it needs is the sequence's own."""
        width = -(-int(context_lens.max()) // self.block_size)
        tables = self._tables[slots, :width]
        is_read = np.arange(0, width * self.block_size, self.block_size) < context_lens[:, None]
        return np.where(is_read, tables, tables[:, :1])

    def slot_mapping(self, token_slots: Int32, positions: Int32) -> Int32:
        """[T]: where in the K/V each token goes."""
        blocks = self._tables[token_slots, positions // self.block_size]
        return blocks * np.int32(self.block_size) + positions % np.int32(self.block_size)


class _Rows:
    """The logit rows of a plan while it is being built."""

    def __init__(self) -> None:
        self.index: list[int] = []
        self.use: list[int] = []
        self.sampling: list[RowSampling] = []

    def add(self, index: int, use: int, sampling: RowSampling) -> None:
        self.index.append(index)
        self.use.append(use)
        self.sampling.append(sampling)


def build_plan(chunks: list[Chunk], tables: BlockTables) -> StepPlan:
    """The plan that computes `chunks`, which it carries as its tag. Sets first_row and num_prompt_rows."""
    input_ids: list[int] = []
    rows = _Rows()
    for chunk in chunks:
        sequence = chunk.sequence
        chunk.first_row = len(rows.index)
        if sequence.num_scored is not None:
            _add_prompt_rows(rows, chunk, offset=len(input_ids) - chunk.start)
        if chunk.num_tokens == 1:
            known, start = sequence.token_ids, chunk.start
            input_ids.append(known[start] if start < len(known) else LAST_SAMPLED)
        else:
            input_ids += sequence.token_ids[chunk.start : chunk.end]
            input_ids += chunk.drafts
        if chunk.samples and sequence.draws_alike and not chunk.drafts:
            rows.add(len(input_ids) - 1, _SAMPLE, sequence.sampling)
        else:
            _add_last_rows(rows, chunk, last=len(input_ids) - 1)
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    lengths = np.array([chunk.num_tokens for chunk in chunks], np.int32)
    slots = np.array([chunk.sequence.slot for chunk in chunks], np.int32)
    if len(input_ids) == len(chunks):  # one token each
        query_start = np.arange(len(chunks) + 1, dtype=np.int32)
        positions, token_slots = starts, slots
    else:
        query_start = np.zeros(len(chunks) + 1, np.int32)
        np.cumsum(lengths, out=query_start[1:])
        offsets = np.repeat(starts - query_start[:-1], lengths)
        positions = np.arange(len(input_ids), dtype=np.int32) + offsets
        token_slots = np.repeat(slots, lengths)
    context_lens = starts + lengths
    return StepPlan(
        kind=StepKind.RUN,
        input_ids=np.array(input_ids, np.int32),
        positions=positions,
        slot_mapping=tables.slot_mapping(token_slots, positions),
        query_start=query_start,
        context_lens=context_lens,
        slots=slots,
        logit_rows=np.array(rows.index, np.int32),
        row_use=np.array(rows.use, np.int32),
        block_tables=tables.gather(slots, context_lens),
        sampling=tuple(rows.sampling),
        tag=chunks,
    )


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
    if chunk.samples:
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
    history = _NO_HISTORY
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


_SAMPLE = int(RowUse.SAMPLE)  # an enum's member is slow to put into an array
_NO_HISTORY = np.empty(0, np.int32)
_CHECKING = SamplingParams(temperature=0.0)


@lru_cache(maxsize=64)
def _scoring_params(num_top: int) -> SamplingParams:
    """Params for rows that draw nothing: the model's own distribution."""
    return SamplingParams(temperature=0.0, logprobs=num_top)
