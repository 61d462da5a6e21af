"""Static batching, for engines that keep their own K/V: a batch starts as one and is over when all of it is.

Such an engine takes one batch at a time, whose rows have one length (it cannot skip padding) and none of
which can leave. So a row that has ended is carried on, its last token fed again and again, and nothing of
it is sampled. Every plan computes the whole batch: first the prompts, then a token a row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from engines.runtime.block_tables import BlockTables
from engines.runtime.chunk import Chunk
from engines.runtime.grammar import Grammars
from engines.runtime.intake import Intake
from engines.runtime.outcome import has_ended, take_result
from engines.runtime.plan import StepKind, StepPlan, StepResult
from engines.runtime.plan_builder import PlanBuilder
from engines.runtime.sequence import Sequence
from engines.wire import Generate, RequestError, Stats, TokenDelta


class StaticScheduler:
    """A Scheduler. Each batch has the oldest queued sequence and others of its length, at most `batch_size`.

    It starts when it is full or its oldest has waited `max_batch_delay` seconds; `now` gives the time in
    seconds. `slots` are rows. In the plan each row has one block, as long as a sequence may get.
    """

    def __init__(
        self,
        batch_size: int,
        max_batch_delay: float,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        now: Callable[[], float],
        min_prompt_len: int = 1,
        vocab_size: int = 2**31,
        grammars: Grammars | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.max_batch_delay = max_batch_delay
        self.max_model_len = max_model_len
        self.min_prompt_len = min_prompt_len  # shorter ones look like a decoding step to some engines
        self._now = now
        self._intake = Intake(max_model_len, eos_token_ids, False, vocab_size, grammars)
        tables = BlockTables(batch_size, 1, max_model_len)
        for row in range(batch_size):
            tables.write(row, 0, [row])
        self._plans = PlanBuilder(tables)
        self._sequences: dict[str, Sequence] = {}  # queued and running, not those carried on
        self._queue: OrderedDict[str, Sequence] = OrderedDict()
        self._arrived: dict[str, float] = {}  # of those queued
        self._batch: list[Sequence] = []
        self._is_in_flight = False
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences) or self._is_in_flight

    def add(self, request: Generate) -> list[TokenDelta]:
        if request.id in self._sequences:
            message = f"a sequence with the id {request.id!r} is already running"
            return [TokenDelta(id=request.id, error=RequestError("invalid_request", message))]
        taken = self._intake.take(request)
        if isinstance(taken, TokenDelta):
            return [taken]
        if len(taken.token_ids) < self.min_prompt_len:
            message = f"the prompt has {len(taken.token_ids)} token; this engine needs {self.min_prompt_len}"
            return [TokenDelta(id=request.id, error=RequestError("invalid_request", message))]
        self._sequences[taken.id] = self._queue[taken.id] = taken
        self._arrived[taken.id] = self._now()
        return []

    def abort(self, id: str) -> None:
        sequence = self._sequences.pop(id, None)
        if sequence is not None:
            sequence.is_finished = True
            self._queue.pop(id, None)
            self._arrived.pop(id, None)

    def took(self, plan: StepPlan, seconds: float) -> None:
        """A batch starts as one: its prompts delay nobody who decodes."""

    def audit(self) -> None:
        """The engine owns its K/V: there are no accounts."""

    def stats(self, num_steps: int) -> Stats:
        return Stats(
            num_steps=num_steps,
            num_running=len(self._sequences) - len(self._queue),
            num_waiting=len(self._queue),
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
        )

    def schedule(self) -> StepPlan:
        """IDLE while a plan is in flight, or while a batch may still fill up."""
        if self._is_in_flight:
            return StepPlan.empty(StepKind.IDLE)
        if all(sequence.is_finished for sequence in self._batch):
            self._batch = self._next_batch()
        if not self._batch:
            return StepPlan.empty(StepKind.IDLE)
        self._is_in_flight = True
        return self._plans.build([_next_chunk(sequence) for sequence in self._batch])

    def _next_batch(self) -> list[Sequence]:
        """Empty while it is better to wait."""
        ready = [sequence for sequence in self._queue.values() if sequence.is_ready]
        if not ready:
            return []
        oldest = ready[0]
        length = len(oldest.token_ids)
        batch = [sequence for sequence in ready if len(sequence.token_ids) == length][: self.batch_size]
        if len(batch) < self.batch_size and self._now() - self._arrived[oldest.id] < self.max_batch_delay:
            return []
        for row, sequence in enumerate(batch):
            self._start(sequence, row)
        return batch

    def _start(self, sequence: Sequence, row: int) -> None:
        del self._queue[sequence.id], self._arrived[sequence.id]
        sequence.slot = row
        sequence.num_cached_tokens = 0
        self._num_prompt_tokens += sequence.num_prompt_tokens

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        chunks = plan.tag
        assert isinstance(chunks, list), "not a plan of schedule()"
        self._is_in_flight = False
        token_ids: list[int] = result.token_ids.tolist()
        deltas = []
        for chunk in chunks:
            if not chunk.sequence.is_finished:
                delta = take_result(chunk, token_ids, result)
                if delta is not None:
                    deltas.append(self._count(delta))
            if len(chunk.sequence.token_ids) == chunk.end:  # it took no token: carried on
                chunk.sequence.token_ids.append(chunk.sequence.token_ids[-1])
        return deltas

    def _count(self, delta: TokenDelta) -> TokenDelta:
        self._num_generated_tokens += len(delta.token_ids)
        if has_ended(delta):
            self._sequences.pop(delta.id).is_finished = True
        return delta


def _next_chunk(sequence: Sequence) -> Chunk:
    """All its tokens that have not been computed; one that has ended samples nothing."""
    start = sequence.num_computed_tokens
    samples = not sequence.is_finished and len(sequence.token_ids) < sequence.max_len
    chunk = Chunk(sequence, start, len(sequence.token_ids) - start, samples)
    sequence.num_computed_tokens = chunk.end
    sequence.num_unknown_tokens += samples
    return chunk
