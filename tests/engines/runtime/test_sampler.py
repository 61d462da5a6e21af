"""Sampling against the definitions and against transformers' own processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from engines.runtime import sampler
from engines.runtime.plan import RowSampling, RowUse, StepResult
from engines.wire import SamplingParams

VOCAB = 50


def row(token_ids: tuple[int, ...] = (), num_prompt: int = 0, **params) -> RowSampling:
    return RowSampling(
        SamplingParams(**{"seed": 1, **params}),
        token_ids=np.array(token_ids, np.int32),
        num_prompt_tokens=num_prompt,
    )


def logits_of(count: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def sample(
    logits: torch.Tensor, rows: list[RowSampling], uses: list[RowUse] | None = None, first_position: int = 0
) -> StepResult:
    """Each row one position after the one before."""
    positions = np.arange(first_position, first_position + len(rows), dtype=np.int32)
    uses = uses or [RowUse.SAMPLE] * len(rows)
    return sampler.sample(logits.clone(), rows, uses, lambda: positions).result()


def draw(logits: torch.Tensor, rows: list[RowSampling], first_position: int = 0) -> list[int]:
    return sample(logits, rows, first_position=first_position).token_ids.tolist()


def frequencies(logits: torch.Tensor, count: int = 20_000, **params) -> torch.Tensor:
    """How often each token is drawn over `count` positions."""
    tokens = draw(logits.expand(count, -1), [row(**params)] * count)
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / count


def test_greedy_is_argmax() -> None:
    logits = logits_of(8)
    assert draw(logits, [row(temperature=0)] * 8) == logits.argmax(-1).tolist()


def test_draws_follow_the_distribution() -> None:
    logits = logits_of(1, 12)
    expected = (logits / 1.3).softmax(-1)[0]
    assert (frequencies(logits, temperature=1.3) - expected).abs().max() < 0.01


def test_a_tiny_temperature_is_greedy_and_not_nan() -> None:
    logits = logits_of(3) * 50
    assert draw(logits, [row(temperature=1e-6)] * 3) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [hf.TopPLogitsWarper(0.7)]),
        ({"min_p": 0.1}, [hf.MinPLogitsWarper(0.1)]),
        ({"top_k": 8, "top_p": 0.6}, [hf.TopKLogitsWarper(8), hf.TopPLogitsWarper(0.6)]),
        ({"top_k": 1}, [hf.TopKLogitsWarper(1)]),
        ({"top_p": 0.01}, [hf.TopPLogitsWarper(0.01)]),
    ],
)
def test_filters_keep_what_transformers_keeps(params: dict[str, float], warpers: list) -> None:
    logits = logits_of(1)
    expected = logits / 1.5
    for warper in warpers:
        expected = warper(None, expected)
    seen = frequencies(logits, temperature=1.5, **params)
    assert set(seen.nonzero().flatten().tolist()) <= set(expected.isfinite().nonzero()[:, 1].tolist())
    assert (seen - expected.softmax(-1)[0]).abs().max() < 0.015


def test_top_p_over_a_flat_vocabulary_needs_the_long_list() -> None:
    flat = torch.zeros(1, 5000) + torch.arange(5000) * 1e-6
    seen = {draw(flat, [row(top_p=0.9)], p)[0] for p in range(300)}
    assert min(seen) < 5000 - 1024 - 1000, "tokens beyond the short list are drawn too"
    assert min(seen) >= 499, "the least likely tenth is cut"


def test_filters_are_each_rows_own() -> None:
    logits = logits_of(1).expand(4, -1)
    rows = [row(), row(top_k=1), row(temperature=0), row(top_p=0.5, min_p=0.2)]
    assert draw(logits, rows) == [draw(logits[:1], [r], p)[0] for p, r in enumerate(rows)]


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits, history = logits_of(1), (1, 2, 2, 9)
    ours = logits.clone()
    sampler._adjust_row(ours[0], row(token_ids=history, num_prompt=2, repetition_penalty=1.7))
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([history]), logits.clone())
    torch.testing.assert_close(ours, theirs)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = torch.zeros(1, VOCAB)
    history = row(token_ids=(1, 1, 2, 2, 3), num_prompt=2, presence_penalty=0.5, frequency_penalty=0.25)
    sampler._adjust_row(logits[0], history)
    assert logits[0, [1, 2, 3]].tolist() == [0.0, -1.0, -0.75]


def test_bias_and_bans() -> None:
    logits = torch.zeros(2, VOCAB)
    biased = row(temperature=0, logit_bias={17: 3.0})
    banned = RowSampling(SamplingParams(temperature=0, logit_bias={17: 3.0, 4: 1.0}), banned_ids=(17,))
    assert draw(logits, [biased, banned]) == [17, 4]


def test_a_failing_row_fails_alone() -> None:
    logits = logits_of(3)
    rows = [row(temperature=0), row(temperature=0, logit_bias={VOCAB + 5: 1.0}), row(temperature=0)]
    result = sample(logits, rows)
    best = logits.argmax(-1).tolist()
    assert result.token_ids.tolist() == [best[0], -1, best[2]]
    assert list(result.errors) == [1]
    assert "IndexError" in result.errors[1].message


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(2)
    rows = [row(temperature=0.5, top_k=3, logprobs=2, logit_bias={0: 5.0}), row(temperature=0)]
    result = sample(logits, rows)
    expected = logits.log_softmax(-1)
    assert list(result.logprobs) == [0]
    value = result.logprobs[0]
    assert value.logprob == pytest.approx(expected[0, result.token_ids[0]].item())
    assert [token for token, _ in value.top] == expected[0].topk(2).indices.tolist()
    assert [v for _, v in value.top] == pytest.approx(expected[0].topk(2).values.tolist())


def test_prompt_rows_score_their_target() -> None:
    logits = logits_of(2)
    target = RowSampling(SamplingParams(logprobs=0), target_id=33)
    result = sample(logits, [target, row(temperature=0)], [RowUse.PROMPT_LOGPROBS, RowUse.SAMPLE])
    assert result.token_ids.tolist() == [33, int(logits[1].argmax())]
    assert result.logprobs[0].logprob == pytest.approx(logits.log_softmax(-1)[0, 33].item())
    assert result.logprobs[0].top == []


def test_a_verified_draft_is_drawn_as_if_it_had_not_been_guessed() -> None:
    logits = logits_of(1)
    free = row(temperature=1.5, logprobs=0)
    guessed = RowSampling(free.params, target_id=3)
    drawn = sample(logits, [free], first_position=5)
    verified = sample(logits, [guessed], [RowUse.VERIFY], first_position=5)
    assert verified.token_ids == drawn.token_ids
    assert verified.logprobs == drawn.logprobs
