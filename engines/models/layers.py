"""The parts of a Llama layer on one rank, without its attention."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.models.config import Llama3Scaling, Rope


class LinearOp(Protocol):
    """x @ weight.T + bias, however it is computed."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] to [T, out]."""


class PlainLinear:
    """torch's own."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """oneDNN's, its weight laid out once in the order in which the kernel reads it.

    On CPUs with AVX512-BF16 up to 2.3 times as fast as PlainLinear at 1 to 8 rows, 1.1 times at 128.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = bias
        self._apply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._apply(x, self._weight, self._bias, "none", [], "")
        return out


def make_linear(weight: Tensor, bias: Tensor | None = None) -> LinearOp:
    """The fastest linear for this weight's device and dtype. The caller may let go of `weight`."""
    return PackedLinear(weight, bias) if _can_pack(weight) else PlainLinear(weight, bias)


def _can_pack(weight: Tensor) -> bool:
    """float16 is left out: oneDNN has it only on CPUs with AVX512-FP16."""
    is_known = weight.dtype in (torch.float32, torch.bfloat16)
    return weight.device.type == "cpu" and is_known and torch._C._has_mkldnn


class RMSNorm:
    """Root mean square norm; the mean is taken in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """[D / 2] float32, scaled as `rope` says. Source: transformers' modeling_rope_utils."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    inverse = 1.0 / (rope.theta**exponents) / rope.divisor
    return inverse if rope.llama3 is None else _llama3(inverse, rope.llama3)


def _llama3(inverse: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between mixed."""
    wavelength = 2 * math.pi / inverse
    turns = scaling.original_max_positions / wavelength
    mix = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - mix) * inverse / scaling.factor + mix * inverse
    long = turns < scaling.low_freq_factor
    short = turns > scaling.high_freq_factor
    return torch.where(long, inverse / scaling.factor, torch.where(short, inverse, between))


class Rotary:
    """Turns queries and keys by their positions, in place.

    The second half of a head's dimensions is the imaginary part of the first (Hugging Face's layout).
    """

    def __init__(
        self, rope: Rope, head_dim: int, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        angles = torch.outer(torch.arange(max_positions).float(), inverse_frequencies(rope, head_dim))
        cos, sin = angles.cos(), angles.sin()
        self.half = head_dim // 2
        self.cos = torch.cat((cos, cos), dim=-1).to(device, dtype)  # [P, D]
        self.sin = torch.cat((-sin, sin), dim=-1).to(device, dtype)  # [P, D], the sign of rotate_half in it

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of a step's positions, [T, 1, D] each; once a step."""
        cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """`heads` [T, Hq + Hkv, D], queries and keys together."""
        swapped = heads.roll(self.half, -1)
        torch.addcmul(heads.mul_(cos), swapped, sin, out=heads)


def swiglu(gate_up: Tensor) -> Tensor:
    """[T, 2 F] to [T, F]: silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
