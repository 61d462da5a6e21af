"""Tensor parallelism inside the stages of a Hugging Face model, by transformers' own plan.

The plan (`base_model_tp_plan`) names the linears of a layer and how each is cut. transformers carries it out
with DTensors; here a rank reads its slices into the model's own modules, and hooks around them add up and
gather through the mesh. Attention gets whole heads, the rank's own; embedding and head are cut by vocabulary.

Where a plan gathers queries, keys and values (fused ones, or a norm over all heads), every rank has them all,
yet attends with its own heads only: the projection that follows reads no others.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from engines.base import UnsupportedModel
from engines.models import hf
from engines.models.hf_support import refuse
from engines.models.layers import embed_share
from engines.models.names import Slice, kv_share, padded_share
from engines.runtime.mesh import Mesh

_CUT = frozenset(("colwise", "rowwise"))
"""Outputs cut, then inputs cut."""
_GATHERED = frozenset(("colwise_gather_output", "rowwise_split_input"))
"""The same, but what is between sees the whole."""
_WHOLE = "replicated_with_grad_allreduce"
_HEAD = "head"
"""Ours for what the plan calls colwise_gather_output there: gathered on one rank only."""
_PAGED_SHARE = "sluice_paged_share"
_DIVISOR = "set tensorParallel to a divisor of it"
_ONE_RANK = "write parallelType: pp, or tensorParallel: 1"


def check_heads(found: hf.HFModel, tp_size: int) -> None:
    """Raises UnsupportedModel unless every rank gets as many attention heads, with their K/V heads."""
    path, shape = found.path / "config.json", found.shape
    why = f"cannot be shared evenly by the {tp_size} ranks of a stage"
    if shape.num_heads % tp_size:
        raise refuse(path, "num_attention_heads", shape.num_heads, why, _DIVISOR)
    if shape.num_kv_heads % tp_size and tp_size % shape.num_kv_heads:
        remedy = "set tensorParallel to a divisor or a multiple of it"
        raise refuse(path, "num_key_value_heads", shape.num_kv_heads, why, remedy)


class TensorParallel:
    """One rank's share of a model: which parts to read, and what its modules exchange with other ranks'.

    `model` is of `hf.build_empty`. Call `connect` once it is filled. Raises UnsupportedModel where the plan
    does not say how all of a layer is cut. With one rank the model stays as it is.
    """

    def __init__(self, found: hf.HFModel, model: PreTrainedModel, mesh: Mesh) -> None:
        check_heads(found, mesh.tp_size)
        self._found, self._mesh = found, mesh
        self._styles = _styles(found, model) if mesh.tp_size > 1 else {}
        self._gathers_heads = "colwise_gather_output" in self._attention_styles()
        self._parts = {
            name: self._part(name, tuple(parameter.shape))
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self._model, self._decoder = model, hf.HFDecoder(model, ())
        self._drop_repeated_biases()

    def part_of(self, name: str) -> Slice:
        """Of the stored parameter `name`."""
        return self._parts[name]

    def connect(self) -> None:
        """From here on the filled modules exchange what the plan says."""
        if self._mesh.tp_size > 1:
            self._embedding().padding_idx = None  # it would count rows of the whole
        for name, style in self._styles.items():
            self._connect(name, style, self._model.get_submodule(name))
        if self._gathers_heads:
            self._attend_with_own_heads()

    def _embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self._model.get_input_embeddings())

    def embed(self, input_ids: Tensor) -> Tensor:
        """[T] to [T, H]."""
        num_rows = self._parts[self._found.shape.embedding_name].length
        return embed_share(input_ids, self._embedding(), num_rows, self._mesh)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """[L, H] to [L, V] float32 on tensor-parallel rank 0, None on the others."""
        logits = self._mesh.gather_columns(self._decoder.logits(hidden))
        return None if logits is None else logits[:, : self._found.shape.vocab_size]

    def _attention_styles(self) -> set[str]:
        """Of its linears; those of all layers are alike."""
        return {style for name, style in self._styles.items() if self._is_attention(name)}

    def _is_attention(self, name: str) -> bool:
        return name.startswith(tuple(f"{attention}." for attention in self._found.shape.attention_names))

    def _part(self, name: str, shape: tuple[int, ...]) -> Slice:
        """What this rank holds of a parameter of that shape."""
        module, _, leaf = name.rpartition(".")
        style, whole = self._styles.get(module), Slice(0, 0, shape[0])
        if self._mesh.tp_size == 1:
            return whole
        if name == self._found.shape.embedding_name or style == _HEAD:
            return padded_share(shape[0], self._mesh.tp_rank, self._mesh.tp_size)
        if style is None:
            return self._unplanned(name, shape)
        if style == "colwise" and self._is_attention(name):
            return self._own_heads(shape[0] // self._found.shape.head_dim, self._found.shape.head_dim)
        if style.startswith("colwise"):
            return self._share(name, 0, shape[0])
        return self._share(name, 1, shape[1]) if leaf == "weight" else whole

    def _share(self, name: str, dim: int, size: int) -> Slice:
        rank, num_ranks = self._mesh.tp_rank, self._mesh.tp_size
        if size % num_ranks:
            why = f"cannot be shared evenly by the {num_ranks} ranks of a stage"
            is_inner = size == getattr(self._found.config, "intermediate_size", None)
            key = "intermediate_size" if is_inner else f"the width of {name}"
            raise refuse(self._found.path / "config.json", key, size, why, _DIVISOR)
        return Slice(dim, rank * size // num_ranks, (rank + 1) * size // num_ranks)

    def _own_heads(self, num_heads: int, rows_of_head: int = 1) -> Slice:
        """Those of this rank: an equal share, or the one K/V head that its queries read."""
        heads = kv_share(num_heads, self._mesh.tp_rank, self._mesh.tp_size)
        return Slice(0, heads.start * rows_of_head, heads.stop * rows_of_head)

    def _unplanned(self, name: str, shape: tuple[int, ...]) -> Slice:
        """What the plan leaves whole: must be for whole hidden states, whole heads, or each head alone."""
        found, whole = self._found.shape, Slice(0, 0, shape[0])
        if not self._is_attention(name):
            is_exact = shape == (self._found.config.hidden_size,)
        elif shape in ((found.num_heads, found.head_dim), (found.num_kv_heads, found.head_dim)):
            return whole if self._gathers_heads else self._own_heads(shape[0])
        else:
            is_exact = self._gathers_heads or shape == (found.head_dim,)
        if not is_exact:
            raise _unsupported(self._found, f"has {name}, which its tensor-parallel plan does not divide")
        return whole

    def _drop_repeated_biases(self) -> None:
        """What is added to a sum of all ranks' products, one rank adds."""
        for name, style in self._styles.items():
            if style.startswith("rowwise") and self._mesh.tp_rank != 0:
                self._model.get_submodule(name).register_parameter("bias", None)

    def _connect(self, name: str, style: str, module: nn.Module) -> None:
        part = self._parts[f"{name}.weight"]
        if style == "colwise_gather_output":
            module.register_forward_hook(lambda _module, _args, out: self._gathered(out, part))
        if style == "rowwise_split_input" and not self._is_attention(name):
            module.register_forward_pre_hook(lambda _module, args: args[0][..., part.start : part.stop])
        if style.startswith("rowwise"):
            module.register_forward_hook(lambda _module, _args, out: self._mesh.all_reduce(out))

    def _gathered(self, out: Tensor, part: Slice) -> Tensor:
        """[..., own columns] to [..., all columns], on every rank: a sum in which each column is of one."""
        whole = out.new_zeros(*out.shape[:-1], part.length * self._mesh.tp_size)
        whole[..., part.start : part.stop] = out
        return self._mesh.all_reduce(whole)

    def _attend_with_own_heads(self) -> None:
        AttentionInterface.register(_PAGED_SHARE, _paged_share_function)
        self._model.config._attn_implementation = _PAGED_SHARE
        shape = self._found.shape
        parts = [self._own_heads(count) for count in (shape.num_heads, shape.num_kv_heads)]
        for name in shape.attention_names:
            self._model.get_submodule(name).own_heads = [slice(p.start, p.stop) for p in parts]  # type: ignore[assignment]


