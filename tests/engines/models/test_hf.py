"""Hugging Face models over the paged K/V: tokens as `generate` gives them, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.accelerate_map import AccelerateEngine
from engines.config import ModelConfig
from engines.models.hf_support import EXACT_TYPES
from engines.runtime.mesh import Mesh
from tests.engines.driver import generate
from tests.engines.models.hf_models import make_hf

MESH = Mesh(0, 1, 1, torch.device("cpu"))
CHANGES: dict[str, dict[str, object]] = {"gemma": {"hidden_act": "gelu_pytorch_tanh"}}


def config_of(model: Path, **changes: object) -> ModelConfig:
    settings = {
        "model_name": "m",
        "served_model_names": ("m",),
        "model_path": str(model),
        "engine": "accelerate",
    }
    return ModelConfig(**settings | {"parallel_type": "custom", "dtype": "float32"} | changes)


def engine_of(model: Path, **changes: object) -> AccelerateEngine:
    return AccelerateEngine(config_of(model, **changes), MESH, lambda fraction: None)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, 131, (n,), generator=generator).tolist() for n in (1, 7, 19, 40)]


@torch.inference_mode()
def hf_tokens(model: Path, batch: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of `generate`, each prompt alone."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    how = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "eos_token_id": []}
    tokens = []
    for prompt in batch:
        ids = torch.tensor([prompt])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


@pytest.mark.parametrize("kind", sorted(EXACT_TYPES))
def test_every_type_gives_the_tokens_of_generate(kind: str, tmp_path: Path) -> None:
    model = make_hf(tmp_path / kind, kind, **CHANGES.get(kind, {}))
    expected = hf_tokens(model, prompts(), 12)
    assert generate(engine_of(model), prompts(), 12, stagger=2) == expected
