"""Hugging Face models divided over ranks by transformers' plans: every type is exact, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.config import ModelConfig
from engines.models.hf_support import EXACT_TYPES
from engines.pipeline import PipelineEngine
from engines.runtime.mesh import Mesh
from tests.engines.models.test_hf import CHANGES
from tests.engines.ranks import Special, expected_tokens, make_models, run_ranks

SPECIAL: Special = {
    "tied": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "biases": ("starcoder2", {"use_bias": True}),
    "output_bias": ("seed_oss", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    "one_kv_head": ("gemma", {**CHANGES["gemma"], "num_key_value_heads": 1}),
    "norms_of_heads": ("cohere", {"use_qk_norm": True}),
    "four_kv_heads": ("olmo2", {"num_key_value_heads": 4}),
}
REFUSED = {
    "nemotron": "has no pipeline plan",
    "phi": "has no pipeline plan",
    "stablelm": "has no pipeline plan",
}
FOUR_RANKS = ("mistral", "phi3")
"""Both with fewer K/V heads than ranks."""


def load(model: Path, mesh: Mesh) -> PipelineEngine:
    settings = {"model_name": "m", "served_model_names": ("m",), "model_path": str(model)}
    config = ModelConfig(
        **settings, engine="pipeline", parallel_type="pptp", tp_size=mesh.tp_size, dtype="float32"
    )
    return PipelineEngine(config, mesh, lambda *_: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"), SPECIAL)


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, list[list[int]]]:
    return expected_tokens(models, SPECIAL)


@pytest.fixture(scope="module")
def on_two_ranks(models: Path) -> dict[str, Any]:
    return run_ranks(2, models, sorted({*EXACT_TYPES, *SPECIAL}), load)


@pytest.mark.parametrize("name", sorted({*EXACT_TYPES, *SPECIAL} - set(REFUSED)))
def test_two_ranks_give_the_tokens_of_generate(
    name: str, on_two_ranks: dict[str, Any], expected: dict[str, list[list[int]]]
) -> None:
    assert on_two_ranks[name] == expected[name]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_no_plan_divides_is_refused(name: str, on_two_ranks: dict[str, Any]) -> None:
    assert REFUSED[name] in on_two_ranks[name]


def test_four_ranks(models: Path, expected: dict[str, list[list[int]]]) -> None:
    found = run_ranks(4, models, list(FOUR_RANKS), load)
    assert found == {name: expected[name] for name in FOUR_RANKS}
