"""The deepspeed_tp engine: DeepSpeed's automatic tensor parallelism over the Hugging Face model.

`deepspeed.init_inference` gets the model without memory and exchanges the linears of every layer for shards;
then each rank reads from the checkpoint only what its shards hold. Attention is ours, over paged K/V, and so
is batching: DeepSpeed's `generate` is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engines.base import Batch, ReportProgress, UnsupportedModel
from engines.config_deepspeed import DeepSpeedFile, load_settings
from engines.models import deepspeed_comm, hf
from engines.models.checkpoint import Checkpoint
from engines.models.hf_inspect import inspect_model
from engines.models.injection import check_dtype
from engines.models.names import Slice
from engines.runtime.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engines.config import ModelConfig


class DeepSpeedTPEngine(hf.PagedEngine):
    """Implements engines.base.Engine."""

    def __init__(self, config: ModelConfig, mesh: Mesh, report: ReportProgress) -> None:
        deepspeed_comm.require_deepspeed()
        settings = settings_of(config)
        self._found = inspect_model(config.model_path, config.max_model_len)
        check_split(self._found, mesh)
        checkpoint = hf.open_checkpoint(self._found)
        self._mesh = mesh
        self._dtype = hf.dtype_of(self._found, checkpoint, settings.dtype or config.dtype)
        check_dtype(str(self._dtype).removeprefix("torch."), mesh.device.type)
        empty = hf.build_empty(self._found, self._dtype)
        model = shard(empty, settings, mesh, self._found.shape, report)
        fill(model, checkpoint, mesh.device, report)
        self._decoder = hf.HFDecoder(model, self._found.shape.attention_names)
        self._num_kv_heads = kv_heads_of(self._found.shape.num_kv_heads, mesh)
        if mesh.device.type == "cpu":
            unwrap(model)
            hf.pack_linears(model)

    def forward(self, batch: Batch) -> Tensor:
        """[T, H] on every rank."""
        return self._decoder.forward(batch.input_ids, batch.positions)

    def logits(self, hidden: Tensor) -> Tensor | None:
        logits = self._decoder.logits(hidden)  # DeepSpeed's head has the sum on every rank
        return logits if self._mesh.is_leader else None


def settings_of(config: ModelConfig) -> DeepSpeedFile:
    """What the user's DeepSpeed JSON says; DeepSpeed's defaults without one. Raises ConfigError."""
    if config.deepspeed is None:
        return DeepSpeedFile()
    return load_settings(config.deepspeed.config, config.world_size, config.dtype)


def kv_heads_of(num_kv_heads: int, mesh: Mesh) -> int:
    """Of how many K/V heads this rank has the shard: the first ranks have one more."""
    share, rest = divmod(num_kv_heads, mesh.tp_size)
    return share + (mesh.tp_rank < rest)


def check_split(found: hf.HFModel, mesh: Mesh) -> None:
    """Raises UnsupportedModel where AutoTP would leave ranks without heads, or does not know the type."""
    if mesh.pp_size != 1:
        raise UnsupportedModel("engine deepspeed_tp splits by tensor parallelism only: use pipeline for pp")
    heads = found.shape.num_kv_heads
    if heads < mesh.tp_size:
        raise UnsupportedModel(
            f"{found.path / 'config.json'}: num_key_value_heads ({heads}) is less than {mesh.tp_size} ranks, "
            "and DeepSpeed would leave some of them without any: "
            f"set parallelLevel (nproc-per-node) to {heads} or less, or use engine: native"
        )


def shard(
    model: PreTrainedModel,
    settings: DeepSpeedFile,
    mesh: Mesh,
    shape: hf.ModelShape,
    report: ReportProgress,
) -> PreTrainedModel:
    """Hand a model without memory to `deepspeed.init_inference`: its linears come back as empty shards.

    Raises UnsupportedModel where DeepSpeed splits a linear in a way that cannot be read in slices.
    """
    deepspeed = deepspeed_comm.connect(mesh, report)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    parallel = deepspeed_comm.tensor_parallel(mesh) | {"tp_grain_size": settings.tp_grain_size}
    deepspeed.init_inference(model, dtype=model.dtype, tensor_parallel=parallel)
    if mesh.tp_size > 1:
        check_norms(model, shape)
    for name, buffer in buffers.items():  # DeepSpeed rounds rotary frequencies to the model's dtype
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffer.to(mesh.device)
    return model


def check_norms(model: PreTrainedModel, shape: hf.ModelShape) -> None:
    """Raises UnsupportedModel where attention has parameters that DeepSpeed leaves whole though they belong
    to heads (a norm over all of them, or one for each): this rank's heads would meet another's."""
    from deepspeed.module_inject.layers import TensorParallel_Layer  # type: ignore[import-untyped]

    for name in shape.attention_names:
        attention = model.get_submodule(name)
        for inner, parameter in attention.named_parameters():
            if isinstance(attention.get_submodule(inner.rpartition(".")[0]), TensorParallel_Layer):
                continue
            if inner.count(".") != 1 or parameter.shape != (shape.head_dim,):
                raise UnsupportedModel(
                    f"{name}.{inner} belongs to all attention heads together, and DeepSpeed does not split "
                    "it: use engine: accelerate, or parallelLevel: 1"
                )


def fill(
    model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device, report: ReportProgress
) -> None:
    """Read this rank's part of every parameter, one at a time. Raises BadCheckpoint."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    stored = {name: model.all_tied_weights_keys.get(name, name) for name in names}
    parts = {name: part_of(model, name, checkpoint.tensors[stored[name]].shape) for name in names}
    read: dict[tuple[str, Slice], nn.Parameter] = {}  # a tied head without shards is the embedding itself
    for number, (name, part) in enumerate(parts.items(), 1):
        key = (stored[name], part)
        if key not in read:
            read[key] = nn.Parameter(
                hf.read_part(checkpoint, *key, model.dtype).to(device), requires_grad=False
            )
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = read[key]
        report(number / len(parts))


