"""Every tensor of a Llama checkpoint: its names, its shape, and where tensor parallelism puts it.

ONE table, read by the loader (a rank's slices) and by the converter (names and slices, both ways).
Torch-free. Sources: transformers' modeling_llama.py for the Hugging Face names, Meta's llama
reference code for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.models.config import LlamaConfig


class Placement(Enum):
    """What a tensor-parallel rank holds of a tensor."""

    COLUMN = "column"  # rows of dim 0, an equal share each
    KV_COLUMN = (
        "kv column"  # as COLUMN, by whole K/V heads; replicated where there are fewer heads than ranks
    )
    ROW = "row"  # columns of dim 1, an equal share each
    VOCAB = "vocab"  # rows of dim 0, an equal share of the vocabulary padded to a multiple of the ranks
    REPLICATED = "replicated"


class Needs(Enum):
    """When a tensor is there."""

    ALWAYS = "always"
    ATTENTION_BIAS = "attention_bias"
    MLP_BIAS = "mlp_bias"
    UNTIED = "untied"

    def met_by(self, config: LlamaConfig) -> bool:
        match self:
            case Needs.ATTENTION_BIAS:
                return config.attention_bias
            case Needs.MLP_BIAS:
                return config.mlp_bias
            case Needs.UNTIED:
                return not config.tie_word_embeddings
        return True


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One tensor, or one of each layer ("{layer}" in its names). `dims` name sizes of LlamaConfig."""

    name: str  # Hugging Face's
    meta_name: str
    placement: Placement
    dims: tuple[str, ...]
    needs: Needs = Needs.ALWAYS

    @property
    def is_per_layer(self) -> bool:
        return "{layer}" in self.name

    @property
    def is_rotated(self) -> bool:
        """Its rows are turned by their positions: Meta stores them in another order (conversion)."""
        return ".q_proj." in self.name or ".k_proj." in self.name


def _linear(
    name: str, meta: str, placement: Placement, out: str, into: str, bias: Needs
) -> tuple[TensorRule, TensorRule]:
    hf, meta = f"model.layers.{{layer}}.{name}", f"layers.{{layer}}.{meta}"
    bias_placement = Placement.REPLICATED if placement is Placement.ROW else placement
    return (
        TensorRule(f"{hf}.weight", f"{meta}.weight", placement, (out, into)),
        TensorRule(f"{hf}.bias", f"{meta}.bias", bias_placement, (out,), bias),
    )


_LAYER = "model.layers.{layer}."
_P = Placement

RULES: tuple[TensorRule, ...] = (
    TensorRule("model.embed_tokens.weight", "tok_embeddings.weight", _P.VOCAB, ("vocab", "hidden")),
    TensorRule(
        _LAYER + "input_layernorm.weight", "layers.{layer}.attention_norm.weight", _P.REPLICATED, ("hidden",)
    ),
    *_linear("self_attn.q_proj", "attention.wq", _P.COLUMN, "q", "hidden", Needs.ATTENTION_BIAS),
    *_linear("self_attn.k_proj", "attention.wk", _P.KV_COLUMN, "kv", "hidden", Needs.ATTENTION_BIAS),
    *_linear("self_attn.v_proj", "attention.wv", _P.KV_COLUMN, "kv", "hidden", Needs.ATTENTION_BIAS),
    *_linear("self_attn.o_proj", "attention.wo", _P.ROW, "hidden", "q", Needs.ATTENTION_BIAS),
    TensorRule(
        _LAYER + "post_attention_layernorm.weight",
        "layers.{layer}.ffn_norm.weight",
        _P.REPLICATED,
        ("hidden",),
    ),
    *_linear("mlp.gate_proj", "feed_forward.w1", _P.COLUMN, "ffn", "hidden", Needs.MLP_BIAS),
    *_linear("mlp.up_proj", "feed_forward.w3", _P.COLUMN, "ffn", "hidden", Needs.MLP_BIAS),
    *_linear("mlp.down_proj", "feed_forward.w2", _P.ROW, "hidden", "ffn", Needs.MLP_BIAS),
    TensorRule("model.norm.weight", "norm.weight", _P.REPLICATED, ("hidden",)),
    TensorRule("lm_head.weight", "output.weight", _P.VOCAB, ("vocab", "hidden"), Needs.UNTIED),
)

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rope.freqs")  # derived values that old checkpoints carry


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of one model."""

    name: str
    rule: TensorRule
    shape: tuple[int, ...]
    layer: int | None = None

    @property
    def is_projection(self) -> bool:
        """A matrix of a layer: what quantisation makes smaller."""
        return self.layer is not None and len(self.shape) == 2

    @property
    def meta_name(self) -> str:
        return self.rule.meta_name.format(layer=self.layer)

    @property
    def scale(self) -> TensorSpec:
        """The scales of a quantised projection: one for each row, held by whoever holds a part of the row."""
        is_row = self.rule.placement is Placement.ROW
        rule = replace(self.rule, placement=Placement.REPLICATED) if is_row else self.rule
        return TensorSpec(f"{self.name}_scale", rule, self.shape[:1], self.layer)


def expected_tensors(config: LlamaConfig) -> dict[str, TensorSpec]:
    """Every tensor that a Hugging Face checkpoint of this model holds, by name, in the model's order."""
    return {spec.name: spec for spec in _specs(config)}


