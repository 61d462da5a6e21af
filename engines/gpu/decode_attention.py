"""Attention of decoding sequences over the paged K/V: a query of one token each, contexts of any length.

A context is read by several programs at once, each a part of it (split-K; Dao et al., "Flash-Decoding",
2023): a few sequences would not fill the device, and a long one would have the others wait. Into how many
parts depends on nothing that differs between steps of as many sequences, so a launch can be replayed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MIN_ROWS = 16  # that a matrix product takes
_PROGRAMS_AT_LEAST = 1024  # some for each multiprocessor of an H100, even if contexts differ
_MIN_PARTS, _MAX_PARTS = 8, 32
_PART_TILES = 4  # at least: a part has its price
_TILE_BYTES = 16 << 10  # of keys at a time
_STAGES = 5  # of which the table's look-up takes some: one tile is on its way while another is used


def num_parts(num_seqs: int, num_kv_heads: int) -> int:
    """Into how many parts a context is cut at most: a power of two, so that few kernels are compiled."""
    wanted = triton.next_power_of_2(triton.cdiv(_PROGRAMS_AT_LEAST, num_seqs * num_kv_heads))
    return int(min(_MAX_PARTS, max(_MIN_PARTS, wanted)))


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """[S, Hq, D] to [S, Hq, D], each query over all of its sequence's context.

    keys, values: [num_blocks, block_size, Hkv, D], contiguous. block_tables: [S, W] int32. context_lens: [S]
    int32, at least 1.
    """
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = keys.shape
    block = triton.next_power_of_2(head_dim)
    tile = max(16, min(64, _TILE_BYTES // (block * query.itemsize)))
    parts = num_parts(num_seqs, num_kv_heads)
    group = num_heads // num_kv_heads
    sums = torch.empty(num_seqs, num_heads, parts, head_dim, dtype=torch.float32, device=query.device)
    marks = torch.empty(num_seqs, num_heads, parts, 2, dtype=torch.float32, device=query.device)
    _attend_part[(num_seqs, num_kv_heads, parts)](
        query,
        keys,
        values,
        block_tables,
        context_lens,
        sums,
        marks,
        scale,
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        ROWS=max(_MIN_ROWS, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK=block,
        TILE=tile,
        PARTS=parts,
        PART_TILES=_PART_TILES,
        num_warps=4,
        num_stages=_STAGES,
    )
    out = torch.empty_like(query)
    _join_parts[(num_seqs * num_heads,)](
        sums, marks, out, HEAD_DIM=head_dim, BLOCK=block, PARTS=parts, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=["table_stride"])
def _attend_part(
    query,
    keys,
    values,
    block_tables,
    context_lens,
    sums,
    marks,
    scale,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    PART_TILES: tl.constexpr,
):
    """One part of one context, for the query heads that share a K/V head: their weighted sums of values
    (not yet divided), the largest score and the sum of weights. Of a part without tokens the latter two."""
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    context = tl.load(context_lens + sequence)
    tiles = tl.maximum(tl.cdiv(context, PARTS * TILE), PART_TILES)
    first = part * tiles * TILE
    last = tl.minimum(first + tiles * TILE, context)

    rows = tl.arange(0, ROWS)
    is_row = rows < GROUP
    heads = (sequence * NUM_KV_HEADS + kv_head) * GROUP + rows
    parts = heads * PARTS + part
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    if first < context:
        columns = tl.arange(0, BLOCK)
        is_column = columns < HEAD_DIM
        is_used = is_row[:, None] & is_column[None, :]
        queries = tl.load(query + heads[:, None] * HEAD_DIM + columns[None, :], mask=is_used, other=0.0)
        value_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        table = block_tables + sequence * table_stride
        for start in range(first, last, TILE):
            tokens = start + tl.arange(0, TILE)
            is_token = tokens < last
            if BLOCK_SIZE % TILE == 0:  # a tile is of one block
                slots = tl.load(table + start // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
            else:
                blocks = tl.load(table + tokens // BLOCK_SIZE, mask=is_token, other=0)
                slots = blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
            places = (slots * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM + columns[None, :]
            is_read = is_token[:, None] & is_column[None, :]
            key = tl.load(keys + places, mask=is_read, other=0.0)
            scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
            scores = tl.where(is_token[None, :], scores, float("-inf"))
            now_largest = tl.maximum(largest, tl.max(scores, axis=1))
            weights = tl.exp(scores - now_largest[:, None])
            shrink = tl.exp(largest - now_largest)
            value = tl.load(values + places, mask=is_read, other=0.0)
            weighted = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            value_sum = value_sum * shrink[:, None] + weighted
            weight_sum = weight_sum * shrink + tl.sum(weights, axis=1)
            largest = now_largest
        tl.store(sums + parts[:, None] * HEAD_DIM + columns[None, :], value_sum, mask=is_used)
    tl.store(marks + 2 * parts, largest, mask=is_row)
    tl.store(marks + 2 * parts + 1, weight_sum, mask=is_row)


@triton.jit
def _join_parts(sums, marks, out, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    parts = head * PARTS + tl.arange(0, PARTS)
    columns = tl.arange(0, BLOCK)
    is_column = columns < HEAD_DIM
    largest = tl.load(marks + 2 * parts)
    has_tokens = largest != float("-inf")
    share = tl.exp(largest - tl.max(largest, axis=0))  # 0 for a part without tokens
    weight_sum = tl.sum(share * tl.load(marks + 2 * parts + 1), axis=0)
    is_read = has_tokens[:, None] & is_column[None, :]
    values = tl.load(sums + parts[:, None] * HEAD_DIM + columns[None, :], mask=is_read, other=0.0)
    value = tl.sum(values * share[:, None], axis=0) / weight_sum
    tl.store(out + head * HEAD_DIM + columns, value.to(out.dtype.element_ty), mask=is_column)
