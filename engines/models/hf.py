"""Decoders of the Hugging Face transformers library over our paged K/V.

transformers lets one register an attention function by name. Ours takes the queries, keys and values of a
whole step, all sequences side by side, and hands them to `paged_attention`; K/V and metadata travel in the
forward context. No mask function of that name is registered, and so transformers makes no mask.

Whether a model is exact that way, engines/models/hf_inspect.py finds out before its weights are read. A
model directory's own code is never imported, config.json is read as data, weights only from safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPast

from engines.base import KVSpec, ReportProgress
from engines.models.checkpoint import DTYPES, Checkpoint
from engines.models.layers import LinearOp, make_linear
from engines.models.names import Placement, Slice, TensorRule, TensorSpec
from engines.runtime import cpu
from engines.runtime.attention import paged_attention

PAGED = "sluice_paged"

DeviceOf = Callable[[str], torch.device | None]
"""Where the parameter of that name belongs. None: not into memory."""

PartOf = Callable[[str], Slice]
"""Which part of the stored tensor of that name is this rank's."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the attention of a model asks of the K/V, and where its attention modules are."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_names: tuple[str, ...]  # the dotted name of each layer's attention module
    embedding_name: str  # of the input embedding's weight
    vocab_size: int
    max_positions: int


@dataclass(frozen=True, slots=True)
class HFModel:
    """A model that was found to be exact. Nothing of it is in memory yet."""

    path: Path
    config: PreTrainedConfig
    shape: ModelShape


def open_checkpoint(model: HFModel) -> Checkpoint:
    """The weights, every tensor's name, shape, dtype and place in its file checked; none is read.

    Raises BadCheckpoint naming file and tensor; pickled weights are refused.
    """
    checkpoint = Checkpoint(model.path)
    empty = build_empty(model, torch.float32)
    expected = [_spec(name, parameter) for name, parameter in _own_parameters(empty)]
    ignored = [re.compile(pattern) for pattern in empty._keys_to_ignore_on_load_unexpected or ()]
    optional = {name for name in checkpoint.tensors if any(pattern.search(name) for pattern in ignored)}
    checkpoint.check(expected, frozenset(optional) | empty.all_tied_weights_keys.keys())
    return checkpoint


def _spec(name: str, parameter: Tensor) -> TensorSpec:
    return TensorSpec(name, TensorRule(name, name, Placement.REPLICATED, ()), tuple(parameter.shape))


def dtype_of(model: HFModel, checkpoint: Checkpoint, configured: str) -> torch.dtype:
    """The dtype to serve in: the configured one, or for "auto" that of the stored embedding."""
    if configured == "auto":
        return DTYPES[checkpoint.tensors[model.shape.embedding_name].dtype]
    return cast(torch.dtype, getattr(torch, configured))


