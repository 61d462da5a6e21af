"""Products of fp8 rows by fp8 weights (`torch._scaled_mm`), with a scale for each row and each output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.gpu.rows import whole_row

LARGEST = 448.0  # of float8_e4m3fn


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, in] to the same in float8_e4m3fn, and the scale [T, 1] float32 of each row: its largest / 448."""
    num_rows, width = x.shape
    out = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device)
    _quantize_rows[(num_rows,)](x, out, scale, width, LARGEST=LARGEST, **whole_row(width))
    return out, scale


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """[T, in] to [T, out] in x's dtype. weight: [out, in] float8_e4m3fn. scale: [out] float32."""
    rows, row_scale = quantize_rows(x)
    out: Tensor = torch._scaled_mm(
        rows, weight.t(), scale_a=row_scale, scale_b=scale.unsqueeze(0), out_dtype=torch.bfloat16
    )
    out = out.to(x.dtype)
    return out if bias is None else out.add_(bias)


@triton.jit
def _quantize_rows(x, out, scale, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < width
    value = tl.load(x + row * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    own = tl.maximum(tl.max(tl.abs(value), axis=0) / LARGEST, 1e-12)
    tl.store(scale + row, own)
    tl.store(out + row * width + columns, (value / own).to(out.dtype.element_ty), mask=is_inside)
