"""Causal attention of a step over the paged K/V: writes the step's keys and values, reads the contexts.

Works for any mixture of sequences: a decode step is a query of one token, a prefill chunk one of many.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.base import Batch
from engines.runtime.context import current
from engines.runtime.kv_cache import LayerCache

FLASH_BLOCK_SIZE = 256  # FlashAttention-2's pages are multiples of this


class AttentionStep(Protocol):
    """One way to attend, prepared for one step: it works out once what all layers share."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kv: LayerCache, scale: float) -> Tensor:
        """[T, Hq, D] and the step's own [T, Hkv, D] twice, in the cache already, to [T, Hq, D]."""


def paged_attention(query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float) -> Tensor:
    """Attend in local layer `layer` of the current forward context.

    query [T, Hq, D], key and value [T, Hkv, D], rotated already. Writes key and value at the batch's
    slot_mapping, then attends each query to its sequence's context up to itself. Returns [T, Hq, D].
    """
    context = current()
    kv = context.caches[layer]
    slots = context.batch.slot_mapping
    kv.key.flatten(0, 1).index_copy_(0, slots, key)
    kv.value.flatten(0, 1).index_copy_(0, slots, value)
    step = context.attention.get(kv.key.device)
    if step is None:
        step = context.attention[kv.key.device] = _prepare(context.batch, kv)
    return step(query, key, value, kv, scale)


def block_size_for(device: torch.device, dtype: torch.dtype, head_dim: int, configured: int) -> int:
    """The block size that the backend for these wants; the configured one where it has no wish."""
    return FLASH_BLOCK_SIZE if uses_varlen(device, dtype, head_dim) else configured


def uses_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's paged FlashAttention can serve this: CUDA, half precision, heads up to 256."""
    is_half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and is_half and head_dim <= 256 and head_dim % 8 == 0 and _varlen_is_paged()


@cache
def _varlen_is_paged() -> bool:
    """Whether this torch's varlen_attn takes a block table: its arguments differ between versions."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    names = inspect.signature(varlen_attn).parameters
    return {"seqused_k", "block_table", "window_size", "enable_gqa"} <= names.keys()


def _prepare(batch: Batch, kv: LayerCache) -> AttentionStep:
    if uses_varlen(kv.key.device, kv.key.dtype, kv.key.shape[-1]):
        return VarlenStep(batch, kv)
    return GatherStep(batch, kv)


class VarlenStep:
    """torch.nn.attention.varlen over the block tables: one kernel for any mixture of sequences."""

    def __init__(self, batch: Batch, kv: LayerCache) -> None:
        device = kv.key.device
        self.query_start = batch.query_start.to(device)
        self.context_lens = batch.context_lens.to(device)
        self.block_tables = batch.block_tables.to(device)
        self.max_query_len, self.max_context_len = batch.max_query_len, batch.max_context_len

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kv: LayerCache, scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            query.contiguous(),
            kv.key,
            kv.value,
            self.query_start,
            None,
            self.max_query_len,
            self.max_context_len,
            scale=scale,
            window_size=(-1, 0),  # causal, aligned to the end of the context
            enable_gqa=True,
            seqused_k=self.context_lens,
            block_table=self.block_tables,
        )
        assert isinstance(out, Tensor)
        return out


class GatherStep:
    """Pure torch: gathers each context's blocks and attends with scaled_dot_product_attention.

    All decoding sequences go in one call, padded to the widest of their contexts; each prefill chunk
    in one of its own.
    """

    def __init__(self, batch: Batch, kv: LayerCache) -> None:
        starts, contexts = batch.query_start_list, batch.context_lens_list
        lengths = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
        decoding = [s for s, length in enumerate(lengths) if length == 1]
        tables = batch.block_tables.to(kv.key.device, torch.int64)
        self.chunks = [
            _Chunk(starts[s], starts[s + 1], contexts[s], tables[s], kv)
            for s, length in enumerate(lengths)
            if length > 1
        ]
        self.decodes = None
        if decoding:
            rows = None if len(decoding) == len(lengths) else [starts[s] for s in decoding]
            self.decodes = _Decodes(rows, [contexts[s] for s in decoding], tables[decoding], kv)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kv: LayerCache, scale: float) -> Tensor:
        if not self.chunks and self.decodes is not None:
            return self.decodes.attend(query, kv, scale)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for chunk in self.chunks:
            own = slice(chunk.start, chunk.stop)
            out[own] = chunk.attend(query[own], key[own], value[own], kv, scale)
        if self.decodes is not None:
            rows = self.decodes.rows
            out[rows] = self.decodes.attend(query[rows], kv, scale)
        return out


class _Decodes:
    """The sequences of a step that have one query each. `rows`: where those are, None for all."""

    def __init__(self, rows: list[int] | None, contexts: list[int], tables: Tensor, kv: LayerCache) -> None:
        device = kv.key.device
        self.rows = None if rows is None else torch.tensor(rows, device=device)
        self.width = -(-max(contexts) // kv.block_size)
        self.max_context = max(contexts)
        self.blocks = tables[:, : self.width].flatten()
        lengths = torch.tensor(contexts, device=device)
        valid = torch.arange(self.max_context, device=device) < lengths[:, None]  # [S, context]
        mask = torch.zeros(valid.shape, dtype=kv.key.dtype, device=device).masked_fill_(~valid, float("-inf"))
        self.mask = None if min(contexts) == self.max_context else mask[:, None, None, :]

    def attend(self, query: Tensor, kv: LayerCache, scale: float) -> Tensor:
        """[S, Hq, D] to [S, Hq, D]. The query heads of one K/V head are rows of one small matmul."""
        num_seqs, num_heads, head_dim = query.shape
        grouped = query.view(num_seqs, kv.key.shape[2], -1, head_dim)
        out = F.scaled_dot_product_attention(
            grouped, self._gather(kv.key), self._gather(kv.value), attn_mask=self.mask, scale=scale
        )
        return out.reshape(num_seqs, num_heads, head_dim)

    def _gather(self, cache: Tensor) -> Tensor:
        """[blocks, size, Hkv, D] to [S, Hkv, context, D] of the sequences' blocks in order."""
        _, size, num_heads, head_dim = cache.shape
        rows = cache.flatten(1).index_select(0, self.blocks)
        contexts = rows.view(-1, self.width * size, num_heads, head_dim)
        return contexts[:, : self.max_context].transpose(1, 2)


class _Chunk:
    """Several queries of one sequence: positions context - (stop - start) .. context."""

    def __init__(self, start: int, stop: int, context: int, table: Tensor, kv: LayerCache) -> None:
        self.start, self.stop, self.context = start, stop, context
        self.blocks = table[: -(-context // kv.block_size)]
        length = stop - start
        self.is_whole = length == context
        self.mask = None
        if not self.is_whole:
            seen = torch.ones(length, context, dtype=torch.bool, device=kv.key.device)
            self.mask = seen.tril_(context - length)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv: LayerCache, scale: float) -> Tensor:
        """[q, Hq, D] to [q, Hq, D]; a chunk that is the whole context reads its own key and value."""
        if not self.is_whole:
            key, value = self._gather(kv.key), self._gather(kv.value)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=self.mask,
            is_causal=self.is_whole,
            scale=scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)

    def _gather(self, cache: Tensor) -> Tensor:
        """[blocks, size, Hkv, D] to [context, Hkv, D]."""
        return cache.index_select(0, self.blocks).flatten(0, 1)[: self.context]
