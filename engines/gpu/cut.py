"""The probability below which top_k and top_p cut a row off, without sorting the vocabulary.

Probabilities are not negative, so their bits are ordered as they are: the threshold is found bit by bit, from
the highest, each time by one look at the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096


def cut(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """[R, V] float32 to [R, 1]: the probability of the last token that top_k and top_p keep; others that have
    the same are kept as well.

    top_k: [R] int32, the vocabulary's size where there is none. top_p: [R] float32, above 0, of what top_k
    kept.
    """
    out = torch.empty(len(probs), 1, dtype=torch.float32, device=probs.device)
    _cut[(len(probs),)](probs, top_k, top_p, out, probs.shape[1], TILE=_TILE, num_warps=16)
    return out


@triton.jit
def _count(row, size, least, TILE: tl.constexpr):
    """How many of a row have bits of at least `least`."""
    total = tl.zeros([TILE], tl.int32)
    for start in range(0, size, TILE):
        columns = start + tl.arange(0, TILE)
        bits = tl.load(row + columns, mask=columns < size, other=-1.0).to(tl.int32, bitcast=True)
        total += (bits >= least).to(tl.int32)
    return tl.sum(total, axis=0)


@triton.jit
def _mass(row, size, least, TILE: tl.constexpr):
    """The sum of those."""
    total = tl.zeros([TILE], tl.float64)
    for start in range(0, size, TILE):
        columns = start + tl.arange(0, TILE)
        value = tl.load(row + columns, mask=columns < size, other=-1.0)
        bits = value.to(tl.int32, bitcast=True)
        total += tl.where(bits >= least, value, 0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _cut(probs, top_k, top_p, out, size, TILE: tl.constexpr):
    index = tl.program_id(0)
    row = probs + index.to(tl.int64) * size
    most = tl.load(top_k + index)
    kept = tl.zeros([], tl.int32)  # bits of the last that top_k keeps
    if most < size:
        for place in range(31):
            least = kept | (1 << (30 - place))
            if _count(row, size, least, TILE) >= most:
                kept = least
    share = tl.load(top_p + index)
    found = kept
    if share < 1.0:
        goal = share.to(tl.float64)
        if most < size:
            goal *= _mass(row, size, kept, TILE)
        found = tl.zeros([], tl.int32)
        for place in range(31):
            least = found | (1 << (30 - place))
            if _mass(row, size, tl.maximum(least, kept), TILE) >= goal:
                found = least
        found = tl.maximum(found, kept)
    tl.store(out + index, found.to(tl.float32, bitcast=True))
