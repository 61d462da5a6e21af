"""The sum of a layer's output and what flows past it, and its RMS norm, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.gpu.rows import whole_row


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, H] to [T, H]; the mean is taken in float32. Source: Zhang, Sennrich 2019."""
    out = torch.empty_like(x)
    _launch(x, x, weight, eps, out, is_sum=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual` [T, H] becomes residual + x; returns the norm of that."""
    out = torch.empty_like(x)
    _launch(x, residual, weight, eps, out, is_sum=True)
    return out


def _launch(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, *, is_sum: bool) -> None:
    num_rows, hidden = x.shape
    _add_rms_norm[(num_rows,)](x, residual, weight, out, hidden, eps, IS_SUM=is_sum, **whole_row(hidden))


@triton.jit
def _add_rms_norm(x, residual, weight, out, hidden, eps, IS_SUM: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * hidden
    columns = tl.arange(0, BLOCK)
    is_inside = columns < hidden
    wide = tl.load(x + start + columns, mask=is_inside, other=0.0).to(tl.float32)
    if IS_SUM:
        wide += tl.load(residual + start + columns, mask=is_inside, other=0.0).to(tl.float32)
        total = wide.to(residual.dtype.element_ty)
        tl.store(residual + start + columns, total, mask=is_inside)
        wide = total.to(tl.float32)  # of what others will read
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    gain = tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + start + columns, (wide * scale * gain).to(out.dtype.element_ty), mask=is_inside)
