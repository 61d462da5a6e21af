"""A step for which the device has no memory is done in parts; what does not fit alone is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.base import Batch, Engine
from engines.runtime import kv_cache
from engines.runtime.mesh import single
from engines.runtime.runner import ModelRunner
from engines.runtime.warmup import largest_plan
from tests.engines.reference import hf_greedy, pooled_of, prompts, request_of, vector_of
from tests.engines.runtime.in_process import InProcess
from tests.models import GQA


class FakeTight:
    """An engine that has memory for steps of so many tokens."""

    batching = "continuous"

    def __init__(self, engine: Engine, most: int) -> None:
        self._engine, self._most = engine, most
        self.num_refused = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def forward(self, batch: Batch) -> Tensor | None:
        if batch.num_tokens > self._most:
            self.num_refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More of it.")
        return self._engine.forward(batch)


def test_a_step_that_does_not_fit_is_done_in_parts(engine: Engine, reference: torch.nn.Module) -> None:
    tight = FakeTight(engine, most=100)
    batch = prompts(8, GQA.vocab, seed=3)
    ended = InProcess(tight).run([request_of(f"{i}", prompt, 8) for i, prompt in enumerate(batch)])  # type: ignore[arg-type]
    assert tight.num_refused > 0
    assert [each.token_ids for each in ended] == [hf_greedy(reference, prompt, 8) for prompt in batch]


def test_what_does_not_fit_alone_is_refused_and_the_others_go_on(
    engine: Engine, reference: torch.nn.Module
) -> None:
    batch = sorted(prompts(5, GQA.vocab, seed=4), key=len)
    most = len(batch[-2])
    assert most < len(batch[-1])
    group = InProcess(FakeTight(engine, most))  # type: ignore[arg-type]
    ended = group.run([request_of(f"{i}", prompt, 8) for i, prompt in enumerate(batch)])
    assert [each.error for each in ended[:-1]] == [None] * 4
    assert [each.token_ids for each in ended[:-1]] == [
        hf_greedy(reference, prompt, 8) for prompt in batch[:-1]
    ]
    error = ended[-1].error
    assert error is not None
    assert error.message == "the device has no memory left for it: CUDA out of memory"
    group.assert_empty()


def test_rows_of_parts_are_those_of_the_whole(engine: Engine) -> None:
    """Prompt log-probabilities and pooled states come from rows that are numbered anew in each part."""
    batch = prompts(6, GQA.vocab, seed=5)
    scored = [request_of(f"s{i}", prompt, 2, prompt_logprobs=1) for i, prompt in enumerate(batch)]
    pooled = [pooled_of(f"p{i}", prompt, "mean") for i, prompt in enumerate(batch)]
    tight = FakeTight(engine, most=150)
    whole = InProcess(engine).run([*scored, *pooled])
    parts = InProcess(tight).run([*scored, *pooled])  # type: ignore[arg-type]
    assert tight.num_refused > 0
    for one, other in zip(whole[:6], parts[:6], strict=True):
        assert one.token_ids == other.token_ids
        values = [[row.logprob for row in each.prompt_logprobs if row] for each in (one, other)]
        assert len(values[0]) > 1
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    for one, other in zip(whole[6:], parts[6:], strict=True):
        torch.testing.assert_close(vector_of(one.embedding), vector_of(other.embedding), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_seqs", "num_tokens", "block_size"), [(1, 300, 16), (8, 100, 16), (5, 5, 8)])
def test_the_step_that_is_measured_is_as_large_as_steps_get(
    engine: Engine, num_seqs: int, num_tokens: int, block_size: int
) -> None:
    """In one block, though contexts are longer: what it computes means nothing, what memory it takes does."""
    assert engine.kv_spec is not None
    plan = largest_plan(num_seqs, num_tokens, block_size)
    runner = ModelRunner(engine, single(), kv_cache.allocate(engine.kv_spec, 1, block_size), num_seqs)
    result = runner.execute(plan)
    assert (plan.num_seqs, len(plan.logit_rows)) == (num_seqs, num_seqs)
    assert num_tokens <= plan.num_tokens < num_tokens + num_seqs
    assert result is not None
    assert not result.errors
