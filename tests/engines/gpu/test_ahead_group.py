"""Plans that run ahead in a real group: the largest step comes first, followers learn what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.wire import SamplingParams
from tests.engines.fake_ahead import MAX_BATCHED
from tests.engines.harness import running
from tests.engines.layouts import Layout
from tests.engines.reference import hf_greedy, prompts, request_of
from tests.models import GQA, make_llama


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_plans_run_ahead_of_their_tokens(tp: int, tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", GQA, seed=3)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batch = prompts(6, GQA.vocab, seed=2)
    sampled = SamplingParams(temperature=0.7, seed=4, top_p=0.9)
    plain = Layout("native").config(model, num_blocks=120, block_size=8, max_batched=MAX_BATCHED)
    ahead = Layout("native", tp=tp).config(model, num_blocks=120, block_size=8, max_batched=MAX_BATCHED)
    requests = [request_of(f"g{i}", prompt, 12) for i, prompt in enumerate(batch)]
    requests += [request_of(f"s{i}", prompt, 12, sampling=sampled) for i, prompt in enumerate(batch)]
    with running(plain) as group:
        expected = [each.token_ids for each in group.run(requests)]
    with running(ahead.model_copy(update={"engine": "fake-ahead"})) as group:
        assert [each.token_ids for each in group.run(requests)] == expected
    assert expected[:6] == [hf_greedy(reference, prompt, 12) for prompt in batch]
