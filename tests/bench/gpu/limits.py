"""What the device can do at most: bytes and multiplications a second."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from tests.bench.gpu.bench import Bench
from tests.bench.gpu.timing import median_seconds

_COPY, _MATRIX = "copy_gb_per_s", "matrix_tflop_per_s"


@dataclass(frozen=True, slots=True)
class Limits:
    """`bandwidth` in bytes read or written a second, `matrix_rate` in operations of bfloat16 a second."""

    bandwidth: float
    matrix_rate: float


def measure(bench: Bench) -> None:
    is_cuda = bench.options.is_cuda
    bench.put("device", torch.cuda.get_device_name(bench.device) if is_cuda else platform.machine())
    bench.put("cores", os.cpu_count())
    bench.part(_COPY, lambda: _copy(bench))
    bench.part(_MATRIX, lambda: _matrix(bench))


def limits_of(bench: Bench) -> Limits:
    """As the section has found them; measured now if it was not run."""
    known = bench.found.setdefault("limits", {})
    bandwidth, rate = bench.of("limits", _COPY), bench.of("limits", _MATRIX)
    bandwidth = known[_COPY] = _copy(bench) if bandwidth is None else bandwidth
    rate = known[_MATRIX] = _matrix(bench) if rate is None else rate
    return Limits(1e9 * bandwidth, 1e12 * rate)


def _copy(bench: Bench) -> float:
    return round(copy_bandwidth(bench.device, 4 << 30 if bench.options.is_cuda else 1 << 28) / 1e9, 1)


def _matrix(bench: Bench) -> float:
    return round(matrix_rate(bench.device, 8192 if bench.options.is_cuda else 1024) / 1e12, 3)


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second, read and written ones counted."""
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_seconds(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device, size: int) -> float:
    """Operations a second of a product of two bfloat16 matrices of random numbers; zeros would be faster."""
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / median_seconds(lambda: torch.mm(left, right, out=out), device)
