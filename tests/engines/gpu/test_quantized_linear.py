"""Which product a quantised projection takes on a GPU, and that each is near what the weights stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.gpu import fp8, support, weight_only
from engines.models.quantized import FusedQuantizedLinear, make_quantized_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the products, as they are taken."""
    monkeypatch.setattr(support, "has_kernels", lambda _: True)
    names: list[str] = []
    for module, name in ((weight_only, "weight_only"), (weight_only, "widen"), (fp8, "fp8_linear")):
        real = getattr(module, name)

        def noted(*args: Any, name: str = name, real: Callable[..., Tensor] = real) -> Tensor:
            names.append(name)
            return real(*args)

        monkeypatch.setattr(module, name, noted)
    return names


@pytest.mark.parametrize(
    ("encoding", "dtype", "num_rows", "expected"),
    [
        (torch.int8, torch.float32, 3, ["weight_only"]),
        (torch.int8, torch.float16, 65, ["weight_only"]),
        (torch.int8, torch.float16, 257, ["widen"]),
        (torch.float8_e4m3fn, torch.float16, 32, ["weight_only"]),
        (torch.float8_e4m3fn, torch.float32, 257, ["widen"]),
        (torch.float8_e4m3fn, torch.bfloat16, 33, ["fp8_linear"]),
    ],
)
def test_products(
    encoding: torch.dtype, dtype: torch.dtype, num_rows: int, expected: list[str], taken: list[str]
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(48, 64, generator=generator) * 30).clamp(-127, 127).to(encoding).to(DEVICE)
    scale = (torch.rand(48, generator=generator) / 30).to(DEVICE)
    bias = torch.randn(48, generator=generator).to(DEVICE, dtype)
    # Powers of two are exact in fp8: Triton's interpreter rounds others in a way of its own.
    x = (2.0 ** torch.randint(-2, 3, (num_rows, 64), generator=generator)).to(DEVICE, dtype)
    linear = make_quantized_linear(weight, scale, bias, dtype)
    assert isinstance(linear, FusedQuantizedLinear)
    out = linear(x)
    exact = x.double() @ (weight.double() * scale.double().unsqueeze(1)).T + bias.double()
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    assert (out.double() - exact).abs().max() < tolerance * exact.abs().max()
    assert taken == expected
