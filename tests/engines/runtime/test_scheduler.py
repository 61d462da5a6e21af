"""Continuous batching, one behaviour at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engines.runtime.pace import ByStepTime, InProportion
from engines.runtime.plan import LAST_SAMPLED, RowUse, StepKind, StepResult
from engines.runtime.scheduler import ContinuousScheduler
from engines.wire import Generate, RequestError, SamplingParams
from tests.engines.runtime.fake_model import EOS, FakeLeader, FakePagedRunner, expected


def make(
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 200,
    plans_in_flight: int = 1,
    **more: Any,
) -> tuple[ContinuousScheduler, FakeLeader]:
    scheduler = ContinuousScheduler(
        num_blocks,
        block_size,
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len,
        [EOS],
        max_plans_in_flight=plans_in_flight,
        **more,
    )
    runner = FakePagedRunner(num_blocks, block_size, max_num_seqs)
    return scheduler, FakeLeader(scheduler, runner, plans_in_flight)


def request(
    id: str = "a", prompt_len: int = 10, max_tokens: int = 5, first: int = 1, **more: Any
) -> Generate:
    """Prompts with different `first` tokens share nothing."""
    prompt = [first, *(2 + i % 7 for i in range(prompt_len - 1))]
    return Generate(id=id, prompt_ids=prompt, max_tokens=max_tokens, **{"ignore_eos": True, **more})


def assert_expected(leader: FakeLeader, *requests: Generate, max_model_len: int = 200) -> None:
    for r in requests:
        assert leader.outputs[r.id] == expected(r, max_model_len), r.id


# ---------------------------------------------------------------------- batches and budgets


def test_a_long_prompt_is_computed_in_chunks_beside_a_running_one() -> None:
    _, leader = make(max_num_batched_tokens=8)
    first, second = request("first", 4, 10, first=1), request("second", 30, 2, first=2)
    leader.add(first)
    leader.step()
    leader.add(second)
    leader.run()
    assert all(plan.num_tokens <= 8 for plan in leader.plans)
    sizes = [np.diff(plan.query_start).tolist() for plan in leader.plans[1:6]]
    assert sizes == [[1, 7], [1, 7], [1, 7], [1, 7], [1, 2]]
    assert_expected(leader, first, second)


def test_in_a_pipeline_decoding_sequences_do_not_wait_for_long_prompts() -> None:
    _, leader = make(max_num_batched_tokens=20, pace=InProportion(4, 1))
    first, second = request("first", 24, 10, first=1), request("second", 30, 2, first=2)
    leader.add(first)
    leader.step()
    leader.step()
    leader.add(second)
    leader.run()
    sizes = [np.diff(plan.query_start).tolist() for plan in leader.plans[:5]]
    assert sizes == [[20], [4], [1, 4], [1, 4], [1, 4]]  # whole steps for prompts while none decodes
    assert_expected(leader, first, second)


def test_only_the_last_chunk_of_a_prompt_samples() -> None:
    _, leader = make(max_num_batched_tokens=4)
    leader.add(request(prompt_len=10, max_tokens=1))
    leader.run()
    assert [plan.row_use.tolist() for plan in leader.plans] == [
        [RowUse.CHECK],
        [RowUse.CHECK],
        [RowUse.SAMPLE],
    ]


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler, leader = make(max_num_seqs=2)
    requests = [request(str(i), first=i) for i in range(5)]
    for r in requests:
        leader.add(r)
    leader.step()
    assert (scheduler.stats(0).num_running, scheduler.stats(0).num_waiting) == (2, 3)
    leader.run()
    assert_expected(leader, *requests)


def test_first_tokens_come_in_the_order_of_arrival() -> None:
    _, leader = make(num_blocks=12, max_num_seqs=3, max_num_batched_tokens=16)
    requests = [request(str(i), prompt_len=5 + 3 * (i % 4), first=i) for i in range(10)]
    for r in requests:
        leader.add(r)
    assert list(leader.run().by_id) == [r.id for r in requests]


def test_an_old_request_is_not_starved_by_a_stream_of_new_ones() -> None:
    """It needs nearly the whole pool, and a small one arrives in every round."""
    scheduler, leader = make(num_blocks=10, max_num_seqs=4, max_num_batched_tokens=8)
    old = request("old", prompt_len=30, max_tokens=8)
    for i in range(3):
        leader.add(request(f"before{i}", first=2 + i))
    leader.add(old)
    for i in range(100):
        leader.add(request(f"after{i}", 6, 3, first=i % 12))
        leader.step()
        scheduler.check()
    assert leader.outputs.ended("old")
    assert_expected(leader, old, max_model_len=scheduler.max_model_len)


# ---------------------------------------------------------------------- out of blocks


def test_the_youngest_is_preempted_and_resumes_first() -> None:
    scheduler, leader = make(num_blocks=8, max_num_seqs=2, prefix_cache=False)
    requests = [
        request("old", 12, 12, first=1),
        request("young", 12, 12, first=2),
        request("next", 4, 2, first=3),
    ]
    for r in requests:
        leader.add(r)
    while not scheduler.stats(0).num_preemptions:
        leader.step()
    assert not leader.outputs.ended("old")
    assert scheduler.stats(0).num_running == 1
    leader.run()
    assert list(leader.outputs.by_id) == ["old", "young", "next"]
    assert_expected(leader, *requests, max_model_len=scheduler.max_model_len)


def test_prompt_logprobs_are_reported_once_and_whole_in_spite_of_preemption() -> None:
    scheduler, leader = make(num_blocks=8, max_num_seqs=2, max_num_batched_tokens=3)
    requests = [request("old", 8, 24, first=1), request("scored", 16, 8, first=2, prompt_logprobs=0)]
    for r in requests:
        leader.add(r)
    leader.run()
    assert scheduler.stats(0).num_preemptions > 0
    assert_expected(leader, *requests, max_model_len=scheduler.max_model_len)
    scored = [plan.logit_rows[plan.row_use == RowUse.PROMPT_LOGPROBS] for plan in leader.plans]
    assert sum(map(len, scored)) == 15, "no position was scored twice"


def test_prompt_logprobs_are_sent_as_they_are_computed() -> None:
    """What a long prompt gives is never in one frame, nor kept."""
    scheduler, leader = make(max_num_batched_tokens=4)
    leader.add(request("scored", 10, 2, prompt_logprobs=0))
    counts, tokens = [], 0
    while scheduler.has_work:
        leader.runner.submit(scheduler.schedule())
        for delta in scheduler.update(*leader.runner.collect()):
            counts.append(len(delta.prompt_logprobs))
            tokens += len(delta.token_ids)
    assert counts == [5, 4, 1, 0], "the first token's None, a chunk's each, none once tokens come"
    assert tokens == 2


def test_a_sequence_ends_where_its_model_or_the_pool_ends() -> None:
    scheduler, leader = make(num_blocks=3, block_size=4)
    assert scheduler.max_model_len == 12
    leader.add(request(prompt_len=10, max_tokens=50))
    output = leader.run()["a"]
    assert (len(output.token_ids), output.finish_reason) == (2, "length")


# ---------------------------------------------------------------------- refusals and ends


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler, _ = make(max_model_len=20)
    (delta,) = scheduler.add(request(prompt_len=20))
    assert delta.error is not None
    assert delta.error.code == "too_long"
    assert "20 tokens" in delta.error.message
    assert not scheduler.has_work


def test_an_empty_prompt_and_an_id_in_use_are_refused() -> None:
    scheduler, _ = make()
    (delta,) = scheduler.add(Generate(id="a", prompt_ids=[], max_tokens=1))
    assert delta.error is not None
    assert delta.error.code == "invalid_request"
    assert scheduler.add(request("a")) == []
    (delta,) = scheduler.add(request("a"))
    assert delta.error is not None
    assert "already running" in delta.error.message
    assert scheduler.stats(0).num_waiting == 1


def test_an_end_token_ends_it_and_is_counted_but_marked() -> None:
    _, leader = make()
    free = request(max_tokens=20)
    stop = expected(free, 200).token_ids[4]
    stopped = request("b", max_tokens=20, stop_token_ids=[stop])
    leader.add(stopped)
    output = leader.run()["b"]
    assert output.token_ids[-1] == stop
    assert (output.finish_reason, output.is_stop_token) == ("stop", True)
    assert_expected(leader, stopped)


def test_end_tokens_are_banned_before_min_tokens() -> None:
    _, leader = make()
    leader.add(request(max_tokens=6, min_tokens=3, ignore_eos=False, stop_token_ids=[3]))
    leader.run()
    banned = [set(plan.sampling[0].banned_ids) for plan in leader.plans]
    assert banned[:3] == [{EOS, 3}] * 3
    assert not any(banned[3:])


def test_an_error_ends_its_sequence_only() -> None:
    scheduler, leader = make()
    requests = [request("good", first=1), request("bad", first=2), request("fine", first=3)]
    for r in requests:
        leader.add(r)
    plan = scheduler.schedule()
    leader.runner.submit(plan)
    _, result = leader.runner.collect()
    result = StepResult(result.token_ids, result.logprobs, {1: RequestError("internal", "the grammar")})
    leader.outputs.take(scheduler.update(plan, result))
    error = leader.outputs["bad"].error
    assert error is not None
    assert "grammar" in error.message
    leader.run()
    scheduler.check()
    assert_expected(leader, requests[0], requests[2])


def test_resumed_tokens_count_but_are_not_sent_again() -> None:
    whole = request(max_tokens=8, sampling=SamplingParams(presence_penalty=1.0, seed=3))
    tokens = expected(whole, 200).token_ids
    _, leader = make()
    leader.add(
        request("b", max_tokens=8, sampling=whole.sampling, resume_token_ids=tokens[:5], prompt_logprobs=1)
    )
    output = leader.run()["b"]
    assert output.token_ids == tokens[5:]
    assert output.prompt_logprobs is None, "they were sent with the first token"


def test_what_is_said_once_is_not_said_again_of_a_resumed_sequence() -> None:
    scheduler, leader = make()
    leader.add(request("b", max_tokens=8, resume_token_ids=[1, 2]))
    plan = scheduler.schedule()
    leader.runner.submit(plan)
    (delta,) = scheduler.update(*leader.runner.collect())
    assert (delta.num_cached_tokens, len(delta.token_ids)) == (None, 1)


def test_a_resumed_sequence_as_long_as_the_model_goes_has_ended() -> None:
    scheduler, _ = make()
    tokens = [5] * (scheduler.max_model_len - 4)
    (delta,) = scheduler.add(request(prompt_len=4, max_tokens=10_000, resume_token_ids=tokens))
    assert (delta.finish_reason, delta.token_ids) == ("length", [])


@pytest.mark.parametrize(("stop_ids", "reason"), [([9], "stop"), ([], "length")])
def test_what_had_ended_before_it_was_resumed_ends_at_once(stop_ids: list[int], reason: str) -> None:
    scheduler, _ = make()
    (delta,) = scheduler.add(request(max_tokens=3, resume_token_ids=[5, 7, 9], stop_token_ids=stop_ids))
    assert (delta.finish_reason, delta.token_ids) == (reason, [])
    assert not scheduler.has_work


def test_a_prompt_can_be_scored_without_generating() -> None:
    _, leader = make(max_num_batched_tokens=4)
    scored = request(max_tokens=0, prompt_logprobs=0)
    leader.add(scored)
    leader.run()
    assert_expected(leader, scored)


# ---------------------------------------------------------------------- abort


def test_abort_frees_at_once_even_what_is_in_flight() -> None:
    """The blocks go to the next sequence while the plan that writes them is still out."""
    scheduler, leader = make(num_blocks=4, plans_in_flight=2)
    leader.add(request("gone", 12, first=1))
    assert leader.submit()
    scheduler.abort("gone")
    assert scheduler.stats(0).num_blocks_used == 0
    assert scheduler.has_work, "the plan has to come back"
    after = request("after", 14, 2, first=2)
    leader.add(after)
    assert leader.submit()
    outputs = leader.run()
    assert "gone" not in outputs.by_id
    assert_expected(leader, after, max_model_len=scheduler.max_model_len)


def test_abort_of_a_queued_and_of_an_unknown_one() -> None:
    scheduler, leader = make(max_num_seqs=1)
    leader.add(request("a", first=1))
    leader.add(request("b", first=2))
    leader.step()
    scheduler.abort("b")
    scheduler.abort("b")
    scheduler.abort("never seen")
    assert scheduler.stats(0).num_waiting == 0
    assert "b" not in leader.run().by_id


# ---------------------------------------------------------------------- shared blocks


def test_a_prefix_is_read_and_its_last_token_computed() -> None:
    scheduler, leader = make()
    leader.add(request("a", 16, 3))
    leader.run()
    before = leader.runner.num_tokens_computed
    leader.add(request("b", 16, 1))
    leader.run()
    assert leader.outputs.num_cached["b"] == 15, "the last token's logits are needed"
    assert leader.runner.num_tokens_computed - before == 1
    stats = scheduler.stats(0)
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (32, 15)


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    _, leader = make()
    first = request("a", 10, 10)
    leader.add(first)
    reply = leader.run()["a"].token_ids
    leader.add(Generate(id="b", prompt_ids=[*first.prompt_ids, *reply, 5], max_tokens=1))
    leader.run()
    assert leader.outputs.num_cached["b"] == 16, "19 tokens were computed: four full blocks"


def test_other_salts_share_nothing() -> None:
    _, leader = make()
    for id, salt in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        leader.add(request(id, 16, 1, cache_salt=salt))
        leader.run()
    assert leader.outputs.num_cached == {"a": 0, "b": 0, "c": 15}


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_siblings_compute_their_prompt_once(prefix_cache: bool) -> None:
    _, leader = make(prefix_cache=prefix_cache, max_num_batched_tokens=6)
    requests = [request(str(i), 17, 1, group="g", choice=i) for i in range(4)]
    for r in requests:
        leader.add(r)
    other = request("other", 3, 1, first=9)
    leader.add(other)
    leader.run()
    assert leader.runner.num_tokens_computed == 17 + 3 * 1 + 3
    assert_expected(leader, *requests, other)


def test_a_waiting_sibling_lets_others_pass() -> None:
    _, leader = make()
    for i in range(2):
        leader.add(request(f"g{i}", 17, 3, group="g", choice=i))
    leader.add(request("other", 3, 3, first=9))
    leader.step()
    assert set(leader.outputs.by_id) == {"g0", "other"}


def test_siblings_go_on_when_the_one_they_wait_for_is_aborted() -> None:
    scheduler, leader = make(max_num_batched_tokens=6)
    requests = [request(str(i), 17, 2, group="g", choice=i) for i in range(3)]
    for r in requests:
        leader.add(r)
    leader.step()
    scheduler.abort("0")
    leader.run()
    assert_expected(leader, *requests[1:])


def test_without_a_prefix_cache_strangers_share_nothing() -> None:
    _, leader = make(prefix_cache=False)
    for id in "ab":
        leader.add(request(id, 16, 1))
        leader.run()
    assert leader.runner.num_tokens_computed == 32


# ---------------------------------------------------------------------- several plans in flight


def test_plans_in_flight_are_disjoint_and_share_the_sequences() -> None:
    scheduler, leader = make(plans_in_flight=2)
    requests = [request(str(i), first=i) for i in range(6)]
    for r in requests:
        leader.add(r)
    assert leader.submit()
    assert leader.submit()
    assert [plan.num_seqs for plan in leader.plans] == [3, 3]
    assert not set(leader.plans[0].slots.tolist()) & set(leader.plans[1].slots.tolist())
    assert scheduler.schedule().kind == StepKind.IDLE, "no more than two"
    leader.run()
    assert_expected(leader, *requests)


def test_running_ahead_names_the_last_sampled_token_and_drops_what_is_beyond_the_end() -> None:
    scheduler, leader = make(plans_in_flight=2, run_ahead=True)
    free = request(max_tokens=20)
    stop = expected(free, 200).token_ids[4]
    stopped = request(max_tokens=20, stop_token_ids=[stop])
    leader.add(stopped)
    leader.run()
    assert_expected(leader, stopped)
    assert all(plan.input_ids.tolist() == [LAST_SAMPLED] for plan in leader.plans[1:])
    assert leader.num_steps == len(leader.outputs["a"].token_ids) + 1
    scheduler.check()


def test_running_ahead_stops_at_a_known_end_and_not_at_all_with_penalties() -> None:
    _, leader = make(plans_in_flight=2, run_ahead=True)
    leader.add(request("a", max_tokens=4))
    leader.run()
    assert leader.num_steps == 4, "nothing is computed beyond max_tokens"
    leader.plans.clear()
    penalised = request("b", max_tokens=4, sampling=SamplingParams(frequency_penalty=0.5))
    leader.add(penalised)
    leader.run()
    assert all(LAST_SAMPLED not in plan.input_ids for plan in leader.plans)
    assert_expected(leader, penalised)


def test_one_that_cannot_run_ahead_misses_no_step_beside_one_that_can() -> None:
    _, leader = make(plans_in_flight=2, run_ahead=True)
    penalised = request("a", max_tokens=8, sampling=SamplingParams(frequency_penalty=0.5))
    leader.add(penalised)
    leader.add(request("b", max_tokens=8))
    leader.run()
    assert leader.num_steps <= 9
    assert_expected(leader, penalised)


# ---------------------------------------------------------------------- drafts


class FakeDrafter:
    """Knows the right tokens, or the wrong ones."""

    def __init__(self, tokens: list[int], prompt_len: int) -> None:
        self.tokens, self.prompt_len = tokens, prompt_len

    def draft(self, token_ids: list[int], max_tokens: int) -> list[int]:
        return self.tokens[len(token_ids) - self.prompt_len :][:max_tokens]


@pytest.mark.parametrize(("shift", "num_steps"), [(0, 3), (1, 11)])
def test_drafts_save_steps_and_change_no_token(shift: int, num_steps: int) -> None:
    r = request(max_tokens=11, sampling=SamplingParams(logprobs=0))
    tokens = [(token + shift) % 12 for token in expected(r, 200).token_ids]
    scheduler, leader = make(drafter=FakeDrafter(tokens, 10), max_draft_tokens=4)
    leader.add(r)
    leader.run()
    assert_expected(leader, r)
    assert leader.num_steps == num_steps
    scheduler.check()


def test_short_prompts_are_read_all_at_once_while_more_wait_than_run() -> None:
    _, leader = make(max_num_batched_tokens=64, pace=ByStepTime(1.5, short_prompt=12))
    running = [request(f"running {i}", 5, 30, first=i) for i in range(2)]
    for one in running:
        leader.add(one)
    leader.step()
    leader.step()
    waiting = [request(f"waiting {i}", 10, 12, first=2 + i) for i in range(3)]
    long = request("long", 60, 2, first=6)
    for one in (*waiting, long):
        leader.add(one)
    leader.step()
    assert np.diff(leader.plans[2].query_start).tolist() == [1, 1, 10, 10, 10, 8]  # the long one at its pace
    few = [request(f"few {i}", 10, 2, first=7 + i) for i in range(2)]
    for one in few:
        leader.add(one)
    leader.step()
    assert max(np.diff(leader.plans[3].query_start)) <= 12
    leader.run()
    assert_expected(leader, *running, *waiting, long, *few)


def test_a_long_prompt_is_read_in_pieces_and_short_ones_pass_it_whole() -> None:
    _, leader = make(max_num_batched_tokens=100, pace=ByStepTime(1.5, short_prompt=12))
    running, long, other, short = (
        request("running", 5, 60, first=1),
        request("long", 60, 2, first=2),
        request("other", 60, 2, first=3),
        request("short", 12, 2, first=4),
    )
    leader.add(running)
    leader.step()
    leader.step()
    for one in (long, other, short):
        leader.add(one)
    leader.run()
    sizes = [np.diff(plan.query_start).tolist() for plan in leader.plans[2:]]
    assert sizes[0] == [
        1,
        8,
        4,
    ]  # of the long one what the pace allows, and of the short one what is left of 12
    assert max(max(one) for one in sizes) <= 12
    begun = [
        next(n for n, plan in enumerate(leader.plans) if first in plan.input_ids[plan.positions == 0])
        for first in (2, 3)
    ]
    assert begun[1] > begun[0] + 3  # one long prompt after the other
    assert_expected(leader, running, long, other, short)
