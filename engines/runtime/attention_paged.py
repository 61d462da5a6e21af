"""Attention on a GPU: decoding sequences by our Triton kernel, the others by torch's paged FlashAttention,
or sequence by sequence where it does not take their dtype, heads or pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.base import Batch
from engines.gpu import support
from engines.runtime.kv_cache import LayerCache, begun_blocks, clear_blocks
from engines.runtime.transfer import to_device


class PagedStep:
    """Implements AttentionStep over caches of Layout.PAGED."""

    def __init__(self, batch: Batch, cache: LayerCache) -> None:
        device = cache.data.device
        self._batch, self._cache = batch, cache
        self._slots = batch.slot_mapping.to(device)
        self._parts = [_kernel_for(part, cache) for part in _by_kind(batch, device)]

    @cached_property
    def _begun(self) -> Tensor | None:
        """The same for all layers; fused ones have cleared them."""
        return begun_blocks(self._batch, self._cache)

    def write(self, key: Tensor, value: Tensor, cache: LayerCache) -> None:
        if self._begun is not None:
            clear_blocks([cache], self._begun)
        keys, values = cache.data.flatten(1, 2).unbind(0)  # [num_slots, Hkv, D] each
        keys.index_copy_(0, self._slots, key)
        values.index_copy_(0, self._slots, value)

    def attend(self, query: Tensor, cache: LayerCache, scale: float) -> Tensor:
        keys, values = cache.data.unbind(0)  # [num_blocks, block_size, Hkv, D] each
        if len(self._parts) == 1:
            return self._parts[0].attend(query.contiguous(), keys, values, scale)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for part in self._parts:
            rows = part.sequences.rows
            assert rows is not None, "the only part has all rows"
            out.index_copy_(0, rows, part.attend(query.index_select(0, rows), keys, values, scale))
        return out


@dataclass(frozen=True, slots=True, eq=False)
class _Sequences:
    """Some of a batch: in which `rows` their queries are (None: in all, in order), and what kernels ask."""

    rows: Tensor | None
    query_lens: Sequence[int]
    query_start: Tensor  # [S + 1] int32
    context_lens: Tensor  # [S] int32
    tables: Tensor  # [S, W] int32
    contexts: Sequence[int]
    max_context: int

    @property
    def is_decoding(self) -> bool:
        return max(self.query_lens) == 1


class _Kernel(Protocol):
    @property
    def sequences(self) -> _Sequences: ...

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor: ...


def _by_kind(batch: Batch, device: torch.device) -> list[_Sequences]:
    """Those that decode and the others, if a kernel wants them apart and there are both."""
    lengths = [end - start for start, end in pairwise(batch.query_start_list)]
    num_decoding = lengths.count(1)
    if not support.has_kernels(device.type) or num_decoding in (0, len(lengths)):
        whole = (batch.query_start, batch.context_lens, batch.block_tables)
        query_start, context_lens, tables = (tensor.to(device) for tensor in whole)
        contexts = batch.context_lens_list
        return [_Sequences(None, lengths, query_start, context_lens, tables, contexts, batch.max_context_len)]
    kinds = [[i for i, n in enumerate(lengths) if (n == 1) == decodes] for decodes in (True, False)]
    return [_some(batch, kind, lengths, device) for kind in kinds]


def _some(batch: Batch, which: list[int], lengths: list[int], device: torch.device) -> _Sequences:
    own = [lengths[i] for i in which]
    contexts = [batch.context_lens_list[i] for i in which]
    starts = batch.query_start_list
    rows = [row for i in which for row in range(starts[i], starts[i + 1])]
    index = to_device(which, device, torch.int64)
    return _Sequences(
        rows=to_device(rows, device, torch.int64),
        query_lens=own,
        query_start=to_device([0, *accumulate(own)], device, torch.int32),
        context_lens=batch.context_lens.to(device).index_select(0, index),
        tables=batch.block_tables.to(device).index_select(0, index),
        contexts=contexts,
        max_context=max(contexts),
    )


def _kernel_for(sequences: _Sequences, cache: LayerCache) -> _Kernel:
    device_type = cache.data.device.type
    if sequences.is_decoding and support.has_kernels(device_type):
        return _Decode(sequences)
    if support.has_flash(device_type, cache.data.dtype, cache.data.shape[-1], cache.block_size):
        return _Flash(sequences)
    return _OneByOne(sequences)


@dataclass(frozen=True, slots=True, eq=False)
class _Decode:
    """Ours, of a query for each sequence."""

    sequences: _Sequences

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        from engines.gpu.decode_attention import decode_attention

        own = self.sequences
        return decode_attention(query, keys, values, own.tables, own.context_lens, scale)


@dataclass(frozen=True, slots=True, eq=False)
class _Flash:
    """torch's: one launch for any mixture of sequences."""

    sequences: _Sequences

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        own = self.sequences
        index = (own.query_start, own.context_lens, own.tables)
        return support.paged_flash(query, keys, values, *index, max(own.query_lens), own.max_context, scale)


@dataclass(frozen=True, slots=True, eq=False)
class _OneByOne:
    """torch's scaled_dot_product_attention over each context, copied out of its pages."""

    sequences: _Sequences

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        own = self.sequences
        parts = []
        queries = torch.split(query, list(own.query_lens))
        for one, table, context in zip(queries, own.tables.unbind(0), own.contexts, strict=True):
            blocks = table[: -(-context // keys.shape[1])]
            key, value = (_laid_out(pages, blocks, context) for pages in (keys, values))
            parts.append(_attend(one, key, value, scale))
        return torch.cat(parts)


def _laid_out(pages: Tensor, blocks: Tensor, context: int) -> Tensor:
    """The first `context` of the tokens in these blocks: [Hkv, context, D]."""
    return pages.index_select(0, blocks).flatten(0, 1)[:context].transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[q, Hq, D] to the same: the last q of a context's tokens, each over those up to itself. key, value:
    [Hkv, context, D]."""
    length, num_heads, context = query.shape[0], query.shape[1], key.shape[1]
    mask = None
    if length < context:
        seen = torch.ones(length, context, dtype=torch.bool, device=query.device)
        mask = seen.tril(context - length)
    group = num_heads // key.shape[0]
    key, value = (part.repeat_interleave(group, dim=0)[None] for part in (key, value))
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], key, value, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return out[0].transpose(0, 1)
