"""Static batching: rows of one length that start and end together."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engines.runtime.plan import StepKind, StepPlan, StepResult
from engines.runtime.static import StaticScheduler
from engines.wire import Generate, RequestError
from tests.engines.runtime.fake_model import EOS, FakeLeader, FakePagedRunner, expected
from tests.engines.runtime.test_scheduler_properties import Arrival, arrivals, check_output

MAX_MODEL_LEN = 40
DELAY = 0.5


class FakeClock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def make(batch_size: int = 2, delay: float = DELAY) -> tuple[StaticScheduler, FakeLeader, FakeClock]:
    clock = FakeClock()
    scheduler = StaticScheduler(batch_size, delay, MAX_MODEL_LEN, [EOS], clock)
    return scheduler, FakeLeader(scheduler, FakePagedRunner(batch_size, MAX_MODEL_LEN, batch_size)), clock


def request(id: str, prompt_len: int = 4, max_tokens: int = 3) -> Generate:
    return Generate(id=id, prompt_ids=[1] * prompt_len, max_tokens=max_tokens, ignore_eos=True)


def query_lens(plan: StepPlan) -> list[int]:
    return [int(length) for length in np.diff(plan.query_start)]


@given(st.integers(1, 4), arrivals())
def test_same_tokens_in_any_batch(batch_size: int, work: list[Arrival]) -> None:
    scheduler, leader, _ = make(batch_size, delay=0.0)
    for arrival in work:
        leader.add(arrival.request)
    clock = 0
    while scheduler.has_work:
        leader.submit()
        for arrival in work:
            if arrival.abort_after == clock:
                scheduler.abort(arrival.request.id)
        leader.collect()
        clock += 1
        assert clock < 1000, "it does not end"
    for plan in leader.plans:
        assert len(set(query_lens(plan))) == len(set(plan.context_lens.tolist())) == 1, "rows of one length"
    for arrival in work:
        check_output(arrival, leader, MAX_MODEL_LEN)


def test_a_batch_waits_until_it_is_full_or_late() -> None:
    scheduler, _, clock = make()
    scheduler.add(request("a"))
    assert scheduler.schedule().kind == StepKind.IDLE
    clock.seconds += DELAY
    assert scheduler.schedule().num_seqs == 1
    full, _, _ = make()
    full.add(request("a"))
    full.add(request("b"))
    assert full.schedule().num_seqs == 2


def test_another_length_waits_for_the_next_batch() -> None:
    _, leader, clock = make()
    for r in (request("a", 4), request("longer", 6), request("b", 4)):
        leader.add(r)
    clock.seconds += DELAY
    leader.run()
    assert [query_lens(plan) for plan in leader.plans] == [[4, 4], [1, 1], [1, 1], [6], [1], [1]]


def test_a_row_that_has_ended_is_carried_on_unsampled() -> None:
    _, leader, _ = make()
    leader.add(request("short", max_tokens=1))
    leader.add(request("long", max_tokens=3))
    leader.run()
    assert [plan.num_seqs for plan in leader.plans] == [2, 2, 2]
    assert [len(plan.logit_rows) for plan in leader.plans] == [2, 1, 1]


def test_a_prompt_is_scored_beside_one_that_goes_on() -> None:
    _, leader, _ = make()
    scored = msgspec.structs.replace(request("scored", max_tokens=0), prompt_logprobs=2)
    both = msgspec.structs.replace(request("both", max_tokens=2), prompt_logprobs=2)
    leader.add(scored)
    leader.add(both)
    leader.run()
    for one in (scored, both):
        assert leader.outputs[one.id] == expected(one, MAX_MODEL_LEN, eos=-1)
    assert [plan.num_seqs for plan in leader.plans] == [2, 2], "the scored row is carried on"


def test_an_aborted_batch_gives_way() -> None:
    scheduler, leader, _ = make(batch_size=1)
    leader.add(request("gone", max_tokens=30))
    leader.add(request("next"))
    assert leader.submit()
    scheduler.abort("gone")
    leader.run()
    assert list(leader.outputs.by_id) == ["next"]
    assert len(leader.plans) == 4


def test_an_error_ends_its_row_only() -> None:
    scheduler, leader, _ = make()
    leader.add(request("bad"))
    leader.add(request("good"))
    assert leader.submit()
    plan, result = leader.runner.collect()
    errors = {0: RequestError("internal", "no")}
    leader.outputs.take(scheduler.update(plan, StepResult(result.token_ids, errors=errors)))
    leader.run()
    assert leader.outputs["bad"].error is not None
    assert len(leader.outputs["good"].token_ids) == 3
