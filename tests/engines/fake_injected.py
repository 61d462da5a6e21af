"""Kernel injection as DeepSpeed does it, without a GPU: layers with its limits, wrong where it is wrong.

A layer takes copies of its rank's slices; the one that it stands for goes, with its weights. Keys and values
lie in one workspace for the process, which the first pass sizes. A pass over one token a row continues the
batch before. Masks of padding are not looked at.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engines.base import ReportProgress
from engines.config import ModelConfig
from engines.config_deepspeed import DeepSpeedFile
from engines.deepspeed_inject import DeepSpeedInjectEngine, FillLayer
from engines.runtime.mesh import Mesh


class FakeInjectedModule(nn.Module):
    """Stands where a LlamaDecoderLayer stood."""

    workspace: ClassVar[dict[int, Tensor]] = {}  # layer to [2, B, max_out_tokens, H, D]
    num_tokens: ClassVar[int] = 0  # of each row of the batch, so far

    def __init__(self, layer: Any, index: int, is_last: bool, max_out_tokens: int, mesh: Mesh) -> None:
        super().__init__()
        self.index, self.is_last, self.max_out_tokens, self.mesh = index, is_last, max_out_tokens, mesh
        self.norm, self.mlp_norm = deepcopy(layer.input_layernorm), deepcopy(layer.post_attention_layernorm)
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim = attention.head_dim
        self.qkv = [self._slice(each, 0) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.gate, self.up = self._slice(mlp.gate_proj, 0), self._slice(mlp.up_proj, 0)
        self.out, self.down = self._slice(attention.o_proj, 1), self._slice(mlp.down_proj, 1)

    def _slice(self, linear: nn.Linear, dim: int) -> Tensor:
        return linear.weight.detach().chunk(self.mesh.tp_size, dim)[self.mesh.tp_rank].clone()

    @classmethod
    def reset_cache(cls) -> None:
        cls.num_tokens = 0

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        assert attention_mask is None, "the kernels' own mask is causal; another one means padding"
        rows, length, _ = x.shape
        past = 0 if length > 1 else FakeInjectedModule.num_tokens
        normed = self.norm(x)
        query, key, value = (
            F.linear(normed, weight).view(rows, length, -1, self.head_dim) for weight in self.qkv
        )
        cos, sin = kwargs["position_embeddings"]
        query, key = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)
        space = self._space(rows, key)
        space[0, :rows, past : past + length], space[1, :rows, past : past + length] = key, value
        keys, values = space[:, :rows, : past + length].transpose(2, 3)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, is_causal=length > 1)
        attended = attended.transpose(1, 2).reshape(rows, length, -1)
        x = x + self.mesh.all_reduce(F.linear(attended, self.out))
        normed = self.mlp_norm(x)
        hidden = F.silu(F.linear(normed, self.gate)) * F.linear(normed, self.up)
        output: Tensor = x + self.mesh.all_reduce(F.linear(hidden, self.down))
        if self.is_last:
            FakeInjectedModule.num_tokens = past + length
        return output

    def _space(self, rows: int, key: Tensor) -> Tensor:
        if self.index not in FakeInjectedModule.workspace:
            shape = (2, rows, self.max_out_tokens, *key.shape[2:])
            FakeInjectedModule.workspace[self.index] = torch.zeros(shape)
        space = FakeInjectedModule.workspace[self.index]
        assert rows <= space.shape[1], f"the workspace has {space.shape[1]} rows, the batch {rows}"
        return space


class FakeInjected:
    """Implements engines.deepspeed_inject.Injected."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def reset(self) -> None:
        FakeInjectedModule.reset_cache()


def fake_inject(
    model: PreTrainedModel,
    settings: DeepSpeedFile,
    mesh: Mesh,
    fill_layer: FillLayer,
    report: ReportProgress,
) -> FakeInjected:
    """In the place of engines.deepspeed_inject.inject."""
    FakeInjectedModule.workspace.clear()
    layers: Any = model.base_model.layers
    for index in range(len(layers)):
        fill_layer(layers[index])
        is_last = index == len(layers) - 1
        layers[index] = FakeInjectedModule(layers[index], index, is_last, settings.max_out_tokens, mesh)
    return FakeInjected(model)


class FakeInjectEngine(DeepSpeedInjectEngine):
    """The engine on a CPU, for real groups: an entry point of the tests' harness names it."""

    def __init__(self, config: ModelConfig, mesh: Mesh, report: Any) -> None:
        import engines.deepspeed_inject as module

        module.inject = fake_inject  # type: ignore[assignment]
        super().__init__(config.model_copy(update={"device": "cuda"}), mesh, report)
