"""Llama on one tensor-parallel rank: fused projections, two all-reduces a layer.

Embedding and head are split by the vocabulary, so that a rank's memory is its share of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.base import ReportProgress
from engines.config import ModelConfig
from engines.models.checkpoint import Checkpoint
from engines.models.config import LlamaConfig
from engines.models.fused_layers import FusedLayers
from engines.models.kernel_layers import KernelLayers, require_deterministic
from engines.models.layers import (
    LinearOp,
    RMSNorm,
    Rotary,
    embed_share,
    in_float32,
    make_linear,
    pack,
    swiglu,
)
from engines.models.names import Slice, expected_tensors, kv_heads_of, slice_of
from engines.models.quantized import make_quantized_linear
from engines.runtime.attention import paged_attention
from engines.runtime.context import current
from engines.runtime.mesh import Mesh

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class HowLinear:
    """What a configuration says of how linears are computed; see the keys of its YAML."""

    is_deterministic: bool = False
    int8_activations: bool = True
    pack_weights: bool = True

    @classmethod
    def of(cls, config: ModelConfig) -> HowLinear:
        return cls(config.deterministic, config.int8_activations, config.pack_weights)


class WeightLoader:
    """Hands out this rank's slices of a checkpoint, joined where a projection is fused."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        mesh: Mesh,
        dtype: torch.dtype,
        report: ReportProgress,
        how: HowLinear = HowLinear(),
    ) -> None:
        self._checkpoint, self._config, self._mesh, self._dtype = checkpoint, config, mesh, dtype
        self.is_deterministic, self._how = how.is_deterministic, how
        self._specs = expected_tensors(config)
        checkpoint.check(self._specs.values(), optional=frozenset({"lm_head.weight"}))
        self._report, self._num_read, self._num_tensors = report, 0, len(self._specs)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def expect_layers(self, layers: range) -> None:
        """Only these layers will be read here: the fraction done is of them."""
        self._num_tensors = -(-len(self._specs) * len(layers) // self._config.num_layers)

    def load(self, *names: str) -> Tensor:
        """This rank's slices of the tensors, one below the other."""
        out = self._checkpoint.mapped(names, self._dtype)
        if out is None:
            out = self._read(names)
        self._count(len(names))
        return out.to(self._mesh.device)

    def _count(self, num_read: int) -> None:
        self._num_read += num_read
        self._report(min(1.0, self._num_read / self._num_tensors))

    def _read(self, names: tuple[str, ...]) -> Tensor:
        parts = [self._slice(name) for name in names]
        shape = list(self._specs[names[0]].shape)
        shape[parts[0].dim] = parts[0].length
        rows = [part.length if part.dim == 0 else shape[0] for part in parts]
        out = torch.empty((sum(rows), *shape[1:]), dtype=self._dtype)
        for name, part, view in zip(names, parts, torch.split(out, rows), strict=True):
            self._checkpoint.read_into(view, name, part)
        return out

    def linear(self, *names: str) -> LinearOp:
        """The column-parallel projections `names`, fused into one."""
        return self._linear(names, self._bias(names))

    def row_linear(self, name: str) -> LinearOp:
        """A row-parallel projection; its partial sums are for all_reduce, so one rank only adds the bias."""
        bias = self._bias((name,))
        return self._linear((name,), bias if self._mesh.tp_rank == 0 else None)

    def _linear(self, names: tuple[str, ...], bias: Tensor | None) -> LinearOp:
        weights = tuple(f"{name}.weight" for name in names)
        quantized = self._checkpoint.quantized(weights)
        if quantized is None:
            return make_linear(self.load(*weights), bias, is_deterministic=self.is_deterministic)
        self._count(len(weights))
        weight, scale = (tensor.to(self._mesh.device) for tensor in quantized)
        return make_quantized_linear(
            weight,
            scale,
            bias,
            self._dtype,
            is_deterministic=self.is_deterministic,
            keeps_rows=not self._how.int8_activations,
        )

    def finish(self, linears: Sequence[LinearOp]) -> None:
        """Those of one layer have been loaded."""
        if self._how.pack_weights:
            for weight in pack(linears):
                self._checkpoint.let_go(weight)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.load(f"{name}.weight"), self._config.rms_norm_eps)

    def _bias(self, names: tuple[str, ...]) -> Tensor | None:
        biases = [f"{name}.bias" for name in names]
        return self.load(*biases) if biases[0] in self._specs else None

    def _slice(self, name: str) -> Slice:
        spec = self._specs[name]
        return slice_of(spec.rule.placement, spec.shape, self._config, self._mesh.tp_rank, self._mesh.tp_size)