def _specs(config: LlamaConfig) -> Iterator[TensorSpec]:
    sizes = config.sizes()
    rules = [rule for rule in RULES if rule.needs.met_by(config)]
    first_layer = next(i for i, rule in enumerate(rules) if rule.is_per_layer)
    per_layer = [rule for rule in rules if rule.is_per_layer]
    for rule in rules[:first_layer]:
        yield _spec(rule, sizes, rule.name)
    for layer in range(config.num_layers):
        for rule in per_layer:
            yield _spec(rule, sizes, rule.name.format(layer=layer), layer)
    for rule in rules[first_layer:]:
        if not rule.is_per_layer:
            yield _spec(rule, sizes, rule.name)


def _spec(rule: TensorRule, sizes: dict[str, int], name: str, layer: int | None = None) -> TensorSpec:
    return TensorSpec(name, rule, tuple(sizes[dim] for dim in rule.dims), layer)


def is_on_stage(spec: TensorSpec, layers: range, config: LlamaConfig) -> bool:
    """Whether the pipeline stage of these layers holds a tensor: the embedding is on the first, norm and
    head on the last, a tied embedding on both."""
    if spec.layer is not None:
        return spec.layer in layers
    is_first, is_last = layers.start == 0, layers.stop == config.num_layers
    if spec.name == "model.embed_tokens.weight":
        return is_first or (is_last and config.tie_word_embeddings)
    return is_last


@dataclass(frozen=True, slots=True)
class Slice:
    """start .. stop of one dimension. `pad`: rows of zeros that follow."""

    dim: int
    start: int
    stop: int
    pad: int = 0

    @property
    def length(self) -> int:
        return self.stop - self.start + self.pad


def slice_of(placement: Placement, shape: tuple[int, ...], config: LlamaConfig, rank: int, tp: int) -> Slice:
    """What rank `rank` of `tp` holds of a tensor of that shape. The model must be divisible: `check_tp`."""
    match placement:
        case Placement.REPLICATED:
            return Slice(0, 0, shape[0])
        case Placement.COLUMN:
            return _share(0, shape[0], rank, tp)
        case Placement.ROW:
            return _share(1, shape[1], rank, tp)
        case Placement.KV_COLUMN:
            heads = kv_heads_of(config, rank, tp)
            return Slice(0, heads.start * config.head_dim, heads.stop * config.head_dim)
        case Placement.VOCAB:
            return padded_share(shape[0], rank, tp)


def padded_share(size: int, rank: int, tp: int) -> Slice:
    """Rows of dim 0, as many on every rank: the last ones have zeros for what `size` lacks."""
    share = -(-size // tp)
    start, stop = min(rank * share, size), min((rank + 1) * share, size)
    return Slice(0, start, stop, pad=share - (stop - start))


def kv_heads_of(config: LlamaConfig, rank: int, tp: int) -> range:
    """As kv_share."""
    return kv_share(config.num_kv_heads, rank, tp)


def kv_share(num_kv_heads: int, rank: int, tp: int) -> range:
    """The K/V heads of a rank: its share, or the one head that its query heads read."""
    if num_kv_heads < tp:
        head = rank * num_kv_heads // tp
        return range(head, head + 1)
    share = num_kv_heads // tp
    return range(rank * share, (rank + 1) * share)


def _share(dim: int, size: int, rank: int, tp: int) -> Slice:
    share = size // tp
    return Slice(dim, rank * share, (rank + 1) * share)


def indivisible(config: LlamaConfig, tp: int) -> str | None:
    """Why the model cannot be split `tp` ways, or None."""
    if config.num_heads % tp:
        return f"its {config.num_heads} attention heads"
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        return f"its {config.num_kv_heads} key/value heads"
    if config.intermediate_size % tp:
        return f"its intermediate size of {config.intermediate_size}"
    return None
