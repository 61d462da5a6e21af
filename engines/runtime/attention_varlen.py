"""Attention by torch's own paged FlashAttention: one kernel for any mixture of sequences. CUDA only."""

from __future__ import annotations

from torch import Tensor

from engines.base import Batch
from engines.runtime.kv_cache import LayerCache, begun_blocks


class VarlenStep:
    """Implements AttentionStep over caches of Layout.VARLEN."""

    def __init__(self, batch: Batch, cache: LayerCache) -> None:
        device = cache.data.device
        self.begun = begun_blocks(batch, cache)
        self.slots = batch.slot_mapping.to(device)
        self.query_start = batch.query_start.to(device)
        self.context_lens = batch.context_lens.to(device)
        self.block_tables = batch.block_tables.to(device)
        self.max_query_len, self.max_context_len = batch.max_query_len, batch.max_context_len

    def write(self, key: Tensor, value: Tensor, cache: LayerCache) -> None:
        if self.begun is not None:
            cache.data.index_fill_(1, self.begun, 0.0)
        keys, values = cache.data.flatten(1, 2).unbind(0)  # [num_slots, Hkv, D] each
        keys.index_copy_(0, self.slots, key)
        values.index_copy_(0, self.slots, value)

    def attend(self, query: Tensor, cache: LayerCache, scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        keys, values = cache.data.unbind(0)  # [num_blocks, block_size, Hkv, D] each
        out = varlen_attn(
            query.contiguous(),
            keys,
            values,
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
        assert isinstance(out, Tensor)  # a pair only where return_aux is asked for
        return out
