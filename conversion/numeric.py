"""A numeric check on a truncated model: what bit-equality cannot see, a wrong order of rows.

A few layers and a few rows of the vocabulary are run in float32: Hugging Face's order by transformers,
Meta's order by the arithmetic of Meta's code (neighbouring dimensions turned as complex numbers), straight
from the stored rows. Meta's are run by transformers too, in the order and with the config.json that a
conversion gives them. All must give the same logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conversion.source import Source
from conversion.tensors import LogicalTensor, Rows
from engines.models.config import Llama3Scaling, LlamaConfig
from engines.models.names import expected_tensors

Arithmetic = Literal["hf", "meta"]

NUM_TOKENS = 12
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def arithmetics(source: Source) -> tuple[Arithmetic, ...]:
    """Those that a source is to be run by."""
    return ("meta", "hf") if source.format == "meta" else ("hf",)


def logits(source: Source, num_layers: int, by: Arithmetic) -> Tensor:
    """[NUM_TOKENS, NUM_TOKENS] of a fixed prompt, by transformers or by Meta's arithmetic."""
    rows = _token_rows(source.config)
    weights = {
        name: _load(tensor, rows if name in (_EMBEDDING, _HEAD) else None, by == "meta")
        for name, tensor in source.tensors.items()
        if _is_kept(name, num_layers)
    }
    weights.setdefault(_HEAD, weights[_EMBEDDING])
    run = _meta_forward if by == "meta" else _hf_forward
    with torch.inference_mode():
        return run(source, weights, min(num_layers, source.config.num_layers))


def _token_rows(config: LlamaConfig) -> Rows:
    """Rows of the vocabulary, spread over all of it."""
    return np.linspace(0, config.vocab_size - 1, NUM_TOKENS).astype(np.int64)


def _is_kept(name: str, num_layers: int) -> bool:
    parts = name.split(".")
    return parts[1] != "layers" or int(parts[2]) < num_layers


def _load(tensor: LogicalTensor, rows: Rows | None, as_stored: bool) -> Tensor:
    """float32. `as_stored`: without putting Meta's rows into Hugging Face's order."""
    if as_stored:
        tensor = replace(tensor, meta_head_dim=0)
    picked = np.arange(tensor.num_rows, dtype=np.int64) if rows is None else rows
    return tensor.values(picked).reshape(len(picked), *tensor.shape[1:])


def _hf_forward(source: Source, weights: dict[str, Tensor], num_layers: int) -> Tensor:
    from transformers import LlamaConfig as HfConfig
    from transformers import LlamaForCausalLM

    sizes = {"vocab_size": NUM_TOKENS, "num_hidden_layers": num_layers, "tie_word_embeddings": False}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = HfConfig.from_dict({**source.config_json, **sizes, **special, "torch_dtype": "float32"})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    result: Tensor = model.train(False)(torch.arange(NUM_TOKENS)[None], use_cache=False).logits[0]
    return result


def _meta_forward(source: Source, weights: dict[str, Tensor], num_layers: int) -> Tensor:
    config = source.config
    hidden = weights[_EMBEDDING]
    turns = _turns(config)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        names = [s for s in expected_tensors(config) if s.startswith(prefix)]
        own = {name.removeprefix(prefix): weights[name] for name in names}
        hidden = hidden + _attention(_norm(hidden, own["input_layernorm.weight"], config), own, config, turns)
        normed = _norm(hidden, own["post_attention_layernorm.weight"], config)
        gate, up = _linear(normed, own, "mlp.gate_proj"), _linear(normed, own, "mlp.up_proj")
        hidden = hidden + _linear(F.silu(gate) * up, own, "mlp.down_proj")
    return _norm(hidden, weights["model.norm.weight"], config) @ weights[_HEAD].T


def _linear(x: Tensor, own: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, own[f"{name}.weight"], own.get(f"{name}.bias"))


def _norm(x: Tensor, weight: Tensor, config: LlamaConfig) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, config.rms_norm_eps)


def _attention(x: Tensor, own: dict[str, Tensor], config: LlamaConfig, turns: Tensor) -> Tensor:
    shape = (len(x), -1, config.head_dim)
    query, key, value = (_linear(x, own, f"self_attn.{name}_proj").view(shape) for name in "qkv")
    groups = config.num_heads // config.num_kv_heads
    key, value = (t.repeat_interleave(groups, dim=1).transpose(0, 1) for t in (_turned(key, turns), value))
    out = F.scaled_dot_product_attention(
        _turned(query, turns).transpose(0, 1), key, value, is_causal=True
    )  # [heads, tokens, head_dim]
    return _linear(out.transpose(0, 1).reshape(len(x), -1), own, "self_attn.o_proj")


def _turns(config: LlamaConfig) -> Tensor:
    """[tokens, 1, head_dim / 2] complex: e to the i times position times frequency."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / config.rope.theta**exponents / config.rope.divisor
    if config.rope.llama3 is not None:
        frequencies = _stretched(frequencies, config.rope.llama3)
    angles = torch.outer(torch.arange(NUM_TOKENS).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def _stretched(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Source: apply_scaling in Meta's llama-models."""
    turns = scaling.original_max_positions * frequencies / (2 * torch.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def _turned(heads: Tensor, turns: Tensor) -> Tensor:
    """[tokens, heads, head_dim]: neighbouring dimensions are one complex number."""
    pairs = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)
