"""One pipeline stage of a Hugging Face model: some of its layers, as its pp plan divides it.

The plan (`base_model_pp_plan`) names what hidden states pass through: embedding, layers, norm. The model's
own `forward` runs a stage's layers on given hidden states, its embedding and norm being left out of it.
Over the ranks of a stage, engines/models/hf_tp.py divides each layer.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engines.base import ReportProgress, UnsupportedModel
from engines.models import hf
from engines.models.checkpoint import Checkpoint
from engines.models.hf_support import ONE_PROCESS, no_pipeline_plan
from engines.models.hf_tp import TensorParallel
from engines.models.stages import Sizes, sizes_by_name
from engines.runtime.mesh import Mesh

_PLAN = {"embed_tokens", "layers", "norm"}


class HFStage:
    """As engines.models.llama.Llama, on one rank. Its K/V is of `layers`, counted from 0.

    Raises UnsupportedModel before weights are read, where more is done to hidden states than the plan says.
    """

    def __init__(
        self,
        found: hf.HFModel,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        layers: range,
        mesh: Mesh,
        report: ReportProgress,
    ) -> None:
        found = replace(found, config=deepcopy(found.config))  # it is made shorter below
        model = hf.build_empty(found, dtype)
        self._base: nn.Module = model.base_model
        _check_plan(found, self._base, dtype)
        share = TensorParallel(found, model, mesh)
        is_mine, device = _Mine(found, model, layers), mesh.device
        hf.fill(model, checkpoint, lambda name: device if is_mine(name) else None, report, share.part_of)
        hf.pack_linears(model)
        share.connect()
        for index, name in enumerate(found.shape.attention_names[layers.start : layers.stop]):
            model.get_submodule(name).layer_idx = index  # type: ignore[assignment]
        self.embed, self.logits = share.embed, share.logits
        self.norm = cast(nn.Module, self._base.norm)
        if not is_mine.is_first:
            self._base.embed_tokens = nn.Identity()
        self._base.norm = nn.Identity()
        self._base.layers = cast(nn.ModuleList, self._base.layers)[layers.start : layers.stop]
        _shorten(model, layers)
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(device)

    def run_layers(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """[T, H] to [T, H]. Inside `forward_context`."""
        return _run(self._base, hidden, positions)


def sizes_of(found: hf.HFModel, checkpoint: Checkpoint) -> Sizes:
    """From the names and shapes in the checkpoint's headers."""
    prefix, shape = found.shape.attention_names[0].partition("layers.")[0], found.shape
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    is_tied = bool(getattr(found.config, "tie_word_embeddings", False))
    return sizes_by_name(
        shapes, f"{prefix}layers.", len(shape.attention_names), shape.embedding_name, is_tied
    )


class _Mine:
    """Which parameters a stage needs, by name."""

    def __init__(self, found: hf.HFModel, model: PreTrainedModel, layers: range) -> None:
        prefix = f"{model.base_model_prefix}.layers."
        num_layers = len(found.shape.attention_names)
        self._others = tuple(f"{prefix}{i}." for i in range(num_layers) if i not in layers)
        self._layers, self._embedding = prefix, found.shape.embedding_name
        self.is_first, self._is_last = layers.start == 0, layers.stop == num_layers
        self._has_embedding = self.is_first or (self._is_last and bool(model.all_tied_weights_keys))

    def __call__(self, name: str) -> bool:
        if name == self._embedding:
            return self._has_embedding
        return not name.startswith(self._others) if name.startswith(self._layers) else self._is_last


def _check_plan(found: hf.HFModel, base: nn.Module, dtype: torch.dtype) -> None:
    """Without its layers and norm, the model must give back the hidden states that it is given."""
    kind = found.config.model_type
    plan = type(found.config).base_model_pp_plan or {}
    if set(plan) != _PLAN:
        raise no_pipeline_plan(found.path, kind)
    layers, norm = base.layers, base.norm
    base.layers, base.norm = nn.ModuleList(), nn.Identity()
    given = torch.linspace(-2, 2, 3 * found.config.hidden_size, dtype=dtype).view(3, -1)
    is_same = torch.equal(_run(base, given, torch.arange(3)), given)
    base.layers, base.norm = layers, norm
    if not is_same:
        raise UnsupportedModel(
            f"{found.path}: model_type {kind!r} changes hidden states between embedding and layers, which "
            f"its pipeline plan does not say: {ONE_PROCESS}"
        )


def _run(base: nn.Module, hidden: Tensor, positions: Tensor) -> Tensor:
    out = base(inputs_embeds=hidden[None], position_ids=positions[None], use_cache=False)
    return cast(Tensor, out.last_hidden_state[0])


def _shorten(model: PreTrainedModel, layers: range) -> None:
    """Its configuration says as many layers as there are now."""
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        model.config.layer_types = kinds[layers.start : layers.stop]
    model.config.num_hidden_layers = len(layers)