def build_empty(model: HFModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters that take no memory (on the meta device) and buffers that are real."""
    AttentionInterface.register(PAGED, paged_attention_function)
    with no_init_weights(), _parameters_on_meta():
        made = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            model.config, attn_implementation=PAGED, dtype=dtype
        )
    made.config.use_cache = False
    made.tie_weights()
    return cast(PreTrainedModel, made.eval())


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register meanwhile lose their memory; buffers, which are computed, keep it."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        empty = None if param is None else nn.Parameter(param.detach().to("meta"), requires_grad=False)
        original(module, name, empty)

    nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def fill(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    device_of: DeviceOf,
    report: ReportProgress,
    part_of: PartOf | None = None,
) -> None:
    """Read every parameter that has a device into memory there, in the model's dtype, one at a time.

    Tied ones are read once; without `part_of`, all are read whole. `checkpoint` is of `open_checkpoint`.
    Raises BadCheckpoint.
    """
    own = list(_own_parameters(model))
    for number, (name, parameter) in enumerate(own, 1):
        device = device_of(name)
        if device is not None:
            part = part_of(name) if part_of else Slice(0, 0, parameter.shape[0])
            _set(model, name, read_part(checkpoint, name, part, parameter.dtype).to(device))
        report(number / len(own))
    for target, source in model.all_tied_weights_keys.items():
        _set(model, target, model.get_parameter(source))


def _own_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All but those that are tied to another."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in model.all_tied_weights_keys:
            yield name, parameter


def read_part(checkpoint: Checkpoint, name: str, part: Slice, dtype: torch.dtype) -> Tensor:
    """A part of a stored tensor, its padding included. Raises BadCheckpoint."""
    shape = list(checkpoint.tensors[name].shape)
    shape[part.dim] = part.length
    out = torch.empty(shape, dtype=dtype)
    checkpoint.read_into(out, name, part)
    return out


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    model.get_submodule(parent)._parameters[leaf] = parameter


class HFDecoder:
    """A causal language model as an engine runs it: hidden states, then logits of the rows that need them.

    The head is the model's own `forward` behind a stand-in for the base model, so whatever a model does to
    its logits (scaling, soft-capping, bias) is done. `attention_names`: the layers that this rank holds.
    """

    def __init__(self, model: PreTrainedModel, attention_names: tuple[str, ...]) -> None:
        self._base: nn.Module = model.base_model
        self._layer_devices = tuple(execution_device(model, name) for name in attention_names)
        self._model, self._given = model, _GivenHidden()

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[T], [T] to hidden states [T, H] after the last norm. Inside `forward_context`."""
        out = self._base(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        return cast(Tensor, out.last_hidden_state[0])

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[L, H] to [L, V] float32."""
        parts, prefix = self._model._modules, self._model.base_model_prefix
        parts[prefix] = self._given
        try:
            out = self._model(inputs_embeds=hidden[None], use_cache=False)
        finally:
            parts[prefix] = self._base
        return cast(Tensor, out.logits[0].float())

    def kv_spec(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVSpec:
        """Each layer's K/V where that layer is computed."""
        return KVSpec(num_kv_heads, head_dim, dtype, self._layer_devices)


class PagedEngine:
    """What engines over an HFDecoder with all layers tell of it, as engines.base.Engine wants it told."""

    batching: ClassVar[Literal["continuous", "static"]] = "continuous"
    _found: HFModel
    _decoder: HFDecoder
    _dtype: torch.dtype
    _num_kv_heads: int  # of this rank

    @property
    def kv_spec(self) -> KVSpec:
        return self._decoder.kv_spec(self._num_kv_heads, self._found.shape.head_dim, self._dtype)

    @property
    def vocab_size(self) -> int:
        return self._found.shape.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._found.shape.max_positions

    @property
    def plans_in_flight(self) -> int:
        return 1


class _GivenHidden(nn.Module):
    """Stands where the base model stood; its result was computed before."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def execution_device(model: nn.Module, name: str) -> torch.device:
    """Where the module `name` computes: as Accelerate's hooks on or around it say, else where it lies."""
    module = model.get_submodule(name)
    inner = next(child for child, part in module.named_modules(prefix=name) if part._parameters)
    parts = inner.split(".")
    for end in range(len(parts), 0, -1):
        hook = getattr(model.get_submodule(".".join(parts[:end])), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(module.parameters()).device


def pack_linears(model: nn.Module) -> None:
    """Exchange linears on the CPU for those of `make_linear`, one at a time. Not for offloaded modules."""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:  # by name: a list of modules would keep all weights until the last one is packed
        linear = cast(nn.Linear, model.get_submodule(name))
        if linear.weight.device.type == "cpu":
            model.set_submodule(name, _FastLinear(make_linear(linear.weight.detach(), linear.bias)))
    cpu.release_memory()


class _FastLinear(nn.Module):
    def __init__(self, op: LinearOp) -> None:
        super().__init__()
        self._op = op

    def forward(self, x: Tensor) -> Tensor:
        return self._op(x)


def paged_attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: [1, Hq, T, D], [1, Hkv, T, D] to [1, T, Hq, D]. hf_inspect saw the rest."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, H, D]
    return paged_attention(query, key, value, cast(int, module.layer_idx), scaling)[None], None