class Attention:
    """Self-attention over the paged K/V, this rank's heads."""

    def __init__(
        self, loader: WeightLoader, config: LlamaConfig, mesh: Mesh, layer: int, cache_index: int
    ) -> None:
        name = f"model.layers.{layer}.self_attn"
        self.qkv = loader.linear(f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj")
        self.output = loader.row_linear(f"{name}.o_proj")
        self.num_heads = config.num_heads // mesh.tp_size
        self.num_kv_heads = len(kv_heads_of(config, mesh.tp_rank, mesh.tp_size))
        self.head_dim, self.scale, self.layer = config.head_dim, config.head_dim**-0.5, cache_index

    def __call__(
        self, x: Tensor, rotary: Rotary, cos: Tensor, sin: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """[T, H] to the same, or to what `rows` of it become, [R, H]."""
        num_turned = self.num_heads + self.num_kv_heads
        heads = self.qkv(x).view(x.shape[0], num_turned + self.num_kv_heads, self.head_dim)
        rotary.turn(heads[:, :num_turned], cos, sin)
        query, key, value = heads.tensor_split((self.num_heads, num_turned), dim=1)
        out = paged_attention(query, key, value, self.layer, self.scale).reshape(x.shape[0], -1)
        return self.output(out if rows is None else out.index_select(0, rows))


class Mlp:
    """SwiGLU, this rank's share of the inner dimension."""

    def __init__(self, loader: WeightLoader, layer: int) -> None:
        name = f"model.layers.{layer}.mlp"
        self.gate_up = loader.linear(f"{name}.gate_proj", f"{name}.up_proj")
        self.down = loader.row_linear(f"{name}.down_proj")

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class Layer:
    """One decoder layer; `hidden` is changed in place. `cache_index`: its place in this rank's K/V."""

    def __init__(
        self, loader: WeightLoader, config: LlamaConfig, mesh: Mesh, layer: int, cache_index: int
    ) -> None:
        name = f"model.layers.{layer}"
        self.mesh = mesh
        self.attention_norm = loader.norm(f"{name}.input_layernorm")
        self.attention = Attention(loader, config, mesh, layer, cache_index)
        self.mlp_norm = loader.norm(f"{name}.post_attention_layernorm")
        self.mlp = Mlp(loader, layer)
        loader.finish(self.linears)

    @property
    def linears(self) -> tuple[LinearOp, ...]:
        return self.attention.qkv, self.attention.output, self.mlp.gate_up, self.mlp.down

    def __call__(
        self, hidden: Tensor, rotary: Rotary, cos: Tensor, sin: Tensor, rows: Tensor | None = None
    ) -> None:
        """`rows` of it, if given: of the others only keys and values are made."""
        attended = self.attention(self.attention_norm(hidden), rotary, cos, sin, rows)
        read = hidden if rows is None else hidden.index_select(0, rows)
        read.add_(self.mesh.all_reduce(attended))
        read.add_(self.mesh.all_reduce(self.mlp(self.mlp_norm(read))))
        if rows is not None:
            hidden.index_copy_(0, rows, read)


class Llama:
    """The model, or the `layers` of one pipeline stage: the first stage embeds, the last has norm and head.

    `max_positions` bounds the positions that it will be given.
    """

    def __init__(
        self,
        loader: WeightLoader,
        config: LlamaConfig,
        mesh: Mesh,
        max_positions: int,
        layers: range | None = None,
    ) -> None:
        self.config, self.mesh = config, mesh
        layers = range(config.num_layers) if layers is None else layers
        loader.expect_layers(layers)
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.num_layers
        if self.is_first:
            self.embedding = loader.load(_EMBEDDING)  # [ceil(V / tp), H]
        self.layers = [Layer(loader, config, mesh, layer, index) for index, layer in enumerate(layers)]
        if self.is_last:
            self.norm = loader.norm("model.norm")
            self.head = self._load_head(loader)
            loader.finish((self.head,))
        self.rotary = Rotary(config.rope, config.head_dim, max_positions, loader.dtype, mesh.device)
        self.fused_layers = FusedLayers.of(self)
        self.kernel_layers = KernelLayers.of(self)
        if loader.is_deterministic:
            self.kernel_layers = require_deterministic(self.kernel_layers)

    def _load_head(self, loader: WeightLoader) -> LinearOp:
        if not self.config.tie_word_embeddings:
            return loader.linear("lm_head")
        weight = self.embedding if self.is_first else loader.load(_EMBEDDING)
        return make_linear(weight, is_deterministic=loader.is_deterministic)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[T], [T] to hidden states [T, H] after the last norm, the same on every rank."""
        return self.norm(self.run_layers(self.embed(input_ids), positions))

    def run_layers(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """[T, H] to [T, H] through the layers that are here, in place. Inside a forward context.

        After the model's last layer only the rows that are read, as the batch says, are what they should be.
        """
        if self.kernel_layers is not None and self.kernel_layers.takes(hidden):
            return self.kernel_layers.run(hidden)
        if self.fused_layers is not None:
            return self.fused_layers.run(hidden, positions)
        cos, sin = self.rotary.rows(positions)
        *others, last = self.layers
        for layer in others:
            layer(hidden, self.rotary, cos, sin)
        last(hidden, self.rotary, cos, sin, self.read_rows())
        return hidden

    def read_rows(self) -> Tensor | None:
        """The rows after the last layer here that are read; None for all. Inside a forward context."""
        batch = current().batch
        is_read = batch.reads_all or batch.max_query_len == 1 or not self.is_last
        return None if is_read else batch.logit_rows

    def logits(self, hidden: Tensor) -> Tensor | None:
        """[L, H] to [L, V] float32 on tensor-parallel rank 0, None on the others."""
        if self.mesh.tp_size == 1:
            return in_float32(self.head, hidden)
        logits = self.mesh.gather_columns(self.head(hidden))
        # filled up so that the ranks' shares are equal
        return None if logits is None else logits[:, : self.config.vocab_size]

    def embed(self, input_ids: Tensor) -> Tensor:
        """[T] to [T, H]: each rank looks up what its part of the vocabulary holds, zeros elsewhere."""
        lookup = partial(F.embedding, weight=self.embedding)
        return embed_share(input_ids, lookup, self.embedding.shape[0], self.mesh)
