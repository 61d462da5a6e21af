"""Meta's params.json and Hugging Face's config.json, each from the other.

The sizes come from the weights where they tell; params.json is checked against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion import families
from conversion.source import Choices
from conversion.tensors import CannotConvert
from engines.base import BadCheckpoint
from engines.modeldir import BadModelDir, read_json
from engines.models.config import Llama3Scaling, LlamaConfig

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """Sizes as the shards' shapes give them."""

    vocab: int
    hidden: int
    query: int
    key: int
    ffn: int
    dtype: str  # torch's name


@dataclass(frozen=True, slots=True)
class Params:
    """params.json, checked for types. Missing values are None."""

    path: Path
    values: Json

    @classmethod
    def load(cls, path: Path) -> Params:
        """Raises BadModelDir. Some releases nest everything under "model"."""
        values = read_json(path)
        nested = values.get("model")
        return cls(path, nested if isinstance(nested, dict) else values)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise BadModelDir(f"{self.path}: {key} ({value!r}) must be a whole number above 0")
        return value

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise BadModelDir(f"{self.path}: {key} ({value!r}) must be a number above 0")
        return float(value)

    def refuse_quantized(self) -> None:
        for key in ("quantization_args", "lora_args"):
            if self.values.get(key):
                raise CannotConvert(
                    f"{self.path}: {key}: quantised and adapter checkpoints cannot be converted: "
                    "take the bfloat16 release"
                )


def to_config(params: Params, measured: Measured, choices: Choices) -> tuple[Json, list[str]]:
    """config.json of the model, and what was concluded. Raises BadCheckpoint, BadModelDir, CannotConvert."""
    params.refuse_quantized()
    notes: list[str] = []
    heads = params.count("n_heads")
    kv_heads = params.count("n_kv_heads", heads)
    head_dim = _head_dim(params, measured, heads, kv_heads)
    _check_sizes(params, measured)
    theta = _theta(params, measured, choices, notes)
    rope, positions = _rope(params, measured, theta, choices, notes)
    tokens, whose = families.token_ids(measured.vocab)
    notes.append(
        f"bos_token_id {tokens['bos_token_id']}, eos_token_id {tokens['eos_token_id']}: those of the "
        f"tokenizer of {whose}; a tokenizer.model that is converted replaces them by its own"
    )
    config: Json = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": measured.hidden,
        "intermediate_size": measured.ffn,
        "num_hidden_layers": params.count("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": measured.vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": _norm_eps(params),
        "rope_theta": theta,
        "rope_scaling": rope,
        "hidden_act": "silu",
        "torch_dtype": measured.dtype,
        **tokens,
    }
    return config, notes


def _head_dim(params: Params, measured: Measured, heads: int, kv_heads: int) -> int:
    head_dim = params.values.get("head_dim") or measured.query // heads
    if measured.query != heads * head_dim:
        raise BadCheckpoint(
            f"{params.path}: n_heads ({heads}) does not fit wq, which has {measured.query} rows in all shards"
        )
    if measured.key != kv_heads * head_dim:
        raise BadCheckpoint(
            f"{params.path}: n_kv_heads ({kv_heads}) of {head_dim} does not fit wk, which has {measured.key} "
            "rows in all shards"
        )
    return int(head_dim)


def _check_sizes(params: Params, measured: Measured) -> None:
    if params.count("dim") != measured.hidden:
        raise BadCheckpoint(f"{params.path}: dim ({params.count('dim')}) is not the norm's {measured.hidden}")
    vocab = params.values.get("vocab_size", -1)
    if vocab not in (-1, measured.vocab):
        raise BadCheckpoint(
            f"{params.path}: vocab_size ({vocab}) is not the embedding's, {measured.vocab} in all shards"
        )
    ffn = _ffn(params, measured.hidden)
    if ffn is not None and ffn != measured.ffn:
        raise BadCheckpoint(
            f"{params.path}: multiple_of and ffn_dim_multiplier make {ffn} of dim, but w1 has {measured.ffn} "
            "rows in all shards"
        )


