"""Is a Hugging Face model exact over the paged K/V? Asked of its class, before any weight is read.

`inspect_model` builds the model without memory (on the meta device) and runs two tokens through it, recording
what its layers ask of the attention function: head counts, scale, window, soft-capping, sinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from engines.base import UnsupportedModel
from engines.models.hf import HFDecoder, HFModel, ModelShape
from engines.models.hf_support import EXACT_ROPES, read_config, refuse

_PROBE = "sluice_probe"


def inspect_model(model_dir: str | Path, max_model_len: int | None) -> HFModel:
    """Read config.json and see that the model is exact up to `max_model_len` positions (None: all its own).

    Raises UnsupportedModel naming what is not and the remedy; BadModelDir. Reads no weight.
    """
    path = Path(model_dir) / "config.json"
    data = read_config(model_dir)
    with _explained(path):
        config = CONFIG_MAPPING[data["model_type"]].from_dict(data)
        model, calls = _probe(config)
    max_positions = getattr(config, "max_position_embeddings", None)
    if type(max_positions) is not int or max_positions < 1:
        raise refuse(
            path, "max_position_embeddings", max_positions, "must be a whole number", "fix config.json"
        )
    served = min(max_model_len or max_positions, max_positions)
    _check_rope(path, config, served)
    _check_calls(path, config, calls, served)
    with _explained(path):
        _check_head(path, model)
    _check_model(path, model)
    return HFModel(Path(model_dir), config, _shape(model, calls, max_positions))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """transformers raises whatever its configurations' and models' code raises."""
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise UnsupportedModel(
            f"{path}: transformers cannot make a model of it: {type(error).__name__}: {text}: fix config.json"
        ) from error


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the attention function, without data."""

    module: nn.Module
    query: tuple[int, ...]  # [1, Hq, T, D]
    key: tuple[int, ...]  # [1, Hkv, T, D]
    value: tuple[int, ...]
    has_mask: bool
    scaling: float | None
    options: dict[str, Any]


def _probe(config: PreTrainedConfig) -> tuple[PreTrainedModel, list[_Call]]:
    """Build the model without memory and run two tokens through it."""
    calls: list[_Call] = []

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: Any
    ) -> tuple[Tensor, None]:
        calls.append(
            _Call(
                module=module,
                query=tuple(query.shape),
                key=tuple(key.shape),
                value=tuple(value.shape),
                has_mask=attention_mask is not None,
                scaling=kwargs.pop("scaling", None),
                options=kwargs,
            )
        )
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_PROBE, record)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation=_PROBE, dtype=torch.bfloat16
        )
        ids = torch.zeros(2, dtype=torch.int64)
        HFDecoder(model.eval(), ()).forward(ids, ids)
    return model, calls


def _check_rope(path: Path, config: PreTrainedConfig, served: int) -> None:
    """Frequencies that depend on a batch's longest sequence would make tokens depend on batch-mates."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in EXACT_ROPES:
        raise refuse(
            path, "rope_type", kind, "is not known to be exact", "use: " + ", ".join(sorted(EXACT_ROPES))
        )
    if kind == "longrope":
        original: int = rope["original_max_position_embeddings"]
        if served > original:
            why = f"changes all positions once a sequence of the batch passes {original}"
            raise refuse(path, "rope_type", kind, why, f"set maxModelLen to {original} or less")


_NEUTRAL = frozenset(
    ("dropout", "position_ids", "use_cache", "is_causal", "cache_position", "output_attentions")
)
"""Arguments of attention functions that change nothing here: dropout is 0 outside training."""


def _check_calls(path: Path, config: PreTrainedConfig, calls: list[_Call], served: int) -> None:
    if [getattr(call.module, "layer_idx", None) for call in calls] != list(range(config.num_hidden_layers)):
        why = f"calls the attention function {len(calls)} times in {config.num_hidden_layers} layers"
        raise refuse(path, "model_type", config.model_type, why, "use a model whose layers all attend once")
    for call in calls:
        _check_call(path, config, call, calls[0])
    windows = {call.options.get("sliding_window") for call in calls} | {_window(config)}
    for window in windows:
        if window is not None and window < served:
            why = f"is active: {served} positions are to be served, and paged attention sees them all"
            remedy = f"set maxModelLen to {window} or less, which makes no difference to the model"
            raise refuse(path, "sliding_window", window, why, remedy)


def _window(config: PreTrainedConfig) -> int | None:
    """The window that config.json speaks of, unless it says that no layer has it."""
    kinds = getattr(config, "layer_types", None)
    is_active = "sliding_attention" in kinds if kinds else True
    return getattr(config, "sliding_window", None) if is_active else None


def _check_call(path: Path, config: PreTrainedConfig, call: _Call, first: _Call) -> None:
    kind, remedy = config.model_type, "use another model"
    options = {key: value for key, value in call.options.items() if key not in _NEUTRAL and value is not None}
    options.pop("sliding_window", None)
    if options:
        why = f"passes {', '.join(sorted(options))} to attention (soft-capping, sinks or the like)"
        raise refuse(path, "model_type", kind, why, remedy)
    if call.options.get("dropout") or call.has_mask or call.scaling is None:
        raise refuse(path, "model_type", kind, "uses dropout, a mask of its own or no scale", remedy)
    if call.key != call.value or call.query[-1] != call.key[-1]:
        raise refuse(path, "model_type", kind, "has keys and values of different sizes", remedy)
    if (call.query, call.key) != (first.query, first.key) or call.query[1] % call.key[1]:
        raise refuse(path, "model_type", kind, "has layers of different head counts", remedy)


def _check_head(path: Path, model: PreTrainedModel) -> None:
    """Does the head work behind given hidden states?"""
    hidden = torch.zeros(2, model.config.hidden_size, dtype=model.dtype, device="meta")
    shape, vocab = tuple(HFDecoder(model, ()).logits(hidden).shape), model.config.vocab_size
    if shape != (2, vocab):
        why = f"gives logits {shape} for 2 tokens and a vocabulary of {vocab}"
        raise refuse(
            path, "model_type", model.config.model_type, why, "fix config.json, or use another model"
        )


def _check_model(path: Path, model: PreTrainedModel) -> None:
    """What the loader below does not do: persistent buffers, parts kept in float32."""
    extra = set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for name in [*sorted(extra), *kept]:
        raise refuse(
            path, "model_type", model.config.model_type, f"has the special part {name}", "use another"
        )


def _shape(model: PreTrainedModel, calls: list[_Call], max_positions: int) -> ModelShape:
    names = {module: name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    return ModelShape(
        num_heads=calls[0].query[1],
        num_kv_heads=calls[0].key[1],
        head_dim=calls[0].key[3],
        attention_names=tuple(names[call.module] for call in calls),
        embedding_name=f"{names[embedding]}.weight",
        vocab_size=model.config.vocab_size,
        max_positions=max_positions,
    )
