"""The native engine on CUDA, where there is a device: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.config import ModelConfig
from tests.engines.harness import running
from tests.engines.reference import hf_greedy, hf_pooled, pooled_of, prompts, request_of, vector_of
from tests.models import GQA, MHA, Shape, make_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def config_for(model: Path, tp: int) -> ModelConfig:
    return ModelConfig(
        model_name="gpu",
        served_model_names=("gpu",),
        model_path=str(model),
        tp_size=tp,
        dtype="float32",
        device="cuda",
        kv_block_size=256,
        gpu_memory_share=0.3 / tp,
        startup_timeout=120,
    )


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shape", [MHA, GQA], ids=["mha", "gqa"])
def test_greedy_tokens_are_hugging_faces(shape: Shape, tp: int, tmp_path: Path) -> None:
    """Two ranks share one device over gloo, which shows that they agree, not how fast they are."""
    model = make_llama(tmp_path / "model", shape, seed=5)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batch = prompts(16, shape.vocab, seed=6)
    with running(config_for(model, tp)) as group:
        ended = group.run([request_of(f"{i}", prompt, 32) for i, prompt in enumerate(batch)])
        pooled = group.run([pooled_of(f"e{i}", prompt, "mean") for i, prompt in enumerate(batch)])
    for one, prompt in zip(pooled, batch, strict=True):
        assert (vector_of(one.embedding) - hf_pooled(reference, prompt, "mean")).abs().max().item() < 1e-4
    assert [e.token_ids for e in ended] == [hf_greedy(reference, prompt, 32) for prompt in batch]
