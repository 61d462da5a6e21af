"""Weight-only quantisation of the projections: int8 per output channel, fp8 (e4m3) row-wise.

A row's scale is taken over the whole row, before it is divided: what a rank holds does not change with
tp, scales go with the rows of column-parallel weights, and are whole on every rank for row-parallel ones.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import torch

from conversion.tensors import Bytes

_LARGEST = {"int8": 127.0, "fp8": 448.0}


class Encoding(Enum):
    """How an entry's values are written."""

    PLAIN = "plain"
    INT8 = "int8"
    FP8 = "fp8"
    INT8_SCALE = "int8 scale"
    FP8_SCALE = "fp8 scale"

    @property
    def is_scale(self) -> bool:
        return self in (Encoding.INT8_SCALE, Encoding.FP8_SCALE)

    @property
    def scale(self) -> Encoding:
        """The encoding of the scales that belong to this one."""
        return Encoding(f"{self.value} scale")

    @property
    def dtype(self) -> str:
        """safetensors' name of what is written."""
        return {Encoding.INT8: "I8", Encoding.FP8: "F8_E4M3"}.get(self, "F32")


def scales(values: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """[rows, columns] float32 to [rows]: what the largest value of a row is divided by."""
    largest = values.abs().amax(dim=1)
    return torch.where(largest > 0, largest / _LARGEST[encoding.value.split()[0]], torch.ones_like(largest))


def quantized(values: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """[rows, columns] float32 to int8 or fp8."""
    scaled = values / scales(values, encoding)[:, None]
    if encoding is Encoding.INT8:
        return scaled.round().clamp(-127, 127).to(torch.int8)
    return scaled.to(torch.float8_e4m3fn)


def as_bytes(values: torch.Tensor) -> Bytes:
    """[rows, columns] to [rows, bytes]."""
    return np.asarray(values.contiguous().view(torch.uint8).numpy())
