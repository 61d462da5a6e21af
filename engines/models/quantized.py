"""Linear layers over weights of one byte a value and one scale an output: int8, or fp8 (e4m3)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.base import BadCheckpoint
from engines.models.manifest import MANIFEST_NAME, Layout

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
_FEW_ROWS = 16  # up to here the int8 kernel is faster than unpacking the weight


def has_fp8(device: torch.device) -> bool:
    """Whether the device computes with fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


class QuantizedLinear:
    """x @ (weight * scale).T + bias. The weight stays as it is stored; it is widened while it is used."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight, self._bias = weight, bias
        self._scale = scale.to(dtype)
        self._has_kernel = weight.dtype == torch.int8 and weight.device.type == "cpu"

    def __call__(self, x: Tensor) -> Tensor:
        if self._has_kernel and x.shape[0] <= _FEW_ROWS:
            out: Tensor = torch._weight_int8pack_mm(x.contiguous(), self._weight, self._scale)
        else:
            out = F.linear(x, self._weight.to(x.dtype)).mul_(self._scale)
        return out if self._bias is None else out.add_(self._bias)