def part_of(model: nn.Module, name: str, shape: tuple[int, ...]) -> Slice:
    """Which part of the stored tensor a parameter of the sharded model is.

    Raises UnsupportedModel for DeepSpeed's layers that are no plain slices (packed projections)."""
    from deepspeed.module_inject.layers import (
        LinearAllreduce,
        LinearLayer,
        LmHeadLinearAllreduce,
        TensorParallel_Layer,
    )

    parent, _, leaf = name.rpartition(".")
    layer: Any = model.get_submodule(parent)
    if type(layer) is LinearLayer:
        return _cut(0, layer)
    if type(layer) in (LinearAllreduce, LmHeadLinearAllreduce):
        return _cut(1, layer) if leaf == "weight" else Slice(0, 0, shape[0])
    if isinstance(layer, TensorParallel_Layer):
        raise UnsupportedModel(
            f"DeepSpeed splits {parent} as {type(layer).__name__}, a packed projection, which is not served: "
            "use engine: accelerate"
        )
    return Slice(0, 0, shape[0])


def _cut(dim: int, layer: Any) -> Slice:
    sizes, rank = layer._partition_sizes, layer.tp_index
    start = sum(sizes[:rank])
    return Slice(dim, start, start + sizes[rank])


def unwrap(model: nn.Module) -> None:
    """Exchange DeepSpeed's filled layers for plain linears over the same shards, which `pack_linears` makes
    fast; row-parallel ones keep DeepSpeed's all-reduce. Empty shards (of narrow models) stay."""
    from deepspeed.module_inject.layers import (
        LinearAllreduce,
        LinearLayer,
        LmHeadLinearAllreduce,
        TensorParallel_Layer,
    )

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, TensorParallel_Layer) or not child.weight.numel():
                continue
            if type(child) is LinearLayer:
                setattr(parent, name, _linear(child.weight, child.bias))
            elif type(child) is LinearAllreduce:
                setattr(parent, name, _SummedLinear(child, None))
            elif type(child) is LmHeadLinearAllreduce:
                setattr(parent, name, _SummedLinear(child, _cut(1, child)))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear._parameters["weight"], linear._parameters["bias"] = weight, bias  # type: ignore[assignment]
    return linear


class _SummedLinear(nn.Module):
    """Of a row-parallel layer: the product of this rank's shard, the sum over ranks, the bias once."""

    def __init__(self, layer: Any, columns: Slice | None) -> None:
        super().__init__()
        from deepspeed.comm import inference_all_reduce  # type: ignore[import-untyped]

        self.product = _linear(layer.weight, None)
        self.bias, self._group, self._columns = layer.bias, layer.mp_group, columns
        self._all_reduce = inference_all_reduce

    def forward(self, x: Tensor) -> Tensor:
        """[..., in], or this rank's share of them, to [..., out]."""
        if self._columns is not None:
            x = x[..., self._columns.start : self._columns.stop]
        out: Tensor = self.product(x)
        self._all_reduce(out, group=self._group)
        return out if self.bias is None else out.add_(self.bias)
