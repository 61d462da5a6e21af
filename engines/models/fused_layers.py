"""A Llama's layers on a GPU: what stands between their products is one launch each (engines/gpu)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from engines.gpu import support
from engines.models.layers import RMSNorm
from engines.runtime.attention import prepared
from engines.runtime.context import ForwardContext, current
from engines.runtime.kv_cache import begun_blocks, clear_blocks

if TYPE_CHECKING:
    from engines.models.llama import Attention, Llama, Mlp


class FusedLayers:
    """The layers of `model`. It reads the weights where the modules have them."""

    @classmethod
    def of(cls, model: Llama) -> FusedLayers | None:
        """None where there are no such kernels."""
        return cls(model) if support.has_kernels(model.mesh.device.type) else None

    def __init__(self, model: Llama) -> None:
        self._layers, self._rotary, self._mesh = model.layers, model.rotary, model.mesh
        self._read_rows = model.read_rows

    def run(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """[T, H] through all layers, in place, as the model's `run_layers`."""
        from engines.gpu.norm import rms_norm

        context = current()
        begun = begun_blocks(context.batch, context.caches[0])
        if begun is not None:
            clear_blocks(context.caches, begun)
        first, *others = self._layers
        x = rms_norm(hidden, first.attention_norm.weight, first.attention_norm.eps)
        norms = [*(layer.attention_norm for layer in others), None]
        read, rows = hidden, None
        for layer, following in zip(self._layers, norms, strict=True):
            x = self._attend(layer.attention, x, positions, context)
            if following is None and (rows := self._read_rows()) is not None:
                x, read = x.index_select(0, rows), hidden.index_select(0, rows)
            x = _add(self._mesh.all_reduce(layer.attention.output(x)), read, layer.mlp_norm)
            x = _add(self._mesh.all_reduce(self._transform(layer.mlp, x)), read, following)
        return hidden if rows is None else hidden.index_copy_(0, rows, read)

    def _attend(self, attention: Attention, x: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        from engines.gpu.rotary import rotate_and_write

        cache = context.caches[attention.layer]
        keys, values = cache.data.flatten(1, 2).unbind(0)  # [num_slots, Hkv, D] each
        slots, rotary = context.batch.slot_mapping, self._rotary
        query = rotate_and_write(attention.qkv(x), rotary.cos, rotary.sin, positions, slots, keys, values)
        step = prepared(context, cache, attention.num_heads)
        return step.attend(query, cache, attention.scale).flatten(1)

    def _transform(self, mlp: Mlp, x: Tensor) -> Tensor:
        from engines.gpu.activation import silu_mul

        return mlp.down(silu_mul(mlp.gate_up(x)))


def _add(x: Tensor, hidden: Tensor, norm: RMSNorm | None) -> Tensor:
    """`x` to `hidden`, and the norm of the sum, if another follows."""
    from engines.gpu.norm import add_rms_norm

    return hidden.add_(x) if norm is None else add_rms_norm(x, hidden, norm.weight, norm.eps)
