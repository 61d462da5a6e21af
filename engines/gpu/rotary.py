"""A step's queries and keys turned by their positions, its keys and values into their slots: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotate_and_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """[T, (Hq + 2 Hkv) * D] to queries [T, Hq, D]; writes keys and values at `slots`.

    cos, sin: [P, D] of `Rotary`, rotate_half's sign in sin. positions, slots: [T]. keys, values:
    [num_slots, Hkv, D], contiguous.
    """
    num_tokens = qkv.shape[0]
    _, num_kv_heads, head_dim = keys.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    query = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    _rotate_and_write[(num_tokens, num_heads + 2 * num_kv_heads)](
        qkv,
        cos,
        sin,
        positions,
        slots,
        query,
        keys,
        values,
        qkv.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(head_dim),
        num_warps=1,
    )
    return query


@triton.jit
def _rotate_and_write(
    qkv,
    cos,
    sin,
    positions,
    slots,
    query,
    keys,
    values,
    row_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < HEAD_DIM
    start = qkv + token * row_stride + head * HEAD_DIM
    value = tl.load(start + columns, mask=is_inside, other=0.0)
    slot = tl.load(slots + token).to(tl.int64)
    if head >= NUM_HEADS + NUM_KV_HEADS:
        place = (slot * NUM_KV_HEADS + head - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM
        tl.store(values + place + columns, value, mask=is_inside)
    else:
        angle = tl.load(positions + token).to(tl.int64) * HEAD_DIM + columns
        swapped = tl.load(start + (columns + HEAD_DIM // 2) % HEAD_DIM, mask=is_inside, other=0.0)
        real = tl.load(cos + angle, mask=is_inside, other=0.0).to(tl.float32)
        imaginary = tl.load(sin + angle, mask=is_inside, other=0.0).to(tl.float32)
        turned = value.to(tl.float32) * real + swapped.to(tl.float32) * imaginary
        turned = turned.to(value.dtype)
        if head < NUM_HEADS:
            tl.store(query + (token * NUM_HEADS + head) * HEAD_DIM + columns, turned, mask=is_inside)
        else:
            place = (slot * NUM_KV_HEADS + head - NUM_HEADS) * HEAD_DIM
            tl.store(keys + place + columns, turned, mask=is_inside)
