"""Weights of one byte a value, widened on their way from memory to the product: steps of few tokens are as
fast as weights are read."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class _Shape(NamedTuple):
    """What one program computes, and with what."""

    rows: int
    columns: int
    tile: int  # inputs at a time
    num_warps: int
    num_stages: int


_FEW = _Shape(rows=16, columns=16, tile=256, num_warps=2, num_stages=4)
"""Many small programs, which keep the memory busy."""
_SOME = _Shape(rows=32, columns=32, tile=128, num_warps=4, num_stages=4)
_MANY = _Shape(rows=64, columns=64, tile=64, num_warps=4, num_stages=4)
"""Enough columns that the rows, which each program reads anew, cost less than the weights."""


def weight_only(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """[T, in] to [T, out]: x @ (weight * scale).T + bias, summed in float32.

    weight: [out, in] int8 or float8_e4m3fn, contiguous. scale: [out] float32.
    """
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    shape = next((each for each in (_FEW, _SOME) if num_rows <= each.rows), _MANY)
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    _weight_only[(triton.cdiv(num_outputs, shape.columns), triton.cdiv(num_rows, shape.rows))](
        x,
        weight,
        scale,
        scale if bias is None else bias,
        out,
        num_rows,
        num_outputs,
        num_inputs,
        HAS_BIAS=bias is not None,
        ROWS=shape.rows,
        COLUMNS=shape.columns,
        TILE=shape.tile,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
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
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row, is_column = rows < num_rows, columns < num_outputs
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_inputs, TILE):
        inputs = start + tl.arange(0, TILE)
        is_input = inputs < num_inputs
        places = rows.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
        left = tl.load(x + places, mask=is_row[:, None] & is_input[None, :], other=0.0)
        places = columns.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
        right = tl.load(weight + places, mask=is_column[:, None] & is_input[None, :], other=0.0)
        if weight.dtype.element_ty == tl.float8e4nv:  # to half there is an instruction, to bfloat16 none
            right = right.to(tl.float16).to(tl.float32)
        total += tl.dot(left, tl.trans(right.to(left.dtype)), input_precision="ieee")
    total *= tl.load(scale + columns, mask=is_column, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    places = rows.to(tl.int64)[:, None] * num_outputs + columns[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def widen(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] in `dtype`, the scale of each output in it."""
    num_outputs, num_inputs = weight.shape
    out = torch.empty(num_outputs, num_inputs, dtype=dtype, device=weight.device)
    tile = 1024
    _widen[(num_outputs, triton.cdiv(num_inputs, tile))](weight, scale, out, num_inputs, TILE=tile)
    return out


@triton.jit
def _widen(weight, scale, out, num_inputs, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_inside = columns < num_inputs
    value = tl.load(weight + row * num_inputs + columns, mask=is_inside, other=0.0).to(tl.float32)
    value *= tl.load(scale + row)
    tl.store(out + row * num_inputs + columns, value.to(out.dtype.element_ty), mask=is_inside)
