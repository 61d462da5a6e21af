"""The fake's model: every K/V cell holds a hash of all tokens up to there, and a token is drawn from it.

So a token depends on the whole sequence before it, on where its K/V lies (a wrong block gives other tokens),
and on what the sampler is told: penalties, bans, seed, choice, position.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import accumulate

import numpy as np

from engines.runtime.plan import RowSampling, RowUse, StepPlan, StepResult
from engines.wire import Generate, TokenLogprob

FIRST_TOKEN = 16
"""Smaller ids are never drawn: control tokens have them."""
HIDDEN_SIZE = 16
_MASK = (1 << 61) - 1
_MAX_TOKEN = 1 << 20


def chain(state: int, token_id: int) -> int:
    """The state after one more token."""
    return (state * 0x9E3779B97F4A7C15 + token_id + 1) & _MASK


def draw(state: int, sampling: RowSampling, position: int, vocab_size: int) -> int:
    """The token that follows `state`: without a temperature, of nothing else but penalties and bans."""
    params = sampling.params
    mixed = chain(state, _MAX_TOKEN)
    if params.temperature > 0:
        for value in (params.seed, sampling.choice, position):
            mixed = chain(mixed, value)
    for token_id in sampling.token_ids.tolist():
        mixed = chain(mixed, token_id)
    span = vocab_size - FIRST_TOKEN
    start = (mixed >> 16) % span
    return next(
        token_id
        for token_id in (FIRST_TOKEN + (start + step) % span for step in range(span))
        if token_id not in sampling.banned_ids
    )


def score(state: int, token_id: int, num_top: int) -> TokenLogprob:
    """A log-probability that tells one state from another."""
    value = -((chain(state, token_id) >> 16) % 10_000) / 1_000
    return TokenLogprob(value, [(token_id, value)] * min(num_top, 1))


def pooled(states: list[int]) -> np.ndarray:
    """A sum of vectors that tell one state from another."""
    vectors = [[(chain(state, place) >> 16) % 1000 + 1 for place in range(HIDDEN_SIZE)] for state in states]
    return np.array(vectors, np.float32).sum(0)


def expected_embedding(prompt_ids: list[int]) -> bytes:
    """The mean over the prompt, however often its group dies."""
    states = list(accumulate(prompt_ids, chain, initial=0))[1:]
    vector = pooled(states)
    return (vector / np.linalg.norm(vector)).astype("<f4").tobytes()


class FakeRunner:
    """Executes plans when they are collected, in order; calls `before(phase, plan)` where faults may be."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        step_seconds: float,
        before: Callable[[str, StepPlan], None],
    ) -> None:
        self._block_size, self._vocab_size = block_size, vocab_size
        self._step_seconds, self._before = step_seconds, before
        self._states = [-1] * (num_blocks * block_size)
        self._plans: deque[StepPlan] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._plans)

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def collect(self) -> tuple[StepPlan, StepResult]:
        plan = self._plans.popleft()
        until = time.perf_counter() + self._step_seconds  # as on a device, however many sequences it has
        is_prefill = plan.num_tokens > plan.num_seqs
        self._before("prefill" if is_prefill else "decode", plan)
        states = self._forward(plan)
        self._before("sample", plan)
        result = self._sample(plan, states)
        if (seconds := until - time.perf_counter()) > 0:
            time.sleep(seconds)
        return plan, result

    def _forward(self, plan: StepPlan) -> list[int]:
        """The state at every token, written where the plan says, and read through the block tables."""
        states: list[int] = []
        starts, lens = plan.query_start.tolist(), plan.context_lens.tolist()
        input_ids, slots = plan.input_ids.tolist(), plan.slot_mapping.tolist()
        for s, context_len in enumerate(lens):
            first, end = starts[s], starts[s + 1]
            state = self._read(plan.block_tables[s], context_len - (end - first) - 1)
            for t in range(first, end):
                state = self._states[slots[t]] = chain(state, input_ids[t])
                states.append(state)
        return states

    def _read(self, table: np.ndarray, position: int) -> int:
        if position < 0:
            return 0
        state = self._states[
            int(table[position // self._block_size]) * self._block_size + position % self._block_size
        ]
        assert state >= 0, f"the K/V of position {position} was never written"
        return state

    def _sample(self, plan: StepPlan, states: list[int]) -> StepResult:
        result = StepResult(np.full(len(plan.logit_rows), -1, np.int32))
        columns = (plan.logit_rows, plan.row_use, plan.drawn_positions)
        rows = zip(*(column.tolist() for column in columns), plan.sampling, strict=True)
        for row, (index, use, position, sampling) in enumerate(rows):
            state, token_id = states[index], sampling.target_id
            if use != RowUse.PROMPT_LOGPROBS:
                token_id = draw(state, sampling, position, self._vocab_size)
            result.token_ids[row] = token_id
            if use == RowUse.POOL:
                result.pooled[row] = pooled(states[index + 1 - sampling.num_pooled : index + 1])
            if sampling.params.logprobs is not None:
                result.logprobs[row] = score(state, token_id, sampling.params.logprobs)
        return result


def expected(request: Generate, vocab_size: int, eos_token_ids: Iterable[int] = ()) -> list[int]:
    """All tokens that `request` must give, however often its group dies; the end token included."""
    token_ids, state = list(request.prompt_ids), 0
    for token_id in token_ids:
        state = chain(state, token_id)
    stop_ids = {*request.stop_token_ids, *(() if request.ignore_eos else eos_token_ids)}
    params, num_prompt = request.sampling, len(request.prompt_ids)
    has_penalty = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    for index in range(request.max_tokens):
        history = np.array(token_ids if has_penalty else [], np.int32)
        banned = tuple(stop_ids) if index < request.min_tokens else ()
        sampling = RowSampling(params, request.choice, num_prompt, history, banned)
        token_ids.append(draw(state, sampling, num_prompt + index, vocab_size))
        state = chain(state, token_ids[-1])
        if token_ids[-1] in stop_ids:
            break
    return token_ids[num_prompt:]
