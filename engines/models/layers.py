"""The parts of a Llama layer on one rank, without its attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.base import UnsupportedModel
from engines.kernels import library
from engines.models.config import Llama3Scaling, Rope
from engines.runtime import cpu

if TYPE_CHECKING:
    from engines.runtime.mesh import Mesh


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

    oneDNN makes a kernel for each number of rows and keeps two copies of 270 KB, one of them for ever: a
    group that meets every number takes hundreds of megabytes. So it meets 48 of them: rows come in pieces of
    at most _MAX_ROWS, and are filled up with zeros.
    """

    _MAX_ROWS = 256

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = bias
        self._apply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] <= self._MAX_ROWS:
            return self._piece(x)
        return torch.cat([self._piece(part) for part in torch.split(x, self._MAX_ROWS)])

    def _piece(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        missing = _filled_up(num_rows) - num_rows
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        out: Tensor = self._apply(x, self._weight, self._bias, "none", [], "")
        return out[:num_rows]


def _filled_up(num_rows: int) -> int:
    """`num_rows` or, above 16, up to an eighth more: one of eight numbers between each two powers of two."""
    step = 1 << max(0, num_rows.bit_length() - 4)
    return -(-num_rows // step) * step


class UpcastLinear:
    """bfloat16 weights on a CPU that multiplies only float32: a tile at a time is made float32.

    torch's own is as fast as memory for a row or two, but takes as long again for each further one. With
    AVX2 alone this is 4 times as fast at 32 rows, 6 times at 256; the tile stays in the cache.
    """

    _TILE = 1 << 20  # float32 numbers
    _MAX_PLAIN_ROWS = 8

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._rows = max(1, self._TILE // weight.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() // x.shape[-1] <= self._MAX_PLAIN_ROWS:
            return F.linear(x, self.weight, self.bias)
        columns = x.flatten(0, -2).float().t().contiguous()  # [in, T]
        out = columns.new_empty(self.weight.shape[0], columns.shape[1])  # [out, T]
        for start in range(0, out.shape[0], self._rows):
            part = self.weight[start : start + self._rows]
            tile = _scratch(self._TILE)[: part.numel()].view(part.shape).copy_(part)
            torch.mm(tile, columns, out=out[start : start + self._rows])
        if self.bias is not None:
            out += self.bias.unsqueeze(1)
        return out.t().to(x.dtype, memory_format=torch.contiguous_format).view(*x.shape[:-1], -1)


@cache
def _scratch(numel: int) -> Tensor:
    """float32, one for the process: only one thread of a rank computes."""
    return torch.empty(numel)


class KernelLinear:
    """Our own kernel, which reads the weight as it lies; `many`, if given, for more than MOST_ROWS rows.

    In bfloat16 with AVX2 alone 1.5 to 3 times as fast as torch at 1 row, 5 times at 8; with AVX512-BF16 level
    with oneDNN (PackedLinear), whose weights are a second copy. Deterministic: no row's result depends on how
    many others there are.
    """

    def __init__(
        self,
        kernels: library.Library,
        operand: library.Weight,
        *,
        many: LinearOp | None = None,
        is_deterministic: bool = False,
    ) -> None:
        self.operand = operand
        self._kernels, self._many, self._is_deterministic = kernels, many, is_deterministic

    def packed(self) -> library.Weight | None:
        """The weight in three quarters of the room, nothing lost; None where it cannot be, or is needed as it
        is."""
        return self._kernels.pack(self.operand) if self._many is None else None

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`dtype`: of the result, where it is not to be x's: float32."""
        rows = x.flatten(0, -2)
        if self._many is not None and rows.shape[0] > MOST_ROWS:
            return self._many(x).to(dtype or x.dtype)
        out = self._kernels.linear(
            self.operand, rows.contiguous(), is_deterministic=self._is_deterministic, dtype=dtype
        )
        return out.view(*x.shape[:-1], -1)


def in_float32(linear: LinearOp, x: Tensor) -> Tensor:
    """What it makes of x, rounded to x's dtype, in float32: by our kernels without a copy."""
    if isinstance(linear, KernelLinear):
        return linear(x, torch.float32)
    return linear(x).float()


_LEAST_PACKED = 4 << 20  # bytes: fewer may stay in the caches, where what is packed is slower


def pack(linears: Sequence[LinearOp]) -> list[Tensor]:
    """Have them read packed weights: all of them, or none. A step of few tokens is as fast as its weights are
    read. Returns those that they read no more."""
    ours = [linear for linear in linears if isinstance(linear, KernelLinear)]
    if len(ours) < len(linears) or sum(linear.operand.weight.nbytes for linear in ours) < _LEAST_PACKED:
        return []
    packed = [weight for linear in ours if (weight := linear.packed()) is not None]
    if len(packed) < len(ours):
        return []
    before = [linear.operand.weight for linear in ours]
    for linear, weight in zip(ours, packed, strict=True):
        linear.operand = weight
    return before


MOST_ROWS = 32
"""That our kernels take where torch's matrices are the faster for more."""


def is_torch_faster(dtype: torch.dtype) -> bool:
    """Whether it is, for many rows of that dtype: oneDNN is, with AMX, which our kernels do not use."""
    return dtype == torch.bfloat16 and cpu.has_amx()


def kernel_linear(
    operand: library.Weight, dtype: torch.dtype, make_many: Callable[[], LinearOp]
) -> KernelLinear | None:
    """For values of `dtype`, with what `make_many` makes where torch is faster. None where there are no
    kernels for it."""
    if operand.weight.device.type != "cpu":  # nor are they compiled there
        return None
    kernels = library.load()
    if kernels is None or not kernels.takes(dtype, operand.weight):
        return None
    return KernelLinear(kernels, operand, many=make_many() if is_torch_faster(dtype) else None)


def deterministic_linear(operand: library.Weight, dtype: torch.dtype) -> KernelLinear:
    """One whose rows depend on no others, however many there are. Raises UnsupportedModel."""
    kernels = library.load()
    if kernels is None or not kernels.takes(dtype, operand.weight):
        raise not_deterministic(
            library.reason() or f"do not fit {dtype} with {operand.weight.shape[1]} inputs"
        )
    return KernelLinear(kernels, operand, is_deterministic=True)


def not_deterministic(reason: str) -> UnsupportedModel:
    """`reason`: what our kernels do instead of fitting the model."""
    return UnsupportedModel(
        f"deterministic: true needs kernels of ours, which {reason}; remove it to serve this model"
    )


def make_linear(weight: Tensor, bias: Tensor | None = None, *, is_deterministic: bool = False) -> LinearOp:
    """The fastest linear for this weight's device and dtype, or one whose rows depend on no others. The
    caller may let go of `weight`. Raises UnsupportedModel if it is to be deterministic and cannot be.

    float16 stays torch's own: oneDNN has it only on CPUs with AVX512-FP16.
    """
    operand = library.Weight(weight.contiguous(), bias)
    if is_deterministic:
        return deterministic_linear(operand, weight.dtype)
    ours = kernel_linear(operand, weight.dtype, lambda: _unpacked(operand.weight, bias))
    if ours is not None:
        return ours
    is_float32 = weight.dtype == torch.float32
    if _has_onednn(weight) and (is_float32 or (weight.dtype == torch.bfloat16 and cpu.has_bfloat16())):
        return PackedLinear(weight, bias)
    return _unpacked(weight, bias)


def _unpacked(weight: Tensor, bias: Tensor | None) -> LinearOp:
    """One that reads the weight as it lies, as our kernels beside it do."""
    is_slow = weight.dtype == torch.bfloat16 and not cpu.has_bfloat16()
    is_upcast = is_slow and weight.shape[1] <= UpcastLinear._TILE
    return (UpcastLinear if is_upcast and _has_onednn(weight) else PlainLinear)(weight, bias)


def _has_onednn(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and bool(torch._C._has_mkldnn)


class RMSNorm:
    """Root mean square norm of [T, H]; the mean is taken in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        kernels = library.load() if weight.device.type == "cpu" else None
        self._kernels = kernels if kernels is not None and kernels.takes_norm(weight) else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._kernels is not None:  # torch's takes eight operations
            return self._kernels.norm(x.contiguous(), self.weight, self.eps)
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


def embed_share(input_ids: Tensor, lookup: Callable[[Tensor], Tensor], num_rows: int, mesh: Mesh) -> Tensor:
    """[T] to [T, H]: `lookup` has this rank's `num_rows` of the vocabulary; what the ranks find is summed."""
    if mesh.tp_size == 1:
        return lookup(input_ids)
    local = input_ids - mesh.tp_rank * num_rows
    is_mine = (local >= 0) & (local < num_rows)
    rows = lookup(local.clamp_(0, num_rows - 1))
    return mesh.all_reduce(rows.mul_(is_mine.unsqueeze(-1)))


def swiglu(gate_up: Tensor) -> Tensor:
    """[T, 2 F] to [T, F]: silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
