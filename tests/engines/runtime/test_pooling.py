"""Embeddings against transformers' hidden states: chunks, prefixes, preemption, mates that generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines.base import Engine
from engines.runtime.plan import StepPlan
from engines.runtime.scheduler import ContinuousScheduler
from engines.wire import Abort, Generate, Pooling, PoolingMethod
from tests.engines.harness import Ended
from tests.engines.reference import hf_greedy, hf_pooled, pooled_of, random_prompt, request_of, vector_of
from tests.engines.runtime.in_process import EOS, InProcess
from tests.models import GQA

BLOCK = 16
METHODS: tuple[PoolingMethod, ...] = ("mean", "last")
MOST = 1e-5
"""By which a number of a vector may differ from transformers'."""


def assert_pooled(found: Ended, reference: torch.nn.Module, prompt: list[int], method: PoolingMethod) -> None:
    assert (found.error, found.finish_reason, found.token_ids) == (None, "stop", [])
    expected = hf_pooled(reference, prompt, method)
    assert (vector_of(found.embedding) - expected).abs().max().item() < MOST


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1, 2, BLOCK, 31, 32, 33, 64, 65, 100])
def test_it_is_transformers_whatever_the_chunks(
    engine: Engine, reference: torch.nn.Module, length: int, method: PoolingMethod
) -> None:
    """Chunks of 32 tokens: prompts of less, of one to the token, of several."""
    group = InProcess(engine, block_size=BLOCK, max_batched=32)
    prompt = random_prompt(length, seed=length)
    (ended,) = group.run([pooled_of("a", prompt, method)])
    assert_pooled(ended, reference, prompt, method)
    group.assert_empty()
    assert group.scheduler.stats(0).num_generated_tokens == 0


def test_generating_mates_and_pooled_ones_change_nothing_of_each_other(
    engine: Engine, reference: torch.nn.Module
) -> None:
    """In the same steps, with preemptions: the pool of blocks is too small."""
    group = InProcess(engine, num_blocks=20, block_size=BLOCK, max_batched=40)
    prompts = [random_prompt(40 + 9 * place, seed=place) for place in range(9)]
    methods = [(*METHODS, None)[place % 3] for place in range(9)]
    requests = [
        pooled_of(str(place), prompt, method) if method else request_of(str(place), prompt, 40)
        for place, (prompt, method) in enumerate(zip(prompts, methods, strict=True))
    ]
    mixed: list[bool] = []
    real = group.scheduler.schedule

    def schedule() -> StepPlan:
        plan = real()
        chunks: Any = plan.tag or ()
        mixed.append(len({chunk.sequence.request.pooling is None for chunk in chunks}) == 2)
        return plan

    group.scheduler.schedule = schedule  # type: ignore[method-assign]
    ended = group.run(requests)
    assert any(mixed), "they share steps"
    assert group.scheduler.stats(0).num_preemptions > 0
    for one, prompt, method in zip(ended, prompts, methods, strict=True):
        if method is None:
            assert one.token_ids == hf_greedy(reference, prompt, 40)
            assert one.embedding == b""
        else:
            assert_pooled(one, reference, prompt, method)
    group.assert_empty()


def test_what_a_preempted_one_had_summed_is_forgotten(engine: Engine, reference: torch.nn.Module) -> None:
    group = InProcess(engine, block_size=BLOCK, max_batched=24)
    prompt = random_prompt(85, seed=2)
    group.send(pooled_of("a", prompt, "mean"))
    group.step()
    group.step()
    (sequence,) = group.scheduler._running
    assert sequence.pooled is not None
    assert sequence.num_computed_tokens == 48
    group.scheduler._preempt(sequence)
    group.run([])
    assert_pooled(group.ended("a"), reference, prompt, "mean")


def test_the_prefix_cache_is_read_for_the_last_token_only(engine: Engine, reference: torch.nn.Module) -> None:
    group = InProcess(engine, block_size=BLOCK)
    prompt = random_prompt(5 * BLOCK + 3, seed=7)
    group.run([request_of("first", prompt)])
    queries = group.scheduler.stats(0).num_prefix_queries
    (mean,) = group.run([pooled_of("mean", prompt, "mean")])
    assert mean.num_cached_tokens == 0
    assert group.scheduler.stats(0).num_prefix_queries == queries
    (last,) = group.run([pooled_of("last", prompt, "last")])
    assert last.num_cached_tokens == 5 * BLOCK
    assert_pooled(mean, reference, prompt, "mean")
    assert_pooled(last, reference, prompt, "last")
    other = random_prompt(4 * BLOCK, seed=8)
    group.run([pooled_of("other", other, "mean")])
    (again,) = group.run([request_of("again", [*other, 5])])
    assert again.num_cached_tokens == 4 * BLOCK, "what was pooled can be read"
    assert again.token_ids == hf_greedy(reference, [*other, 5])