def _paged_share_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """`hf.paged_attention_function` with this rank's heads of all."""
    own, own_kv = cast(Any, module).own_heads
    own_heads = query[:, own], key[:, own_kv], value[:, own_kv]
    return hf.paged_attention_function(module, *own_heads, *args, **kwargs)


def _styles(found: hf.HFModel, model: PreTrainedModel) -> dict[str, str]:
    """How each linear of layers and head is cut, by its name: from the classes, not from config.json."""
    planned = type(found.config).base_model_tp_plan
    if not planned:
        raise _unsupported(found, "has no tensor-parallel plan")
    plan = {f"{model.base_model_prefix}.{pattern}": style for pattern, style in planned.items()}
    styles = {
        name: style
        for name, _ in model.named_modules()
        for pattern, style in plan.items()
        if style != _WHOLE and fnmatchcase(name, pattern)
    }
    inside = tuple(f"{name}." for name in found.shape.attention_names)
    of_attention = {style for name, style in styles.items() if name.startswith(inside)}
    others = {style for name, style in styles.items() if not name.startswith(inside)}
    for used in (of_attention, others):
        if used not in (_CUT, _GATHERED):
            stated = ", ".join(sorted(used)) or "nothing"
            raise _unsupported(found, f"has a tensor-parallel plan of {stated} in attention or beside it")
    output: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return styles | {name: _HEAD for name, module in model.named_modules() if module is output}


def _unsupported(found: hf.HFModel, why: str) -> UnsupportedModel:
    key, kind = "model_type", found.config.model_type
    return refuse(
        found.path / "config.json", key, kind, f"{why}, which stages of several ranks need", _ONE_RANK
    )
