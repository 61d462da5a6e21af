"""The native engine against Hugging Face's own Llama: greedy tokens must be equal in float32."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engines.config import ModelConfig
from engines.native import NativeEngine
from engines.runtime.mesh import Mesh, single
from tests.engines.driver import generate
from tests.models import GQA, MHA, ODD, Shape, make_llama

NUM_TOKENS = 24


def native(directory: Path, mesh: Mesh | None = None, **settings: Any) -> NativeEngine:
    values = {"model_path": str(directory), "dtype": "auto", "max_model_len": None, **settings}
    config = cast(ModelConfig, SimpleNamespace(**values))  # all that the engine reads of it
    return NativeEngine(config, mesh or single(), lambda fraction: None)


def prompts_for(vocab: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in lengths]


def hf_greedy(directory: Path, prompt: list[int], num_tokens: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=model.config.vocab_size,  # none
        pad_token_id=0,
    )
    return cast(list[int], out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("shape", [MHA, GQA, ODD], ids=["mha", "gqa", "odd"])
def test_greedy_tokens_equal_hugging_face(tmp_path: Path, shape: Shape) -> None:
    directory = make_llama(tmp_path, shape, seed=3)
    prompts = prompts_for(shape.vocab, 1, 7, 33, 90)
    expected = [hf_greedy(directory, prompt, NUM_TOKENS) for prompt in prompts]
    engine = native(directory)
    assert [generate(engine, [prompt], NUM_TOKENS, chunk=1000)[0] for prompt in prompts] == expected
    assert generate(engine, prompts, NUM_TOKENS, chunk=9, stagger=2, block_size=16) == expected
    assert generate(engine, prompts, NUM_TOKENS, chunk=5, stagger=1, block_size=3) == expected
