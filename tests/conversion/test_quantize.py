"""int8 and fp8: near to the original, the same whatever tp is, and served by the native engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.main import verify
from conversion.open import open_checkpoint
from conversion.plan import Target
from conversion.source import Choices
from conversion.tensors import CannotConvert
from conversion.verify import differences
from engines.base import BadCheckpoint, Engine, UnsupportedModel
from engines.models import quantized
from engines.models.manifest import read_manifest
from engines.models.quantized import QuantizedLinear
from engines.runtime.context import ForwardContext, forward_context
from tests.conversion.helpers import convert, weights
from tests.engines.driver import Driver, generate, make_batch, native
from tests.engines.test_native import prompts_for
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


@torch.inference_mode()
def logits_of(engine: Engine, ids: list[int]) -> torch.Tensor:
    driver = Driver(engine, len(ids), 16)
    batch = make_batch([driver.add(ids, 0)], [len(ids)], 16)
    with forward_context(ForwardContext(batch, driver.caches)):
        hidden = engine.forward(batch)
    assert hidden is not None
    logits = engine.logits(hidden)
    assert logits is not None
    return logits


@pytest.mark.parametrize("shape", [GQA, ODD])
def test_served_as_the_values_that_the_files_stand_for(tmp_path: Path, shape: Shape) -> None:
    hf = make_llama(tmp_path / "hf", shape, 3)
    convert(hf, tmp_path / "q", Target("sluice", quantize="int8"))
    convert(tmp_path / "q", tmp_path / "plain", Target("hf", dtype="F32"))
    plain, served = native(tmp_path / "plain"), native(tmp_path / "q")
    ids = prompts_for(shape.vocab, 40)[0]
    assert torch.allclose(logits_of(served, ids), logits_of(plain, ids), atol=1e-4)
    prompts = prompts_for(shape.vocab, 3, 9)
    assert generate(served, prompts, 12) == generate(plain, prompts, 12)


@pytest.mark.parametrize("how", ["native", "reshard"])
def test_fp8_is_refused_on_a_cpu_with_the_commands_that_help(tmp_path: Path, how: str) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 3)
    convert(hf, tmp_path / "q", Target("sluice", tp=2 if how == "reshard" else 1, quantize="fp8"))
    with pytest.raises(UnsupportedModel, match="this is a CPU") as refused:
        native(tmp_path / "q", reshard=how == "reshard")
    root = tmp_path / "q"
    assert f"sluice convert {root} {root}-bf16 --to sluice --tp 1 --pp 1 --dtype bfloat16`" in str(
        refused.value
    )
    assert f"{root}-int8 --to sluice --tp 1 --pp 1 --quantize int8`" in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("tile", [64, 1 << 20])
def test_both_ways_of_computing_agree(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, tile: int
) -> None:
    monkeypatch.setattr(quantized, "_TILE", tile)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (48, 64), dtype=torch.int8, generator=generator)
    scale, bias = torch.rand(48, generator=generator) / 100, torch.randn(48, generator=generator).to(dtype)
    x = torch.randn(rows, 64, generator=generator).to(dtype)
    exact = x.double() @ (weight.double() * scale[:, None]).T + bias
    out = QuantizedLinear(weight, scale, bias, dtype)(x)
    assert out.dtype == dtype
    assert (out - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


LAYOUTS = (
    Target("sluice", tp=4, pp=2),
    Target("sluice", pp=3),
    Target("sluice", tp=8),
    Target("sluice", tp=2),
)


@pytest.mark.parametrize("shape", [GQA, ODD])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_any_layout_to_any_other_keeps_every_bit(
    tmp_path: Path, shape: Shape, kind: Literal["int8", "fp8"]
) -> None:
    """Through splits that cut rows and columns, replicate heads and give a stage one layer."""
    hf = make_llama(tmp_path / "hf", shape, 5, torch.bfloat16)
    convert(hf, tmp_path / "direct", Target("sluice", quantize=kind))
    current = tmp_path / "direct"
    for number, how in enumerate(how for how in LAYOUTS if how.tp <= shape.heads and how.pp <= shape.layers):
        convert(current, tmp_path / str(number), how)
        current = tmp_path / str(number)
        assert not list(differences(open_checkpoint(tmp_path / "direct"), open_checkpoint(current)))
        manifest = read_manifest(current)
        assert manifest is not None
        assert manifest.layout is not None
        assert manifest.layout.quantization == kind
    convert(current, tmp_path / "back", Target("sluice"))
    whole, back = rank(tmp_path / "direct", 0, 1), rank(tmp_path / "back", 0, 1)
    assert whole.keys() == back.keys()
    assert all(torch.equal(whole[name].view(torch.uint8), back[name].view(torch.uint8)) for name in whole)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("how", [Target("hf", dtype="F32"), Target("meta", shards=2, dtype="F32")])
def test_converted_back_to_the_values_that_it_stands_for(
    tmp_path: Path, kind: Literal["int8", "fp8"], how: Target
) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 6, torch.bfloat16)
    convert(hf, tmp_path / "q1", Target("sluice", quantize=kind))
    convert(hf, tmp_path / "q2", Target("sluice", tp=2, pp=2, quantize=kind))
    convert(tmp_path / "q2", tmp_path / "plain", how)
    convert(tmp_path / "plain", tmp_path / "out", Target("hf"))
    held = rank(tmp_path / "q1", 0, 1)
    for name, values in weights(tmp_path / "out").items():
        scale = held.get(f"{name}_scale")
        exact = held[name].float() if scale is None else held[name].float() * scale[:, None]
        assert torch.equal(values, exact), name


def test_what_would_lose_more_is_refused_with_the_remedy(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 2)
    convert(hf, tmp_path / "q", Target("sluice", tp=2, quantize="int8"))
    for how in (Target("hf"), Target("meta")):
        with pytest.raises(
            CannotConvert, match=r"q: is quantised \(int8\), .*--dtype bfloat16 writes the values"
        ):
            convert(tmp_path / "q", tmp_path / "out", how)
    with pytest.raises(CannotConvert, match=r"--quantize fp8: .* already, and would lose more"):
        convert(tmp_path / "q", tmp_path / "out", Target("sluice", quantize="fp8"))
    assert not (tmp_path / "out").exists()


def test_verify_tells_how_far_quantised_values_are(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 2, torch.bfloat16)
    manifest = convert(hf, tmp_path / "q", Target("sluice", quantize="int8"))
    error = manifest.files["tp0-of-1/pp0-of-1.safetensors"].tensors[NAME].error
    found = {d.what: d.why for d in differences(open_checkpoint(tmp_path / "q"), open_checkpoint(hf))}
    assert len(found) == 7 * GQA.layers
    assert found[NAME] == f"I8 and BF16, relative error {error:.3%}"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_verify_ends_with_what_quantising_lost_and_fails_where_more_is(
    tmp_path: Path, kind: Literal["int8", "fp8"], capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 2, torch.bfloat16)
    convert(hf, tmp_path / "q", Target("sluice", quantize=kind))
    opened = open_checkpoint(hf), open_checkpoint(tmp_path / "q")
    _, worst, why = max((d.loss or 0.0, d.what, d.why) for d in differences(*opened))
    assert verify(hf, tmp_path / "q", Choices(), numeric=True, layers=2) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("quantised: 2 layers in float32 differ by ")
    assert printed[-1] == (
        f"of 30 tensors 9 are equal, bit by bit, 21 within what {kind} loses (the worst: {worst}, {why})"
    )
    assert not any(line.startswith("differs") for line in printed)
    tensors = weights(hf)
    row = tensors[NAME][3].float().abs()
    tensors[NAME][3, row.argmin()] = row.max() / 4  # a value that its int8 or fp8 is not the nearest to
    save_file(tensors, hf / "model.safetensors")
    assert verify(hf, tmp_path / "q", Choices(), numeric=False, layers=2) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith(f"differs: {NAME}: BF16 and ")
    assert printed[-2].endswith(", more than quantising loses")
    assert printed[-1].startswith(f"of 30 tensors 9 are equal, bit by bit, 20 within what {kind} loses (")
    assert printed[-1].endswith("), 1 differ")


@pytest.mark.parametrize("shape", [GQA, ODD])
def test_divided_anew_at_the_start_or_refused_with_the_command(tmp_path: Path, shape: Shape) -> None:
    hf = make_llama(tmp_path / "hf", shape, 2)
    convert(hf, tmp_path / "q1", Target("sluice", quantize="int8"))
    convert(hf, tmp_path / "q", Target("sluice", tp=4, pp=2, quantize="int8"))
    with pytest.raises(UnsupportedModel) as refused:
        native(tmp_path / "q")
    assert f"sluice convert {tmp_path}/q {tmp_path}/q-tp1-pp1 --to sluice --tp 1 --pp 1`" in str(
        refused.value
    )
    prompts = prompts_for(shape.vocab, 3, 9)
    mapped, divided = native(tmp_path / "q1"), native(tmp_path / "q", reshard=True)
    assert generate(divided, prompts, 12) == generate(mapped, prompts, 12)


def test_a_damaged_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 2)
    convert(hf, tmp_path / "q", Target("sluice", tp=2, quantize="int8"))
    path = tmp_path / "q" / "tp1-of-2" / "pp0-of-1.safetensors"
    tensors = load_file(path)
    del tensors[f"{NAME}_scale"]
    save_file(tensors, path, metadata={"sluice_rank": "tp1-of-2/pp0-of-1.safetensors"})
    with pytest.raises(BadCheckpoint, match=rf"{NAME}_scale: missing"):
        open_checkpoint(tmp_path / "q")
    with pytest.raises(BadCheckpoint, match=rf"{NAME}_scale: missing"):
        native(tmp_path / "q", reshard=True)


def test_int8_without_scales_is_another_tools(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 2)
    tensors = load_file(hf / "model.safetensors")
    tensors[NAME] = tensors[NAME].to(torch.int8)
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(BadCheckpoint, match="is I8 without scales"):
        open_checkpoint(hf)
