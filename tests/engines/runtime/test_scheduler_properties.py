"""Whatever the pool, batch-mates, order, chunks and plans in flight: the same tokens, and no block lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from engines.runtime.pace import ByStepTime, InProportion, Pace
from engines.runtime.scheduler import ContinuousScheduler
from engines.wire import Generate, Pooling, SamplingParams
from tests.engines.runtime.fake_model import EOS, VOCAB_SIZE, FakeLeader, FakePagedRunner, expected

MAX_MODEL_LEN = 40


@dataclass(frozen=True)
class Setup:
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_cache: bool
    plans_in_flight: int
    run_ahead: bool
    max_draft_tokens: int  # 0: no drafter
    pace: Callable[[], Pace | None]


@dataclass(frozen=True)
class Arrival:
    request: Generate
    step: int
    abort_after: int | None  # rounds


class FakeDrafter:
    """Often right for choice 0 with seed 0, else wrong: both must leave the tokens as they are."""

    def draft(self, token_ids: list[int], max_tokens: int) -> list[int]:
        request = Generate(id="draft", prompt_ids=token_ids, max_tokens=max_tokens, ignore_eos=True)
        guesses = expected(request, len(token_ids) + max_tokens).token_ids
        return guesses if len(token_ids) % 3 else [(guess + 1) % VOCAB_SIZE for guess in guesses]


class FixedPace:
    """Long prompts may take more than all short ones together."""

    short_prompt = 3

    def prompt_tokens(self, num_decoding: int) -> int:
        return 7 * (num_decoding % 3)

    def took(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        assert min(num_decoding, num_prompt_tokens, seconds) >= 0


paces = st.sampled_from(
    [
        lambda: None,
        lambda: InProportion(1, 1),
        lambda: InProportion(3, 2),
        lambda: ByStepTime(1.5, short_prompt=2),
        FixedPace,
    ]
)
roomy_setups = st.builds(
    Setup,
    num_blocks=st.integers(1, 24),
    block_size=st.integers(1, 5),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(1, 24),
    prefix_cache=st.booleans(),
    plans_in_flight=st.integers(1, 3),
    run_ahead=st.booleans(),
    max_draft_tokens=st.sampled_from([0, 0, 1, 3]),
    pace=paces,
)
# what runs together soon outgrows the pool
tight_setups = st.builds(
    Setup,
    num_blocks=st.integers(10, 16),
    block_size=st.integers(2, 3),
    max_num_seqs=st.integers(3, 6),
    max_num_batched_tokens=st.integers(8, 40),
    prefix_cache=st.booleans(),
    plans_in_flight=st.integers(1, 3),
    run_ahead=st.booleans(),
    max_draft_tokens=st.sampled_from([0, 0, 2]),
    pace=paces,
)
setups = st.one_of(roomy_setups, tight_setups)
samplings = st.builds(
    SamplingParams,
    seed=st.integers(0, 1),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    logprobs=st.sampled_from([None, None, 0]),
)
# few different tokens, so that prefixes are shared
prompts = st.lists(st.integers(1, 2), min_size=1, max_size=20)
aborts = st.sampled_from([None, None, None, 0, 1, 2, 5])


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    """Requests with ids, some of them in groups that share a prompt."""
    result: list[Arrival] = []
    for r in range(draw(st.integers(1, 5))):
        prompt = draw(prompts)
        num_choices = draw(st.sampled_from([1, 1, 2, 4]))
        sampling = draw(samplings)
        prompt_logprobs = draw(st.sampled_from([None, None, 1]))
        pooling = draw(st.sampled_from([None, None, None, Pooling(method="mean"), Pooling(method="last")]))
        if pooling is not None:
            request = Generate(id=f"{r}", prompt_ids=prompt, max_tokens=0, pooling=pooling)
            result.append(Arrival(request, draw(st.integers(0, 8)), draw(aborts)))
            continue
        for choice in range(num_choices):
            request = Generate(
                id=f"{r}.{choice}",
                prompt_ids=prompt,
                max_tokens=draw(st.one_of(st.integers(0, 12), st.just(20))),
                min_tokens=draw(st.sampled_from([0, 0, 3])),
                stop_token_ids=draw(st.sampled_from([[], [5, 7]])),
                ignore_eos=draw(st.sampled_from([True, True, False])),
                sampling=sampling,
                choice=choice,
                group=f"g{r}" if num_choices > 1 else "",
                resume_token_ids=draw(st.sampled_from([[], [], [3, 1, 4]])),
                prompt_logprobs=prompt_logprobs,
            )
            result.append(Arrival(request, draw(st.integers(0, 8)), draw(aborts)))
    return result


def make(setup: Setup) -> tuple[ContinuousScheduler, FakeLeader]:
    scheduler = ContinuousScheduler(
        num_blocks=setup.num_blocks,
        block_size=setup.block_size,
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=[EOS],
        prefix_cache=setup.prefix_cache,
        max_plans_in_flight=setup.plans_in_flight,
        run_ahead=setup.run_ahead,
        drafter=FakeDrafter() if setup.max_draft_tokens else None,
        max_draft_tokens=setup.max_draft_tokens,
        pace=setup.pace(),
    )
    runner = FakePagedRunner(setup.num_blocks, setup.block_size, setup.max_num_seqs)
    return scheduler, FakeLeader(scheduler, runner, setup.plans_in_flight)


def run(setup: Setup, work: list[Arrival], submits: list[int]) -> tuple[ContinuousScheduler, FakeLeader]:
    """Rounds of: arrivals, aborts, some submissions, one collection; everything is checked after each."""
    scheduler, leader = make(setup)
    clock = 0
    while scheduler.has_work or any(arrival.step >= clock for arrival in work):
        for arrival in work:
            if arrival.step == clock:
                leader.add(arrival.request)
        scheduler.check()
        for _ in range(submits[clock % len(submits)]):
            leader.submit()
            scheduler.check()
        for arrival in work:
            if arrival.abort_after is not None and arrival.step + arrival.abort_after == clock:
                scheduler.abort(arrival.request.id)
                scheduler.check()
        leader.collect()
        scheduler.check()
        clock += 1
        assert clock < step_bound(work), "a request is starved"
    return scheduler, leader


def step_bound(work: list[Arrival]) -> int:
    """Enough to compute every token of every request alone, again after each token of an older one."""
    num_tokens = sum(len(a.request.prompt_ids) + a.request.max_tokens + 3 for a in work)
    return 3 * (20 + num_tokens * (1 + len(work)))


@settings(max_examples=400)
@given(setups, arrivals(), st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_same_tokens_and_no_block_lost(setup: Setup, work: list[Arrival], submits: list[int]) -> None:
    scheduler, leader = run(setup, work, submits)
    stats = scheduler.stats(0)
    assert stats.num_running == stats.num_waiting == stats.num_blocks_used == 0
    assert stats.num_blocks_free + stats.num_blocks_cached == setup.num_blocks
    for arrival in work:
        check_output(arrival, leader, scheduler.max_model_len)


def check_output(arrival: Arrival, leader: FakeLeader, max_model_len: int) -> None:
    request = arrival.request
    output = leader.outputs.by_id.get(request.id)
    want = expected(request, max_model_len)
    if output is None or not output.has_ended:
        assert arrival.abort_after is not None, "it never ended"
        assert output is None or output.token_ids == want.token_ids[: len(output.token_ids)]
    elif output.error is not None:
        num_tokens = len(request.prompt_ids) + len(request.resume_token_ids)
        assert output.error.code == "too_long"
        assert num_tokens >= max_model_len
    else:
        assert output == want
