"""Linear layers over weights of one byte a value and one scale an output: int8, or fp8 (e4m3)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.base import BadCheckpoint
from engines.gpu import support
from engines.kernels import library
from engines.models.layers import LinearOp, deterministic_linear, kernel_linear
from engines.models.manifest import MANIFEST_NAME, Layout
from engines.runtime.cpu import compute_dtype

ENCODINGS = {"int8": ("I8", torch.int8), "fp8": ("F8_E4M3", torch.float8_e4m3fn)}
"""By the name in the manifest: safetensors' dtype and torch's."""


def encoding_of(root: Path, layout: Layout) -> tuple[str, torch.dtype] | None:
    """Of a layout's projections; None: they are not quantised. Raises BadCheckpoint: not one of these."""
    if layout.quantization is None:
        return None
    if layout.quantization not in ENCODINGS:
        raise BadCheckpoint(f"{root / MANIFEST_NAME}: quantization ({layout.quantization!r}) is unknown")
    return ENCODINGS[layout.quantization]


_FP8_CAPABILITY = (8, 9)
_FEW_ROWS = 16  # up to here the int8 kernel is faster than widening the weight
_FEW_ROWS_UPCAST = 48  # the same where bfloat16 is multiplied in float32
_TILE = 1 << 20  # values


def has_fp8(device: torch.device) -> bool:
    """Whether the device computes with fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


class QuantizedLinear:
    """x @ (weight * scale).T + bias. The weight stays as it is stored; it is widened while it is used.

    On a CPU torch's int8 kernel is used where it is the fastest: for few rows of bfloat16. In float32 it
    takes 3 times as long as widening at one row and 20 times at 16 (CPU time, measured with AVX2).
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight, self._bias, self._scale = weight, bias, scale.to(dtype)
        is_int8_on_cpu = weight.dtype == torch.int8 and weight.device.type == "cpu"
        has_kernel = is_int8_on_cpu and dtype == torch.bfloat16
        self._wide = compute_dtype(dtype, weight.device)
        self._max_kernel_rows = (_FEW_ROWS if self._wide == dtype else _FEW_ROWS_UPCAST) if has_kernel else 0
        self._tile = max(1, _TILE // weight.shape[1])  # rows

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] <= self._max_kernel_rows:
            out: Tensor = torch._weight_int8pack_mm(x.contiguous(), self._weight, self._scale)
        else:
            out = self._widened(x.to(self._wide)).mul_(self._scale).to(x.dtype)
        return out if self._bias is None else out.add_(self._bias)

    def _widened(self, x: Tensor) -> Tensor:
        """x @ weight.T; on a CPU a tile of the weight at a time, which stays in the cache."""
        if x.device.type != "cpu":
            return F.linear(x, self._weight.to(x.dtype))
        scratch = _scratch(max(_TILE, self._weight.shape[1]), x.dtype)
        parts = [
            F.linear(x, scratch[: tile.numel()].view(tile.shape).copy_(tile))
            for tile in torch.split(self._weight, self._tile)
        ]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class FusedQuantizedLinear:
    """The same on a GPU. A decoding step's rows meet the weight as it is stored; many rows of bfloat16 and an
    fp8 weight are multiplied in fp8, each row with a scale of its own; else the weight is widened first."""

    _MOST_BY_BYTES = 256
    _MOST_BY_BYTES_OF_FP8 = 32  # beyond, its products in fp8 are the faster
    _MULTIPLE = 16  # that their sizes are of

    def __init__(self, operand: library.Weight, dtype: torch.dtype) -> None:
        self._operand, weight = operand, operand.weight
        is_aligned = all(size % self._MULTIPLE == 0 for size in weight.shape)
        self._is_fp8 = weight.dtype == torch.float8_e4m3fn and dtype == torch.bfloat16 and is_aligned
        self._most = self._MOST_BY_BYTES_OF_FP8 if self._is_fp8 else self._MOST_BY_BYTES

    def __call__(self, x: Tensor) -> Tensor:
        from engines.gpu.fp8 import fp8_linear
        from engines.gpu.weight_only import weight_only, widen

        weight, scale, bias = self._operand.weight, self._operand.scale, self._operand.bias
        assert scale is not None, "a quantised weight has one"
        if x.shape[0] <= self._most:
            return weight_only(x.contiguous(), weight, scale, bias)
        if self._is_fp8:
            return fp8_linear(x.contiguous(), weight, scale, bias)
        return F.linear(x, widen(weight, scale, x.dtype), bias)


def make_quantized_linear(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    is_deterministic: bool = False,
    keeps_rows: bool = True,
) -> LinearOp:
    """The fastest for values of `dtype`, or one whose rows depend on no others. `keeps_rows`: see
    library.Weight. Raises UnsupportedModel."""
    operand = library.Weight(weight.contiguous(), bias, scale.float().contiguous(), keeps_rows)
    if is_deterministic:
        return deterministic_linear(operand, dtype)
    if support.has_kernels(weight.device.type):
        return FusedQuantizedLinear(operand, dtype)
    many = QuantizedLinear(weight, scale, bias, dtype)
    return kernel_linear(operand, dtype, lambda: many) or many


@cache
def _scratch(numel: int, dtype: torch.dtype) -> Tensor:
    """One for the process: only one thread of a rank computes."""
    with torch.inference_mode(False):  # it may be written in and out of that mode
        return torch.empty(numel, dtype=dtype)
