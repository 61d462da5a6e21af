"""A plan survives its trip to another rank."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engines.runtime.plan import Int32, StepKind, StepPlan
from engines.wire import Generate
from tests.engines.runtime.test_scheduler_properties import Arrival, Setup, arrivals, make, setups

ARRAYS = (
    "input_ids",
    "positions",
    "slot_mapping",
    "query_start",
    "context_lens",
    "slots",
    "logit_rows",
    "row_use",
    "block_tables",
)


def assert_same(plan: StepPlan, other: StepPlan) -> None:
    assert other.kind == plan.kind
    for name in ARRAYS:
        before: Int32 = getattr(plan, name)
        after: Int32 = getattr(other, name)
        assert before.dtype == after.dtype == np.int32, name
        assert before.shape == after.shape, name
        assert np.array_equal(before, after), name


@given(setups, arrivals())
def test_round_trip(setup: Setup, work: list[Arrival]) -> None:
    _, leader = make(setup)
    for arrival in work:
        leader.add(arrival.request)
    leader.run()
    for plan in leader.plans:
        assert_same(plan, StepPlan.unpack(plan.pack()))
    assert leader.plans or all(leader.outputs.ended(a.request.id) for a in work)


@given(st.sampled_from(StepKind))
def test_empty_plans_round_trip(kind: StepKind) -> None:
    plan = StepPlan.empty(kind)
    assert plan.num_tokens == plan.num_seqs == 0
    assert_same(plan, StepPlan.unpack(plan.pack()))


def test_what_stays_on_rank_0_is_not_packed() -> None:
    scheduler, _ = make(Setup(8, 4, 2, 16, True, 1, False, 0, lambda: None))
    scheduler.add(Generate(id="a", prompt_ids=[1, 2, 3], max_tokens=2))
    plan = scheduler.schedule()
    assert plan.sampling
    assert plan.tag is not None
    other = StepPlan.unpack(plan.pack())
    assert other.sampling == ()
    assert other.tag is None
