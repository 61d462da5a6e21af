"""A model whose only state is a paged K/V memory, and the tokens it must give when nothing goes wrong.

Every K/V cell holds a hash chained over all tokens before it. A step reads every cell of its context
through its block table and checks the chain, so a wrong slot, a block taken over by another sequence,
or a prefix that was never computed fails at once or gives other tokens than `expected`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.runtime.plan import LAST_SAMPLED, RowSampling, RowUse, StepKind, StepPlan, StepResult
from engines.runtime.scheduler import Scheduler
from engines.wire import FinishReason, Generate, RequestError, TokenDelta, TokenLogprob

VOCAB_SIZE = 12
EOS = 0


def chain(parent: int, token_id: int, position: int) -> int:
    return hash((parent, token_id, position))


def draw(
    state: int, params_seed: int, choice: int, position: int, history: tuple[int, ...], banned: frozenset[int]
) -> int:
    """The next token: a function of the prefix, and of what the sampler is told about the row."""
    start = hash((state, params_seed, choice, position, history)) % VOCAB_SIZE
    return next(t % VOCAB_SIZE for t in range(start, start + VOCAB_SIZE) if t % VOCAB_SIZE not in banned)


def score(state: int, token_id: int) -> TokenLogprob:
    return TokenLogprob(-float(hash((state, token_id)) % 1000))


def pooled(states: list[int]) -> NDArray[np.float32]:
    """Whole numbers, whose sums are exact."""
    vectors = [[hash((state, place)) % 1000 + 1 for place in range(3)] for state in states]
    return np.array(vectors, np.float32).sum(0)


@dataclass(frozen=True)
class Cell:
    position: int
    token_id: int
    state: int


class FakePagedRunner:
    """Executes plans from their packed bytes when they are collected, in order."""

    def __init__(self, num_blocks: int, block_size: int, num_slots: int) -> None:
        self.block_size = block_size
        self.cells: list[Cell | None] = [None] * (num_blocks * block_size)
        self.last_sampled = [-1] * num_slots
        self.plans: deque[tuple[StepPlan, bytes]] = deque()
        self.num_tokens_computed = 0

    def submit(self, plan: StepPlan) -> None:
        self.plans.append((plan, plan.pack()))

    def collect(self) -> tuple[StepPlan, StepResult]:
        plan, packed = self.plans.popleft()
        return plan, self.execute(StepPlan.unpack(packed), plan.sampling)

    def execute(self, plan: StepPlan, sampling: tuple[RowSampling, ...]) -> StepResult:
        states = [0] * plan.num_tokens
        for s in range(plan.num_seqs):
            self._forward(plan, s, states)
        self.num_tokens_computed += plan.num_tokens
        result = StepResult(np.full(len(plan.logit_rows), -1, np.int32))
        for row, (index, use) in enumerate(zip(plan.logit_rows.tolist(), plan.row_use.tolist(), strict=True)):
            position = int(plan.positions[index]) + 1
            self._sample(result, row, states[index], RowUse(use), sampling[row], position)
            if use == RowUse.POOL:
                result.pooled[row] = pooled(states[index + 1 - sampling[row].num_pooled : index + 1])
        self._remember(plan, result)
        return result

    def _forward(self, plan: StepPlan, s: int, states: list[int]) -> None:
        """Write this sequence's new cells, each only after every cell before it has been read."""
        first, end = int(plan.query_start[s]), int(plan.query_start[s + 1])
        context_len = int(plan.context_lens[s])
        assert end - first >= 1
        assert plan.positions[first:end].tolist() == list(range(context_len - (end - first), context_len))
        table = plan.block_tables[s].tolist()
        state = 0
        for position in range(context_len - (end - first)):
            state = self._read(table, position, state)
        for t in range(first, end):
            position, token_id = int(plan.positions[t]), int(plan.input_ids[t])
            if token_id == LAST_SAMPLED:
                token_id = self.last_sampled[plan.slots[s]]
            assert 0 <= token_id < VOCAB_SIZE
            state = states[t] = chain(state, token_id, position)
            cell, place = Cell(position, token_id, state), self._cell_index(table, position)
            if plan.slot_mapping[t] != place:  # computed again, for its logits: its cell is others' as well
                assert end - first == 1
                assert self.cells[place] == cell
                assert plan.slot_mapping[t] // self.block_size not in table
                assert plan.slot_mapping[t] % self.block_size == 0
            self.cells[plan.slot_mapping[t]] = cell

    def _read(self, table: list[int], position: int, parent: int) -> int:
        cell = self.cells[self._cell_index(table, position)]
        assert cell is not None, f"position {position} was never written"
        assert cell.position == position, f"position {position} holds that of another"
        assert cell.state == chain(parent, cell.token_id, position), "a token of another sequence"
        return cell.state

    def _cell_index(self, table: list[int], position: int) -> int:
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def _sample(
        self, result: StepResult, row: int, state: int, use: RowUse, sampling: RowSampling, position: int
    ) -> None:
        history = tuple(sampling.token_ids.tolist())
        token_id = sampling.target_id
        if use in (RowUse.SAMPLE, RowUse.VERIFY):
            banned = frozenset(sampling.banned_ids)
            params = sampling.params
            token_id = draw(state, params.seed, sampling.choice, position, history, banned)
        result.token_ids[row] = token_id
        if sampling.params.logprobs is not None:
            result.logprobs[row] = score(state, token_id)

    def _remember(self, plan: StepPlan, result: StepResult) -> None:
        for row, (index, use) in enumerate(zip(plan.logit_rows, plan.row_use, strict=True)):
            if use == RowUse.SAMPLE:
                s = int(np.searchsorted(plan.query_start, index, side="right")) - 1
                self.last_sampled[plan.slots[s]] = int(result.token_ids[row])


