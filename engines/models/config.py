"""The shape of a Llama model, from its config.json, read as data: importing transformers takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.base import UnsupportedModel
from engines.modeldir import read_json
from engines.models.hf_support import other_engines

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the low frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base, a divisor of every frequency (linear scaling), llama3 scaling."""

    theta: float
    divisor: float = 1.0
    llama3: Llama3Scaling | None = None


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """A model that the native engine can run exactly."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: Rope

    @classmethod
    def load(cls, model_dir: str | Path) -> LlamaConfig:
        """From `model_dir`/config.json. Raises UnsupportedModel naming the key, BadModelDir."""
        path = Path(model_dir) / "config.json"
        return cls.parse(read_json(path), str(path))

    @classmethod
    def parse(cls, data: Json, where: str) -> LlamaConfig:
        """From the object in config.json; `where` stands in front of messages."""
        keys = _Keys(data, where)
        _refuse_what_differs(keys)
        num_heads = keys.count("num_attention_heads")
        hidden_size = keys.count("hidden_size")
        config = cls(
            hidden_size=hidden_size,
            intermediate_size=keys.count("intermediate_size"),
            num_layers=keys.count("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=keys.count("num_key_value_heads", num_heads),
            head_dim=keys.count("head_dim", max(hidden_size // num_heads, 1)),
            vocab_size=keys.count("vocab_size"),
            max_positions=keys.count("max_position_embeddings", 2048),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            attention_bias=keys.flag("attention_bias"),
            mlp_bias=keys.flag("mlp_bias"),
            rope=_rope(keys),
        )
        if config.num_heads % config.num_kv_heads:
            keys.refuse(
                "num_key_value_heads", f"does not divide num_attention_heads ({num_heads})", "fix config.json"
            )
        if config.head_dim % 2:
            keys.refuse("head_dim", "is odd, and rotary embedding turns pairs", "fix config.json")
        return config

    def sizes(self) -> dict[str, int]:
        """The sizes of tensor dimensions, by the names that engines/models/names.py uses."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "q": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "ffn": self.intermediate_size,
        }


def is_llama(model_dir: str | Path) -> bool:
    """Whether the model is of the type that `LlamaConfig.load` is for. Raises BadModelDir."""
    return bool(read_json(Path(model_dir) / "config.json").get("model_type", "llama") == "llama")


class _Keys:
    """Typed access to config.json, with errors that name file and key. null counts as absent."""

    def __init__(self, data: Json, where: str) -> None:
        self.data = data
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            self.refuse(key, "must be a whole number above 0", "fix config.json")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            self.refuse(key, "must be a number above 0", "fix config.json")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            self.refuse(key, "must be true or false", "fix config.json")
        return bool(value)

    def refuse(self, key: str, why: str, remedy: str) -> None:
        found = "missing" if self.data.get(key) is None else repr(self.data[key])
        raise UnsupportedModel(f"{self.where}: {key} ({found}) {why}: {remedy}")


def _refuse_what_differs(keys: _Keys) -> None:
    """Whatever would make the numbers differ from those of a plain Llama."""
    other = other_engines(keys.get("model_type", "llama"))
    if keys.get("model_type", "llama") != "llama":
        keys.refuse("model_type", "is not llama, all that engine native runs", other)
    if "LlamaForCausalLM" not in keys.get("architectures", ["LlamaForCausalLM"]):
        keys.refuse("architectures", "does not have LlamaForCausalLM", other)
    if keys.get("is_causal") is False:
        keys.refuse("is_causal", "lets tokens attend to later ones", "serve a model without it")
    if keys.get("hidden_act", "silu") != "silu":
        keys.refuse("hidden_act", "is not silu", other)
    if keys.get("quantization_config") is not None:
        keys.refuse("quantization_config", "means quantised weights", "use the bf16 or fp16 checkpoint")
    if keys.get("sliding_window") is not None:
        keys.refuse("sliding_window", "is not implemented", other)
    if any(kind != "full_attention" for kind in keys.get("layer_types", [])):
        keys.refuse("layer_types", "has other than full_attention", other)
    if keys.get("partial_rotary_factor", 1.0) != 1.0:
        keys.refuse("partial_rotary_factor", "is not implemented", other)


def _rope(keys: _Keys) -> Rope:
    """Both spellings: `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling`."""
    spelling = "rope_parameters" if keys.get("rope_parameters") is not None else "rope_scaling"
    table = keys.get(spelling, {})
    if not isinstance(table, dict):
        keys.refuse(spelling, "must be an object", "fix config.json")
    rope = _Keys(table, f"{keys.where}: {spelling}")
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        rope.refuse("partial_rotary_factor", "is not implemented", other_engines("llama"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, divisor=rope.number("factor"))
    if kind == "llama3":
        return Rope(theta, llama3=_llama3(rope))
    raise UnsupportedModel(
        f"{keys.where}: {spelling}: rope_type {kind!r} is not implemented "
        f"(default, linear and llama3 are): {other_engines('llama')}"
    )


def _llama3(rope: _Keys) -> Llama3Scaling:
    return Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=rope.count("original_max_position_embeddings"),
    )
