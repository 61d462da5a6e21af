"""config.json as data: both spellings of rope, defaults, and refusals that name the key."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines.base import UnsupportedModel
from engines.models.config import LlamaConfig
from engines.models.layers import inverse_frequencies
from tests.models import GQA, LLAMA3_SCALING

BASE = GQA.config_json(torch.float32)


def parse(**changes: Any) -> LlamaConfig:
    return LlamaConfig.parse({**BASE, **changes}, "config.json")


def test_both_spellings_of_rope_are_one() -> None:
    old = parse(rope_theta=5e5, rope_scaling=LLAMA3_SCALING)
    new = parse(rope_theta=None, rope_parameters={"rope_theta": 5e5, **LLAMA3_SCALING})
    assert old == new
    assert old.rope.theta == 5e5
    assert old.rope.llama3 is not None


def test_what_is_absent_has_hugging_faces_default() -> None:
    data = {key: BASE[key] for key in ("num_attention_heads", "num_hidden_layers", "hidden_size")}
    config = LlamaConfig.parse({**data, "intermediate_size": 128, "vocab_size": 99}, "config.json")
    assert config.num_kv_heads == config.num_heads
    assert config.head_dim == config.hidden_size // config.num_heads
    assert (config.rms_norm_eps, config.max_positions, config.rope.theta) == (1e-6, 2048, 10000.0)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type .'mixtral'.*: serve a model of these types: "),
        (
            {"model_type": "qwen3"},
            "model_type .'qwen3'.*parallelType: pp or pptp .*engine: deepspeed_tp .*custom",
        ),
        ({"model_type": "phi"}, "model_type .'phi'.*: write engine: deepspeed_tp .*parallelType: custom"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*bf16"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"is_causal": False}, "is_causal"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type 'dynamic' is not"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters: rope_type 'yarn'",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor .missing."),
        ({"rope_scaling": "linear"}, "rope_scaling .*must be an object"),
        ({"hidden_size": None}, "hidden_size .missing."),
        ({"num_hidden_layers": "two"}, "num_hidden_layers .'two'. must be a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads .3. does not divide"),
        ({"head_dim": 17}, "head_dim .17. is odd"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings .'yes'. must be true or false"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json: .*" + message):
        parse(**changes)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_theta": 500000.0, **LLAMA3_SCALING},
        {"rope_theta": 500000.0, **LLAMA3_SCALING, "factor": 32.0, "original_max_position_embeddings": 8192},
    ],
)
def test_frequencies_equal_hugging_faces(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig as HuggingFaceConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    data = {**BASE, "rope_parameters": rope, "head_dim": 128}
    del data["rope_theta"]
    expected = LlamaRotaryEmbedding(HuggingFaceConfig(**data)).inv_freq
    config = LlamaConfig.parse(data, "config.json")
    torch.testing.assert_close(inverse_frequencies(config.rope, 128), expected, rtol=1e-6, atol=0)