@dataclass
class Output:
    """What a sequence's deltas add up to."""

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None = None
    is_stop_token: bool = False
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: RequestError | None = None
    embedding: bytes = b""

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None


def expected(request: Generate, max_model_len: int, eos: int = EOS) -> Output:
    """What `request` gives when it is alone and nothing is cached, chunked or preempted."""
    token_ids = [*request.prompt_ids, *request.resume_token_ids]
    state, states = 0, []
    for position, token_id in enumerate(token_ids):
        state = chain(state, token_id, position)
        states.append(state)
    output = Output([], [])
    if request.pooling is not None:
        vector = pooled(states if request.pooling.method == "mean" else states[-1:])
        return Output([], [], "stop", embedding=(vector / np.linalg.norm(vector)).tobytes())
    if request.prompt_logprobs is not None and not request.resume_token_ids:
        scored = zip(states, request.prompt_ids[1:], strict=False)
        output.prompt_logprobs = [None, *(score(s, target) for s, target in scored)]
    _generate(request, token_ids, state, output, max_model_len, eos)
    return output


def stop_ids_of(request: Generate, eos: int = EOS) -> frozenset[int]:
    return frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else {eos})


def has_penalty(request: Generate) -> bool:
    s = request.sampling
    return (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) != (0.0, 0.0, 1.0)


def _generate(
    request: Generate, token_ids: list[int], state: int, output: Output, max_model_len: int, eos: int
) -> None:
    stop_ids = stop_ids_of(request, eos)
    num_prompt = len(request.prompt_ids)
    max_len = min(num_prompt + request.max_tokens, max_model_len)
    if len(token_ids) > num_prompt and token_ids[-1] in stop_ids:
        output.finish_reason = "stop"
    while output.finish_reason is None and len(token_ids) < max_len:
        banned = stop_ids if len(token_ids) - num_prompt < request.min_tokens else frozenset[int]()
        history = tuple(token_ids) if has_penalty(request) else ()
        sampling = request.sampling
        token_id = draw(state, sampling.seed, request.choice, len(token_ids), history, banned)
        output.token_ids.append(token_id)
        if sampling.logprobs is not None:
            output.logprobs.append(score(state, token_id))
        state = chain(state, token_id, len(token_ids))
        token_ids.append(token_id)
        if token_id in stop_ids:
            output.finish_reason, output.is_stop_token = "stop", True
    output.finish_reason = output.finish_reason or "length"


class Outputs:
    """Adds deltas up, and checks what each of them may hold."""

    def __init__(self) -> None:
        self.by_id: dict[str, Output] = {}
        self.num_cached: dict[str, int] = {}

    def __getitem__(self, id: str) -> Output:
        return self.by_id[id]

    def take(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            is_first = delta.id not in self.by_id
            output = self.by_id.setdefault(delta.id, Output([], []))
            assert not output.has_ended, "a delta after the last"
            assert is_first or delta.num_cached_tokens is None
            if delta.prompt_logprobs:
                assert not output.token_ids, "the prompt's come first"
                output.prompt_logprobs = [*(output.prompt_logprobs or []), *delta.prompt_logprobs]
            if is_first:
                self.num_cached[delta.id] = delta.num_cached_tokens or 0
            output.token_ids += delta.token_ids
            output.embedding += delta.embedding
            output.logprobs += delta.logprobs
            output.finish_reason, output.error = delta.finish_reason, delta.error
            output.is_stop_token = delta.is_stop_token

    def ended(self, id: str) -> bool:
        return id in self.by_id and self.by_id[id].has_ended


class FakeLeader:
    """The leader's loop without sockets: submit what can be submitted, collect one plan."""

    def __init__(self, scheduler: Scheduler, runner: FakePagedRunner, plans_in_flight: int = 1) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.plans_in_flight = plans_in_flight
        self.outputs = Outputs()
        self.num_steps = 0
        self.plans: list[StepPlan] = []

    def add(self, request: Generate) -> None:
        self.outputs.take(self.scheduler.add(request))

    def submit(self) -> bool:
        """Whether there was a plan to submit."""
        if len(self.runner.plans) >= self.plans_in_flight or not self.scheduler.has_work:
            return False
        plan = self.scheduler.schedule()
        if plan.kind != StepKind.RUN:
            assert self.runner.plans, "work that waits for nothing was not scheduled"
            return False
        self.plans.append(plan)
        self.runner.submit(plan)
        return True

    def collect(self) -> None:
        if self.runner.plans:
            self.num_steps += 1
            plan, result = self.runner.collect()
            self.outputs.take(self.scheduler.update(plan, result))
            self.scheduler.took(plan, 0.001 * (4 + plan.num_tokens))

    def step(self) -> None:
        while self.submit():
            pass
        self.collect()

    def run(self, max_steps: int = 2000) -> Outputs:
        while self.scheduler.has_work:
            assert self.num_steps < max_steps, "it does not end"
            self.step()
        return self.outputs
