"""The linears agree with torch's own, whichever the processor gets."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.kernels import library
from engines.models.layers import KernelLinear, PackedLinear, PlainLinear, UpcastLinear, make_linear
from engines.runtime import cpu


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(1500, 1024, generator=torch.Generator().manual_seed(0)) / 32  # two tiles


@pytest.mark.parametrize("num_rows", [1, 8, 9, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_upcast_linear_is_as_exact_as_bfloat16_allows(weight: Tensor, num_rows: int, with_bias: bool) -> None:
    weight = weight.bfloat16()
    bias = torch.randn(1500).bfloat16() if with_bias else None
    x = torch.randn(num_rows, 1024).bfloat16()
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = UpcastLinear(weight, bias)(x)
    assert got.dtype == torch.bfloat16
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=2**-8)


def test_upcast_linear_takes_leading_axes(weight: Tensor) -> None:
    x = torch.randn(3, 5, 1024).bfloat16()
    linear = UpcastLinear(weight.bfloat16(), None)
    assert torch.equal(linear(x), linear(x.flatten(0, 1)).view(3, 5, -1))


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: None)


@pytest.mark.parametrize(("has_bfloat16", "kind"), [(False, UpcastLinear), (True, PackedLinear)])
@pytest.mark.usefixtures("no_kernels")
def test_bfloat16_is_packed_only_where_the_processor_multiplies_it(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, kind: type
) -> None:
    if has_bfloat16 and not cpu.has_bfloat16():
        pytest.skip("this processor has no bfloat16 instructions")
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: has_bfloat16)
    assert isinstance(make_linear(weight.bfloat16()), kind)


@pytest.mark.skipif(library.load() is None, reason="no kernels for this machine; the log says why")
def test_our_kernels_are_used_alone_but_where_torch_is_faster(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(make_linear(weight), KernelLinear)
    assert not isinstance(make_linear(weight[:, :37].contiguous()), KernelLinear)  # not whole vectors
    monkeypatch.setattr(cpu, "has_amx", lambda: False)
    assert _many(make_linear(weight.bfloat16())) is None
    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: True)
    assert isinstance(_many(make_linear(weight.bfloat16())), PlainLinear)
    assert _many(make_linear(weight)) is None


def _many(linear: object) -> object:
    assert isinstance(linear, KernelLinear)
    return linear._many


@pytest.mark.usefixtures("no_kernels")
def test_float32_is_packed_and_float16_is_not(weight: Tensor) -> None:
    assert isinstance(make_linear(weight), PackedLinear)
    assert isinstance(make_linear(weight.half()), PlainLinear)


def test_packed_linear_gives_each_row_what_it_gets_alone(weight: Tensor) -> None:
    """However many there are with it, and whatever they are."""
    linear, x = PackedLinear(weight, torch.randn(1500)), torch.randn(600, 1024)
    alone = linear(x[:1])
    torch.testing.assert_close(
        alone, F.linear(x[:1].double(), weight.double(), linear._bias.double()).float()
    )
    x[1:] = torch.nan
    for num_rows in (1, 2, 17, 33, 255, 256, 257, 600):
        got = linear(x[:num_rows])
        assert got.shape == (num_rows, 1500)
        torch.testing.assert_close(got[:1], alone)
        assert got[1:].isnan().all()


def test_packed_linear_has_a_bounded_number_of_kernels(capfd: pytest.CaptureFixture[str]) -> None:
    """oneDNN keeps one for each number of rows, a quarter of a megabyte each, and never forgets them."""
    linear = PackedLinear(torch.randn(24, 40), None)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):  # type: ignore[no-untyped-call]
        for num_rows in range(1, 700):
            linear(torch.ones(num_rows, 40))
        ctypes.CDLL(None).fflush(None)  # what oneDNN writes goes through C's buffers
    created = [line for line in capfd.readouterr().out.splitlines() if "create:cache_miss" in line]
    assert 0 < len([line for line in created if "inner_product" in line]) <= 48
