"""Hugging Face models over the paged K/V: tokens as `generate` gives them, and what is refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.accelerate_map import AccelerateEngine
from engines.base import BadCheckpoint, UnsupportedModel
from engines.config import ModelConfig
from engines.models.hf_inspect import inspect_model
from engines.models.hf_support import EXACT_TYPES
from engines.runtime.mesh import Mesh
from tests.engines.driver import generate
from tests.engines.models.hf_models import BASE, make_hf

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
    return AccelerateEngine(config_of(model, **changes), MESH, lambda *_: None)


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


def test_multi_head_attention_and_untied_head(tmp_path: Path) -> None:
    model = make_hf(tmp_path / "mha", "llama", num_key_value_heads=4, attention_bias=True)
    assert generate(engine_of(model), prompts(), 12, chunk=3) == hf_tokens(model, prompts(), 12)


def test_a_window_that_no_sequence_can_reach_is_exact(tmp_path: Path) -> None:
    model = make_hf(tmp_path / "windowed", "mistral", sliding_window=64)
    with pytest.raises(UnsupportedModel, match=r"sliding_window \(64\) .*maxModelLen to 64 or less"):
        engine_of(model)
    engine = engine_of(model, max_model_len=64)
    assert generate(engine, prompts(), 12) == hf_tokens(model, prompts(), 12)


def test_an_inactive_window_is_none(tmp_path: Path) -> None:
    model = make_hf(tmp_path / "q", "qwen2", sliding_window=8, use_sliding_window=False)
    assert generate(engine_of(model), prompts(), 12) == hf_tokens(model, prompts(), 12)


def write_config(directory: Path, kind: str, **changes: object) -> Path:
    """A model directory without weights: what is refused must be refused before they are looked for."""
    data = {**BASE, "model_type": kind, **changes}
    (directory / "config.json").write_text(json.dumps(data))
    return directory


REFUSED = {
    "mistral": ({"sliding_window": 128}, r"sliding_window \(128\)"),
    "qwen2": (
        {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1},
        r"sliding_window \(128\)",
    ),
    "gemma2": ({}, "soft-caps"),
    "deepseek_v3": ({}, "MLA"),
    "t5": ({}, "encoder-decoder"),
    "mamba": ({}, "recurrent state"),
    "gpt_oss": ({}, "sinks"),
    "bloom": ({}, "ALiBi"),
    "mixtral": ({}, "mixture of experts"),
    "qwen3_next": ({}, "recurrent state"),
    "gpt2": ({}, "attention of its own"),
    "brand_new": ({}, "not among those known"),
    "phi3": (
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            "original_max_position_embeddings": 128,
        },
        "maxModelLen to 128",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_paging_would_get_wrong_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    changes, reason = REFUSED[kind]
    with pytest.raises(UnsupportedModel, match=rf"config\.json: .*{reason}"):
        engine_of(write_config(tmp_path, kind, **changes))


@pytest.mark.parametrize(
    "key",
    [
        {"layer_types": ["full_attention", "chunked_attention"]},
        {"attn_logit_softcapping": 50.0},
        {"quantization_config": {"quant_method": "fp8"}},
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": "someone/kernel"},
        {"_experts_implementation_internal": "someone/kernel"},
        {"is_encoder_decoder": True},
        {"is_causal": False},
    ],
    ids=lambda key: next(iter(key)),
)
def test_keys_that_change_a_known_type_are_refused(key: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=rf"config\.json: {next(iter(key))} "):
        engine_of(write_config(tmp_path, "llama", **key))


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "mistral"])
def test_the_model_itself_is_asked_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type that got into the list by mistake is found out by what its layers pass to attention."""
    monkeypatch.setattr("engines.models.hf_support.EXACT_TYPES", (kind,))
    with pytest.raises(UnsupportedModel, match=r"passes s_aux|passes softcap|sliding_window"):
        inspect_model(write_config(tmp_path, kind, sliding_window=64), None)


def test_code_in_the_model_directory_is_never_imported(tmp_path: Path) -> None:
    canary = tmp_path / "imported"
    for name in ("configuration_llama", "modeling_llama", "custom_generate"):
        (tmp_path / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    auto = {"AutoConfig": "configuration_llama.Own", "AutoModelForCausalLM": "modeling_llama.Own"}
    write_config(tmp_path, "llama", auto_map=auto)
    with pytest.raises(UnsupportedModel, match=r"auto_map .*never run"):
        engine_of(tmp_path)
    write_config(tmp_path, "llama")
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors"):
        engine_of(tmp_path)
    assert not canary.exists()
    assert not {"configuration_llama", "modeling_llama"} & set(sys.modules)


def test_adapters_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path, "llama")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"adapter_config\.json: .*merge"):
        engine_of(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path, "llama")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(BadCheckpoint, match=r"pytorch_model\.bin.*sluice convert"):
        engine_of(tmp_path)


def test_a_checkpoint_that_does_not_belong_names_file_and_tensor(tmp_path: Path) -> None:
    model = make_hf(tmp_path / "m", "qwen3", tie_word_embeddings=False)
    data = json.loads((model / "config.json").read_text())
    for key, value, tensor in (
        ("num_hidden_layers", 3, r"model\.layers\.2\.\S+: missing"),
        ("num_hidden_layers", 1, r"model\.safetensors: tensor model\.layers\.1\.\S+: .*no place"),
        ("intermediate_size", 80, r"model\.safetensors: tensor model\.layers\.0\.mlp\.\S+: its shape"),
    ):
        changed = data | {key: value, "layer_types": None}
        (model / "config.json").write_text(json.dumps(changed))
        with pytest.raises(BadCheckpoint, match=tensor):
            engine_of(model)