@pytest.mark.parametrize("run_ahead", [False, True])
def test_several_plans_in_flight(engine: Engine, reference: torch.nn.Module, run_ahead: bool) -> None:
    group = InProcess(engine, block_size=BLOCK, max_batched=24, plans_in_flight=2, run_ahead=run_ahead)
    prompts = [random_prompt(70 + place, seed=20 + place) for place in range(4)]
    ended = group.run([pooled_of(str(i), prompt, METHODS[i % 2]) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert_pooled(ended[i], reference, prompt, METHODS[i % 2])


def test_fewer_dimensions_are_the_first_ones_made_long_again(
    engine: Engine, reference: torch.nn.Module
) -> None:
    prompt = random_prompt(20, seed=9)
    group = InProcess(engine)
    few, all_of_them, more = group.run(
        [pooled_of(str(count), prompt, "mean", count) for count in (5, GQA.hidden, GQA.hidden + 1)]
    )
    found = vector_of(few.embedding)
    assert found.shape == (5,)
    assert (found - hf_pooled(reference, prompt, "mean", 5)).abs().max().item() < MOST
    assert found.norm().item() == pytest.approx(1, abs=1e-6)
    assert_pooled(all_of_them, reference, prompt, "mean")
    assert more.error is not None
    assert more.error.code == "invalid_request"
    assert str(GQA.hidden) in more.error.message


def test_a_whole_context_can_be_pooled(engine: Engine, reference: torch.nn.Module) -> None:
    group = InProcess(engine, block_size=BLOCK, max_batched=500)
    prompt = random_prompt(group.scheduler.max_model_len, seed=10)
    fits, too_long = group.run([pooled_of("fits", prompt, "mean"), pooled_of("long", [*prompt, 5], "mean")])
    assert_pooled(fits, reference, prompt, "mean")
    assert too_long.error is not None
    assert too_long.error.code == "too_long"


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": 1},
        {"resume_token_ids": [5]},
        {"grammar": "start: /a/"},
        {"prompt_logprobs": 0},
        {"pooling": Pooling(method="mean", dimensions=-1)},
    ],
)
def test_what_contradicts_it_is_refused(engine: Engine, more: dict[str, Any]) -> None:
    fields = {"max_tokens": 0, "pooling": Pooling(method="last"), **more}
    (ended,) = InProcess(engine).run([Generate(id="a", prompt_ids=[5, 6], **fields)])
    assert ended.error is not None
    assert ended.error.code == "invalid_request"


def test_an_aborted_one_leaves_nothing(engine: Engine) -> None:
    group = InProcess(engine, block_size=BLOCK, max_batched=24)
    group.send(pooled_of("gone", random_prompt(200, seed=11), "mean"))
    group.step()
    group.step()
    assert group.scheduler.stats(0).num_running == 1
    group.send(Abort("gone"))
    group.step()
    group.assert_empty()
    assert not group.ended("gone").has_ended


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_an_error(engine: Engine, method: PoolingMethod) -> None:
    embedding = engine._model.embedding  # type: ignore[attr-defined]
    with torch.inference_mode():
        kept = embedding[7].clone()
        embedding[7] = torch.nan
    sick, sound = InProcess(engine, block_size=BLOCK).run(
        [pooled_of("sick", [5, 7, 9], method), pooled_of("sound", [5, 6, 9], method)]
    )
    with torch.inference_mode():
        embedding[7] = kept
    assert sick.error is not None
    assert sick.error.code == "internal"
    assert sound.error is None


def test_a_chunk_before_the_last_is_pooled_for_the_mean_only() -> None:
    """So nothing is fetched from the device for nothing."""
    rows = {}
    for method in METHODS:
        scheduler = ContinuousScheduler(8, 4, 2, 6, 32, [EOS])
        scheduler.add(pooled_of("a", list(range(2, 10)), method))
        rows[method] = [row.num_pooled for row in scheduler.schedule().sampling]
    assert rows == {"mean": [6], "last": [0]}
