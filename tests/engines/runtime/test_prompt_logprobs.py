"""Prompts' log-probabilities against transformers, with cached prefixes, preemption, chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.base import Engine
from engines.runtime import runner
from engines.wire import SamplingParams, TokenLogprob
from tests.engines.reference import random_prompt, request_of
from tests.engines.runtime.in_process import InProcess

BLOCK = 16
NUM_TOP = 3


@torch.inference_mode()
def log_softmax(reference: torch.nn.Module, prompt: list[int]) -> Tensor:
    """[T, V]"""
    expected: Tensor = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    return expected


def assert_scores(found: list[TokenLogprob | None] | None, prompt: list[int], expected: Tensor) -> None:
    assert found is not None
    assert len(found) == len(prompt)
    assert found[0] is None
    for place, score in enumerate(found[1:], 1):
        assert score is not None
        assert score.logprob == pytest.approx(expected[place - 1, prompt[place]].item(), abs=1e-4)
        likeliest = expected[place - 1].topk(NUM_TOP)
        assert [value for _, value in score.top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)


def test_every_position_is_scored_though_its_prefix_is_cached(
    engine: Engine, reference: torch.nn.Module
) -> None:
    prompt = random_prompt(5 * BLOCK + 3, seed=1)
    group = InProcess(engine, block_size=BLOCK)
    (first,) = group.run([request_of("first", prompt, 4)])
    (again,) = group.run([request_of("again", prompt, 4)])
    assert again.num_cached_tokens == 5 * BLOCK, "it is in the cache"
    (scored,) = group.run([request_of("scored", prompt, 4, prompt_logprobs=NUM_TOP)])
    assert scored.num_cached_tokens == 0
    assert scored.token_ids == first.token_ids
    assert_scores(scored.prompt_logprobs, prompt, log_softmax(reference, prompt))
    (after,) = group.run([request_of("after", [*prompt, 5], 4)])
    assert after.num_cached_tokens == 5 * BLOCK, "what was scored can be shared"


def test_preempted_prompts_are_scored_once_and_right(engine: Engine, reference: torch.nn.Module) -> None:
    batch = [random_prompt(70 + place, seed=place) for place in range(6)]
    group = InProcess(engine, num_blocks=16, block_size=BLOCK, max_batched=32)
    requests = [
        request_of(str(place), prompt, 40, prompt_logprobs=NUM_TOP if place % 2 else None)
        for place, prompt in enumerate(batch)
    ]
    ended = group.run(requests)
    assert group.scheduler.stats(0).num_preemptions > 0, "the pool was meant to be too small"
    for place, prompt in enumerate(batch):
        assert len(ended[place].token_ids) == 40
        if place % 2:
            assert_scores(ended[place].prompt_logprobs, prompt, log_softmax(reference, prompt))
        else:
            assert ended[place].prompt_logprobs is None


def test_siblings_read_what_the_scored_one_computes(engine: Engine, reference: torch.nn.Module) -> None:
    prompt = random_prompt(4 * BLOCK + 5, seed=9)
    group = InProcess(engine, block_size=BLOCK, max_batched=32)
    ended = group.run(
        [
            request_of(f"s{c}", prompt, 6, choice=c, group="s", prompt_logprobs=None if c else NUM_TOP)
            for c in range(4)
        ]
    )
    assert_scores(ended[0].prompt_logprobs, prompt, log_softmax(reference, prompt))
    assert [one.num_cached_tokens for one in ended] == [0, *[4 * BLOCK] * 3], "the prompt is computed once"


def test_a_long_prompt_never_has_all_its_logits_in_memory(
    engine: Engine, reference: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(1_000, seed=4)
    shapes = []
    real = runner.sampler.sample

    def sample(logits: Tensor, *rest):  # type: ignore[no-untyped-def]
        shapes.append(len(logits))
        return real(logits, *rest)

    monkeypatch.setattr(runner.sampler, "sample", sample)
    group = InProcess(engine, block_size=BLOCK, max_batched=2_048)
    (scored,) = group.run([request_of("long", prompt, 0, prompt_logprobs=NUM_TOP)])
    assert_scores(scored.prompt_logprobs, prompt, log_softmax(reference, prompt))
    assert (scored.token_ids, scored.finish_reason) == ([], "length")
    assert sum(shapes) == 1_000, "the last one is checked only"
    assert max(shapes) <= runner.MAX_LOGIT_ROWS


def test_prompt_and_answer_are_scored_alike(engine: Engine, reference: torch.nn.Module) -> None:
    """What was generated has, as a prompt, the log-probabilities that it was generated with."""
    prompt = random_prompt(40, seed=5)
    group = InProcess(engine, block_size=BLOCK)
    shown = SamplingParams(temperature=0.8, seed=3, repetition_penalty=1.3, logprobs=NUM_TOP)
    (drawn,) = group.run([request_of("drawn", prompt, 24, sampling=shown)])
    whole = prompt + drawn.token_ids
    (scored,) = group.run([request_of("scored", whole, 0, prompt_logprobs=NUM_TOP)])
    assert scored.prompt_logprobs is not None
    again = [score.logprob for score in scored.prompt_logprobs[40:] if score is not None]
    assert again == pytest.approx([score.logprob for score in drawn.logprobs], abs=1e-4)
    assert_scores(scored.prompt_logprobs, whole, log_softmax(reference, whole))
