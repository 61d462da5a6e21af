"""int8 and fp8: near to the original, the same whatever tp is, and served by the native engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.open import open_checkpoint
from conversion.plan import Target
from engines.base import BadCheckpoint, Engine, UnsupportedModel
from engines.models.quantized import QuantizedLinear
from engines.runtime.context import ForwardContext, forward_context
from tests.conversion.helpers import convert, weights
from tests.engines.driver import Driver, generate, make_batch
from tests.engines.test_native import native, prompts_for
from tests.models import GQA, ODD, Shape, make_llama

NAME = "model.layers.1.mlp.down_proj.weight"


def rank(directory: Path, number: int, tp: int) -> dict[str, torch.Tensor]:
    return load_file(directory / f"tp{number}-of-{tp}" / "pp0-of-1.safetensors")


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.01), ("fp8", 0.04)])
def test_values_are_near_and_errors_are_reported(tmp_path: Path, kind: str, limit: float) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 2, torch.bfloat16)
    manifest = convert(hf, tmp_path / "q", Target("sluice", quantize=kind))
    held = rank(tmp_path / "q", 0, 1)
    written = manifest.files["tp0-of-1/pp0-of-1.safetensors"].tensors
    for name, original in weights(hf).items():
        if f"{name}_scale" not in held:
            assert torch.equal(held[name], original), name
            continue
        restored = held[name].float() * held[f"{name}_scale"][:, None]
        error = float((restored - original.float()).norm() / original.float().norm())
        assert error < limit
        assert written[name].error == pytest.approx(error, rel=1e-3)
    assert sum(f"{name}_scale" in held for name in held) == 7 * GQA.layers


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_ranks_hold_slices_of_the_same_numbers(tmp_path: Path, kind: str) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 2)
    for tp in (1, 2):
        convert(hf, tmp_path / f"q{tp}", Target("sluice", tp=tp, quantize=kind))
    whole, ranks = rank(tmp_path / "q1", 0, 1), [rank(tmp_path / "q2", i, 2) for i in range(2)]
    row_parallel = torch.cat([r[NAME].view(torch.uint8) for r in ranks], dim=1)
    assert torch.equal(row_parallel, whole[NAME].view(torch.uint8))
    assert all(torch.equal(r[f"{NAME}_scale"], whole[f"{NAME}_scale"]) for r in ranks)
    column = NAME.replace("down", "gate")
    assert torch.equal(torch.cat([r[f"{column}_scale"] for r in ranks]), whole[f"{column}_scale"])


def logits_of(engine: Engine, ids: list[int]) -> torch.Tensor:
    driver = Driver(engine, len(ids), 16)
    batch = make_batch([driver.add(ids, 0)], [len(ids)], 16)
    with forward_context(ForwardContext(batch, driver.caches)):
        hidden = engine.forward(batch)
    assert hidden is not None
    logits = engine.logits(hidden)
    assert logits is not None
    return logits


def restored(source: Path, quantized: Path, target: Path, shape: Shape) -> Path:
    """A plain model of the values that the quantised files stand for."""
    make_llama(target, shape)
    held = rank(quantized, 0, 1)
    from safetensors.torch import save_file

    values = {
        name: held[name].float() * held[f"{name}_scale"][:, None] if f"{name}_scale" in held else held[name]
        for name in weights(source)
    }
    save_file(values, target / "model.safetensors")
    return target


@pytest.mark.parametrize("shape", [GQA, ODD])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_served_as_the_values_that_the_files_stand_for(tmp_path: Path, shape: Shape, kind: str) -> None:
    hf = make_llama(tmp_path / "hf", shape, 3)
    convert(hf, tmp_path / "q", Target("sluice", quantize=kind))
    plain = native(restored(hf, tmp_path / "q", tmp_path / "plain", shape))
    served = native(tmp_path / "q")
    ids = prompts_for(shape.vocab, 40)[0]
    assert torch.allclose(logits_of(served, ids), logits_of(plain, ids), atol=1e-4)
    prompts = prompts_for(shape.vocab, 3, 9)
    assert generate(served, prompts, 12) == generate(plain, prompts, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 100])
def test_both_ways_of_computing_agree(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (48, 64), dtype=torch.int8, generator=generator)
    scale, bias = torch.rand(48, generator=generator) / 100, torch.randn(48, generator=generator).to(dtype)
    x = torch.randn(rows, 64, generator=generator).to(dtype)
    exact = x.double() @ (weight.double() * scale[:, None]).T + bias
    out = QuantizedLinear(weight, scale, bias, dtype)(x)
    assert out.dtype == dtype
    assert (out - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


def test_quantised_files_are_refused_where_they_cannot_be_divided(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 2)
    convert(hf, tmp_path / "q", Target("sluice", tp=2, quantize="int8"))
    for reshard in (False, True):
        with pytest.raises(UnsupportedModel, match="--tp 1 --pp 1 --quantize int8` on what it was made of"):
            native(tmp_path / "q", reshard=reshard)
    with pytest.raises(BadCheckpoint, match=r"quantised \(int8\), which loses values: cannot be converted"):
        open_checkpoint(tmp_path / "q")
