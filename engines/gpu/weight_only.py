"""Weights of one byte a value, widened on their way from memory: for steps of few tokens, which are as fast
as weights are read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64
"""That `weight_only` is meant for: its programs hold all rows at once."""
_MIN_ROWS = 16  # that a matrix product takes
_COLUMNS = 16  # of the output, for each program: many small programs keep the memory busy
_TILE = 256  # inputs at a time


def weight_only(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """[T, in] to [T, out]: x @ (weight * scale).T + bias, summed in float32; T is MAX_ROWS at most.

    weight: [out, in] int8 or float8_e4m3fn, contiguous. scale: [out] float32.
    """
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    _weight_only[(triton.cdiv(num_outputs, _COLUMNS),)](
        x,
        weight,
        scale,
        scale if bias is None else bias,
        out,
        num_rows,
        num_outputs,
        num_inputs,
        HAS_BIAS=bias is not None,
        ROWS=max(_MIN_ROWS, triton.next_power_of_2(num_rows)),
        COLUMNS=_COLUMNS,
        TILE=_TILE,
        num_warps=4,
        num_stages=4,
    )
    return out


@triton.jit
def _weight_only(
    x,
    weight,
    scale,
    bias,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < num_outputs
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_inputs, TILE):
        inputs = start + tl.arange(0, TILE)
        is_input = inputs < num_inputs
        is_left = is_row[:, None] & is_input[None, :]
        left = tl.load(x + rows[:, None] * num_inputs + inputs[None, :], mask=is_left, other=0.0)
        places = columns.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
        right = tl.load(weight + places, mask=is_column[:, None] & is_input[None, :], other=0.0)
        total += tl.dot(left, tl.trans(right.to(left.dtype)), input_precision="ieee")
    total *= tl.load(scale + columns, mask=is_column, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    places = rows[:, None] * num_outputs + columns[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