def _ffn(params: Params, dim: int) -> int | None:
    """Meta's formula, where params.json has what it needs."""
    if params.values.get("multiple_of") is None:
        return None
    multiple_of = params.count("multiple_of")
    factor = params.number("ffn_dim_multiplier") or 1.0
    return multiple_of * -(-int(factor * int(8 * dim / 3)) // multiple_of)


def num_shards(params: Params, rows: Mapping[str, int]) -> int:
    """How many shards with so `rows` of each tensor make up the model; 0 unless its sizes agree on that."""
    dim, heads = params.count("dim"), params.count("n_heads")
    head_dim = params.values.get("head_dim")
    wholes = {
        "layers.0.attention.wq.weight": dim if head_dim is None else heads * params.count("head_dim"),
        "layers.0.feed_forward.w1.weight": _ffn(params, dim),
        "output.weight": params.values.get("vocab_size"),
    }
    known = [(rows[name], size) for name, size in wholes.items() if rows.get(name) and type(size) is int]
    counts = [size // part for part, size in known if size > 0 and size % part == 0]
    return counts[0] if len(counts) > 1 and len(set(counts)) == 1 else 0


def _norm_eps(params: Params) -> float:
    eps = params.number("norm_eps")
    if eps is None:
        raise BadModelDir(f"{params.path}: norm_eps: is missing")
    return eps


def _theta(params: Params, measured: Measured, choices: Choices, notes: list[str]) -> float:
    stated = params.number("rope_theta")
    _refuse_contradiction("--rope-theta", choices.rope_theta, stated, params.path)
    if stated is not None or choices.rope_theta is not None:
        return float(stated or choices.rope_theta or 0)
    if measured.vocab == 32000:
        notes.append("rope_theta 10000: the value of Llama 1 and 2, which do not state it")
        return 10000.0
    raise CannotConvert(
        f"{params.path}: rope_theta: is missing: say --rope-theta "
        "(10000 for Llama 1 and 2, 1000000 for Code Llama, 500000 for Llama 3)"
    )


def _refuse_contradiction(option: str, chosen: float | None, stated: float | None, path: Path) -> None:
    if None not in (chosen, stated) and chosen != stated:
        raise CannotConvert(f"{option} {chosen:g}: {path} says {stated:g}: remove one")


def _rope(
    params: Params, measured: Measured, theta: float, choices: Choices, notes: list[str]
) -> tuple[Json | None, int]:
    """rope_scaling and max_position_embeddings."""
    if not params.values.get("use_scaled_rope"):
        if choices.rope_scaling_factor is not None:
            raise CannotConvert(f"--rope-scaling-factor: {params.path} does not say use_scaled_rope")
        return None, _positions(params, measured, theta, choices, notes)
    scaling = _scaling(params, measured, choices, notes)
    high = params.number("rope_high_freq_factor")
    rope = {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": high or scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
    assumed = [f"low_freq_factor {scaling.low_freq_factor:g}"]
    assumed += [f"high_freq_factor {scaling.high_freq_factor:g}"] if high is None else []
    assumed += [f"{scaling.original_max_positions} original positions"]
    notes.append(f"rope scaling with {', '.join(assumed)}: what Meta's code has, params.json does not say")
    if choices.max_positions is None:
        notes.append(f"max_position_embeddings {scaling.max_positions}: that of Llama 3.1 to 3.3")
    return rope, choices.max_positions or scaling.max_positions


def _scaling(params: Params, measured: Measured, choices: Choices, notes: list[str]) -> families.Scaling:
    stated = params.number("rope_scaling_factor")
    _refuse_contradiction("--rope-scaling-factor", choices.rope_scaling_factor, stated, params.path)
    factor = stated or choices.rope_scaling_factor
    if factor is not None:
        return families.Scaling(factor)
    shape = (measured.hidden, params.count("n_layers"), params.count("n_heads"), measured.vocab)
    known = families.scaling_of(*shape)
    if known is None:
        raise CannotConvert(
            f"{params.path}: use_scaled_rope: its factor is not in there, nor is the model known: "
            "say --rope-scaling-factor (8 for Llama 3.1 and 3.3, 32 for Llama 3.2)"
        )
    notes.append(f"rope scaling factor {known.factor:g}: that of Meta's model of this shape")
    return known


def _positions(params: Params, measured: Measured, theta: float, choices: Choices, notes: list[str]) -> int:
    if choices.max_positions is not None:
        return choices.max_positions
    known = families.max_positions(measured.vocab, theta, _norm_eps(params))
    if known is None:
        raise CannotConvert(
            f"{params.path}: does not say how many positions the model was made for: "
            "say --max-positions (2048 for Llama 1, 4096 for Llama 2, 8192 for Llama 3)"
        )
    notes.append(f"max_position_embeddings {known[0]}: {known[1]}")
    return known[0]


def to_params(config: LlamaConfig, vocab: int) -> Json:
    """params.json of a model. `vocab`: rows of the embedding as written, padding included.

    Raises CannotConvert: something that it has no place for, and that Meta's code would compute otherwise."""
    params: Json = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": vocab,
        **_ffn_params(config),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
    }
    if config.head_dim * config.num_heads != config.hidden_size:
        params["head_dim"] = config.head_dim
    if config.rope.divisor != 1.0:
        raise CannotConvert("config.json: linear rope scaling has no place in Meta's format")
    if config.rope.llama3 is not None:
        _check_scaling(config.rope.llama3)
        params["use_scaled_rope"] = True
        params["rope_scaling_factor"] = config.rope.llama3.factor
        params["rope_high_freq_factor"] = config.rope.llama3.high_freq_factor
    return params


def _check_scaling(scaling: Llama3Scaling) -> None:
    fixed = families.Scaling(scaling.factor)
    for key, mine, meta in (
        ("low_freq_factor", scaling.low_freq_factor, fixed.low_freq_factor),
        ("original_max_position_embeddings", scaling.original_max_positions, fixed.original_max_positions),
    ):
        if mine != meta:
            raise CannotConvert(
                f"config.json: rope scaling: {key} {mine:g} has no place in Meta's params.json, which means "
                f"{meta:g}: --to hf and --to sluice keep it"
            )


def _ffn_params(config: LlamaConfig) -> Json:
    """multiple_of and ffn_dim_multiplier that Meta's formula turns into the intermediate size."""
    base, ffn = int(8 * config.hidden_size / 3), config.intermediate_size
    for multiple_of in (4096, 2048, 1024, 512, 256):
        for factor in (None, 1.3, 1.4, 1.5, 1.0):
            if multiple_of * -(-int((factor or 1.0) * base) // multiple_of) == ffn:
                return {"multiple_of": multiple_of, **({"ffn_dim_multiplier": factor} if factor else {})}
    # a multiple_of of the size itself gives the size for any factor between 0 and 1
    return {"multiple_of": ffn, "ffn_dim_multiplier": min(1.0, ffn / base)}
