"""Causal attention of a step over the paged K/V: writes the step's keys and values, reads the contexts.

Works for any mixture of sequences: a decode step is a query of one token, a prefill chunk one of many.

No sequence harms another through the K/V, whatever it leaves there. Kernels read whole blocks and multiply
what is masked by 0, and 0 * NaN is NaN. So the step that begins a block clears it (`begun_blocks`): past its
owner's tokens are zeros, never what the last owner wrote; and past its table a sequence reads its own blocks.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engines.base import Batch
from engines.runtime.attention_gather import GatherStep
from engines.runtime.attention_paged import PagedStep
from engines.runtime.context import ForwardContext, current
from engines.runtime.kv_cache import LayerCache, Layout


class AttentionStep(Protocol):
    """One way to attend, prepared for one step: it works out once what all layers share."""

    def write(self, key: Tensor, value: Tensor, cache: LayerCache) -> None:
        """Put the step's [T, Hkv, D] into their slots; what else is in the blocks it begins becomes 0."""

    def attend(self, query: Tensor, cache: LayerCache, scale: float) -> Tensor:
        """[T, Hq, D] to [T, Hq, D], over everything written so far."""


def paged_attention(query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float) -> Tensor:
    """Attend in local layer `layer` of the current forward context.

    query [T, Hq, D], key and value [T, Hkv, D], rotated already. Writes key and value at the batch's
    slot_mapping, then attends each query to its sequence's context up to itself. Returns [T, Hq, D].
    """
    context = current()
    cache = context.caches[layer]
    step = prepared(context, cache, query.shape[1])
    step.write(key, value, cache)
    return step.attend(query, cache, scale)


def prepared(context: ForwardContext, cache: LayerCache, num_heads: int) -> AttentionStep:
    """The step's way to attend on the device of `cache`, which all its layers there share."""
    step = context.attention.get(cache.data.device)
    if step is None:
        step = context.attention[cache.data.device] = _prepare(context.batch, cache, num_heads)
    return step


def _prepare(batch: Batch, cache: LayerCache, num_heads: int) -> AttentionStep:
    if cache.layout is Layout.PAGED:
        return PagedStep(batch, cache)
    return GatherStep(batch, cache, num_heads)
