"""Our kernels against torch: each linear, and whole layers against the modules that they stand in for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from conversion.plan import Target
from engines.base import UnsupportedModel
from engines.kernels import build, library
from engines.models import kernel_layers, layers
from engines.models.layers import MOST_ROWS, KernelLinear, PlainLinear, RMSNorm
from engines.native import NativeEngine
from engines.runtime import cpu
from engines.runtime.context import ForwardContext, forward_context
from tests.conversion.helpers import convert
from tests.engines.driver import Driver, Row, make_batch, native
from tests.engines.test_native import prompts_for
from tests.models import ODD, Shape, make_llama

KERNELS = library.load()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no kernels for this machine; the log says why")

HAS_VNNI = build._processor_flags() >= {"avx512_bf16", "avx512_vnni"}
VOCAB = 250  # of the smallest model, nearly
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of them for any work."""
    monkeypatch.setattr(library, "_BYTES_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without instructions for it, where the kernels are used for it."""
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_n", "num_k"), [(64, 64), (37, 96), (1, 4096), (130, 2080), (3, 32)])
def test_linear_is_exact_to_rounding(dtype: torch.dtype, num_n: int, num_k: int, is_int8: bool) -> None:
    weight, bias = random(num_n, num_k, dtype=dtype), random(num_n, dtype=dtype, seed=1)
    scale = None
    if is_int8:
        weight, scale = (
            (40 * weight).clamp(-127, 127).to(torch.int8),
            random(num_n, dtype=torch.float32).abs() / 40,
        )
    exact_weight = weight.double() if scale is None else weight.double() * scale.double().unsqueeze(1)
    # in bfloat16 the values come in 16 bits with a scale, of the largest; int8 weights are up to 127 / 40
    tolerance = 4e-4 if is_int8 and dtype == torch.bfloat16 else 4e-6
    for num_rows in (1, 2, 3, 4, 5, 7, 11, 16, 24, 33, 150):
        x = random(num_rows, num_k, dtype=dtype, seed=num_rows)
        for used in (None, bias):
            exact = x.double() @ exact_weight.T + (0 if used is None else used.double())
            got = linear(weight, x, bias=used, scale=scale).double()
            torch.testing.assert_close(got, exact, rtol=torch.finfo(dtype).eps, atol=tolerance * num_k**0.5)


@pytest.mark.skipif(not HAS_VNNI, reason="by no instruction of this processor")
@pytest.mark.parametrize(("num_n", "num_k"), [(64, 64), (37, 704), (1, 4096), (130, 2112)])
@pytest.mark.parametrize("num_rows", [16, 24, 33, 150])
def test_many_rows_in_8_bits_are_rounded_once(num_n: int, num_k: int, num_rows: int) -> None:
    weight = (40 * random(num_n, num_k, dtype=torch.float32)).clamp(-127, 127).to(torch.int8)
    scale, bias = random(num_n, dtype=torch.float32).abs() / 40, random(num_n, dtype=torch.bfloat16, seed=1)
    x = random(num_rows, num_k, dtype=torch.bfloat16, seed=2)
    x[3, 5], x[4] = 300, 0  # a block that it leaves little of, and a row without a largest number
    rounded = torch.cat([_in_8_bits(block) for block in x.float().split(256, dim=1)], dim=1)
    exact = rounded @ (weight.double() * scale.double().unsqueeze(1)).T + bias.double()
    got = linear(weight, x, bias=bias, scale=scale, keeps_rows=False).double()
    torch.testing.assert_close(got, exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-3)
    few = linear(weight, x[:15], bias=bias, scale=scale, keeps_rows=False)
    assert torch.equal(few, linear(weight, x[:15], bias=bias, scale=scale))
    x[0, 17] = torch.nan
    got = linear(weight, x, scale=scale, keeps_rows=False)
    assert got[0].isnan().all()
    assert got[1:].isfinite().all()


def _in_8_bits(block: Tensor) -> Tensor:
    """Each row of it as 127ths of its largest number; by float32's factor, for ties are many."""
    most = block.abs().amax(dim=1, keepdim=True)
    factor = torch.where(most > 0, torch.full_like(most, 127) / most, 0)
    return (block * factor).round().double() * most / 127


CAN_PACK = KERNELS is not None and KERNELS._can_pack


@pytest.mark.skipif(not CAN_PACK, reason="by no instruction of this processor")
@pytest.mark.parametrize(("num_n", "num_k"), [(64, 64), (37, 704), (5, 4096), (130, 2112)])
def test_packed_weights_are_what_they_were(num_n: int, num_k: int) -> None:
    assert KERNELS is not None
    weight, bias = random(num_n, num_k, dtype=torch.bfloat16), random(num_n, dtype=torch.bfloat16, seed=1)
    weight[0] *= 1e-35  # not far from the smallest that there are
    weight[1] *= 1e30
    weight[2, 3], weight[2, 5], weight[3, 0], weight[4, -1] = 0.0, -0.0, -1e-8, 1e-40
    for plain in (library.Weight(weight), library.Weight(weight, bias)):
        packed = KERNELS.pack(plain)
        assert packed is not None
        assert packed.patches is not None
        assert len(packed.patches[1]) >= 4
        assert packed.weight.nbytes == weight.nbytes * 3 // 4
        for num_rows in (1, 3, 8, 9, 16, 23, 24, 33, 150):
            x = random(num_rows, num_k, dtype=torch.bfloat16, seed=num_rows)
            exact = x.double() @ weight.double().T + (0 if plain.bias is None else bias.double())
            got = KERNELS.linear(packed, x)
            for row in range(num_n):  # each as large as its own numbers
                size = float(weight[row].abs().max())
                torch.testing.assert_close(
                    got[:, row].double(),
                    exact[:, row],
                    rtol=torch.finfo(torch.bfloat16).eps,
                    atol=1e-6 * size * num_k**0.5,
                )
            few = KERNELS.linear(packed, x, is_deterministic=True)
            assert torch.equal(few[:1], KERNELS.linear(packed, x[:1]))


@pytest.mark.skipif(not CAN_PACK, reason="by no instruction of this processor")
def test_rows_of_zeros_are_packed_without_patches() -> None:
    """As of a vocabulary that was filled up."""
    assert KERNELS is not None
    weight, bias = random(50, 128, dtype=torch.bfloat16), random(50, dtype=torch.bfloat16, seed=1)
    weight[::3] = 0
    weight[6] = -0.0
    packed = KERNELS.pack(library.Weight(weight, bias))
    assert packed is not None
    for num_rows in (1, 30):
        x = random(num_rows, 128, dtype=torch.bfloat16, seed=num_rows)
        got = KERNELS.linear(packed, x)
        assert torch.equal(got[:, ::3], bias[::3].expand(num_rows, -1))
        torch.testing.assert_close(got, F.linear(x, weight, bias))


@pytest.mark.skipif(not CAN_PACK, reason="by no instruction of this processor")
def test_what_cannot_be_packed_stays_as_it_is() -> None:
    assert KERNELS is not None
    weight = random(40, 128, dtype=torch.bfloat16)
    assert KERNELS.pack(library.Weight(weight)) is not None
    for value in (torch.inf, torch.nan):
        odd = weight.clone()
        odd[3, 5] = value
        assert KERNELS.pack(library.Weight(odd)) is None
    sparse = weight.clone()
    sparse[:, ::8] = 0
    others = (sparse, weight[:, :96].contiguous(), weight[:, 64:], weight.float(), weight.to(torch.int8))
    assert all(KERNELS.pack(library.Weight(other)) is None for other in others)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_linear_depends_on_no_other(dtype: torch.dtype) -> None:
    weight, x = random(70, 4128, dtype=dtype), random(32, 4128, dtype=dtype, seed=1)
    alone = torch.cat([linear(weight, row.unsqueeze(0)) for row in x])
    x[5] = torch.nan
    for num_rows in (2, 3, 4, 31, 32):  # of them from 16 on are multiplied in another way, else
        got = linear(weight, x[:num_rows], is_deterministic=True)
        same = [row for row in range(num_rows) if row != 5]
        assert torch.equal(got[same], alone[same])
        assert num_rows <= 5 or got[5].isnan().all()


def linear(weight: Tensor, x: Tensor, *, is_deterministic: bool = False, **others: Any) -> Tensor:
    assert KERNELS is not None
    return KERNELS.linear(library.Weight(weight, **others), x, is_deterministic=is_deterministic)


@pytest.mark.parametrize("num_rows", [1, 40, 150])
@pytest.mark.parametrize(
    "is_packed",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not CAN_PACK, reason="by no instruction of this processor")
        ),
    ],
)
def test_in_float32_are_the_same_numbers(num_rows: int, is_packed: bool) -> None:
    assert KERNELS is not None
    weight = library.Weight(random(37, 128, dtype=torch.bfloat16), random(37, dtype=torch.bfloat16, seed=1))
    used = KERNELS.pack(weight) if is_packed else weight
    assert used is not None
    x = random(num_rows, 128, dtype=torch.bfloat16, seed=2)
    found = KERNELS.linear(used, x, dtype=torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, KERNELS.linear(used, x).float())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("num_rows", [1, 20])
def test_what_is_not_finite_stays_so_in_16_bits(value: float, num_rows: int) -> None:
    weight, scale = torch.ones(24, 64, dtype=torch.int8), torch.ones(24)
    x = random(num_rows, 64, dtype=torch.bfloat16)
    x[0, 17] = value
    got = linear(weight, x, scale=scale)
    assert not got[0].isfinite().any()
    assert got[1:].isfinite().all()
    assert torch.equal(linear(weight, torch.zeros_like(x), scale=scale), torch.zeros_like(got))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_norm_is_exact_to_rounding(dtype: torch.dtype, num_rows: int) -> None:
    x, weight = random(num_rows, 96, dtype=dtype), random(96, dtype=dtype, seed=1)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    norm = RMSNorm(weight, 1e-5)
    assert norm._kernels is not None
    torch.testing.assert_close(norm(x).double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def test_little_work_is_one_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.set_num_threads(3)
    assert library.threads_for(4 << 20, 1) == 1
    assert library.threads_for(4 << 20, 8) == 3
    assert library.threads_for(6 << 20, 1) == 2
    assert library.threads_for(1 << 30, 1) == 3


@pytest.mark.parametrize("num_rows", [1, 9, 40])
def test_each_part_of_the_work_is_done_once(num_rows: int) -> None:
    """By whoever takes it: here threads that have to share too few cores."""
    weight, x = random(301, 96, dtype=torch.bfloat16), random(num_rows, 96, dtype=torch.bfloat16, seed=1)
    expected = linear(weight, x)
    assert all(torch.equal(linear(weight, x), expected) for _ in range(500))


def test_helpers_leave_their_cores_to_others() -> None:
    linear(random(301, 96, dtype=torch.float32), random(3, 96, dtype=torch.float32))
    policies = [os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert (os.SCHED_IDLE in policies) or torch.get_num_threads() == 1


def test_many_rows_are_left_to_another_linear() -> None:
    assert KERNELS is not None
    weight, x = random(40, 64, dtype=torch.float32), random(MOST_ROWS // 3 + 1, 3, 64, dtype=torch.float32)
    marked = PlainLinear(weight + 1, None)
    few = KernelLinear(KERNELS, library.Weight(weight), many=marked)
    assert torch.equal(few(x), marked(x))
    torch.testing.assert_close(few(x[:10]), x[:10] @ weight.T)
    pieces = KernelLinear(KERNELS, library.Weight(weight))
    torch.testing.assert_close(pieces(x), x @ weight.T)


SHAPES = {
    "mha": Shape(hidden=64, layers=2, heads=2, kv_heads=2, head_dim=32, ffn=96, vocab=256),
    "group of 2": Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=64, ffn=128, vocab=256),
    "group of 4": Shape(hidden=96, layers=3, heads=8, kv_heads=2, head_dim=32, ffn=160, vocab=301),
    "group of 7": Shape(hidden=64, layers=2, heads=7, kv_heads=1, head_dim=64, ffn=128, vocab=256),
    "biases": Shape(
        hidden=64,
        layers=2,
        heads=6,
        kv_heads=2,
        head_dim=32,
        ffn=64,
        vocab=256,
        extra={"attention_bias": True, "mlp_bias": True},
    ),
}


BFLOAT16_TOLERANCE = 6e-2
"""Of logits. Both ways are about 1.2 % off those of float32."""


class Both:
    """One model by the kernels and by its modules, fed the same tokens."""

    def __init__(self, directory: Path, dtype: str, stale: float = 0.0, **settings: Any) -> None:
        self.engines = [native(directory, dtype=dtype, **settings) for _ in range(2)]
        by_kernels, by_modules = self.engines
        assert by_kernels._model.kernel_layers is not None
        by_modules._model.kernel_layers = None
        self.drivers = [Driver(engine, num_blocks=64, block_size=4) for engine in self.engines]
        for driver in self.drivers:
            for cache in driver.caches:
                cache.data.fill_(stale)  # what earlier owners left
        self.rows: list[list[Row]] = [[], []]

    def add(self, *lengths: int) -> None:
        for prompt in prompts_for(VOCAB, *lengths):
            for driver, rows in zip(self.drivers, self.rows, strict=True):
                rows.append(driver.add(prompt, 24))

    def step(self, chunk: int) -> tuple[Tensor, Tensor]:
        """The logits of both; then both go on with the token of the second."""
        found = [driver.step(rows, chunk) for driver, rows in zip(self.drivers, self.rows, strict=True)]
        for ours, theirs in zip(*self.rows, strict=True):
            ours.token_ids[:] = theirs.token_ids
        assert found[0] is not None
        assert found[1] is not None
        return found[0], found[1]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", BFLOAT16_TOLERANCE)])
def test_layers_do_what_their_modules_do(tmp_path: Path, shape: Shape, dtype: str, tolerance: float) -> None:
    """Prompts of several lengths in chunks, beside sequences that decode."""
    both = Both(make_llama(tmp_path, shape, seed=2), dtype, stale=0.5)
    both.add(1, 9)
    for _ in range(4):
        torch.testing.assert_close(*both.step(3), rtol=tolerance, atol=tolerance)
    both.add(22, 4, 40)
    for _ in range(10):
        torch.testing.assert_close(*both.step(6), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(both.drivers[0].caches, both.drivers[1].caches, strict=True):
        torch.testing.assert_close(ours.data, theirs.data, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["mha", "group of 7"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", BFLOAT16_TOLERANCE)])
def test_long_prompts_by_tiles_of_tokens(tmp_path: Path, name: str, dtype: str, tolerance: float) -> None:
    """Of many keys and many tokens, none of which a tile has in whole numbers, beside one that decodes."""
    both = Both(make_llama(tmp_path, SHAPES[name], seed=2), dtype, stale=float("nan"))
    both.add(3)
    both.step(3)
    both.add(103, 67)
    for _ in range(4):
        torch.testing.assert_close(*both.step(61), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", BFLOAT16_TOLERANCE)])
def test_int8_layers_do_what_their_modules_do(tmp_path: Path, dtype: str, tolerance: float) -> None:
    source = make_llama(tmp_path / "hf", SHAPES["biases"], seed=2)
    convert(source, tmp_path / "int8", Target("sluice", quantize="int8"))
    both = Both(tmp_path / "int8", dtype)
    assert both.engines[0]._model.kernel_layers._runs[0][0] == torch.int8  # type: ignore[union-attr]
    both.add(1, 9)
    for _ in range(6):
        torch.testing.assert_close(*both.step(3), rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not HAS_VNNI, reason="by no instruction of this processor")
def test_the_engine_keeps_rows_where_it_is_told_to(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", SHAPES["group of 2"], seed=2)
    convert(source, tmp_path / "int8", Target("sluice", quantize="int8"))
    kept, rounded = (Both(tmp_path / "int8", "bfloat16", int8_activations=has) for has in (False, True))
    found = []
    for both in (kept, rounded):
        both.add(40)
        ours, modules = both.step(40)
        torch.testing.assert_close(ours, modules, rtol=BFLOAT16_TOLERANCE, atol=BFLOAT16_TOLERANCE)
        found.append(ours)
    error = float((found[1] - found[0]).norm() / found[0].norm())
    assert 0.005 < error < 0.05


@pytest.mark.skipif(not CAN_PACK, reason="by no instruction of this processor")
@pytest.mark.parametrize("kind", ["hf", "sluice"])
def test_packed_layers_answer_as_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The second of three layers cannot be packed: too many of its numbers are zeros."""
    monkeypatch.setattr(layers, "_LEAST_PACKED", 1)
    shape = Shape(hidden=64, layers=3, heads=4, kv_heads=2, head_dim=64, ffn=128, vocab=256)
    root = make_llama(tmp_path / "hf", shape, seed=2)
    tensors = load_file(root / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][:, ::8] = 0
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    if kind == "sluice":
        convert(root, tmp_path / "sluice", Target("sluice", dtype="BF16"))
        root = tmp_path / "sluice"
    found = []
    for packs in (False, True):
        both = Both(root, "bfloat16", pack_weights=packs)
        both.add(1, 9, 40)
        found.append([torch.cat(both.step(chunk)) for chunk in (40, 1, 1)])
        runs = both.engines[0]._model.kernel_layers._runs  # type: ignore[union-attr]
        assert [len(layers) for _, layers in runs] == ([1, 1, 1] if packs else [3])
    for plain, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, plain, rtol=BFLOAT16_TOLERANCE, atol=BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("by_kernels", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", BFLOAT16_TOLERANCE)])
def test_the_last_layer_leaves_out_what_nobody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float, by_kernels: bool
) -> None:
    """But for keys and values, which are the same to the bit. Some pieces have no row that is read."""
    monkeypatch.setattr(kernel_layers, "_AT_ONCE", 32)
    engine = native(make_llama(tmp_path, SHAPES["group of 4"], seed=2), dtype=dtype)
    if not by_kernels:
        engine._model.kernel_layers = None
    hidden, caches = [], []
    for reads_all in (True, False):
        driver = Driver(engine, num_blocks=128, block_size=4)
        for cache in driver.caches:
            cache.data.zero_()
        rows = [driver.add(prompt, 8) for prompt in prompts_for(VOCAB, 3, 150, 40, 1, 9)]
        batch = replace(make_batch(rows, [3, 150, 40, 1, 9], 4), reads_all=reads_all)
        with torch.inference_mode(), forward_context(ForwardContext(batch, driver.caches)):
            hidden.append(engine.forward(batch))
        caches.append([cache.data for cache in driver.caches])
    assert all(torch.equal(*both) for both in zip(*caches, strict=True))
    is_read = torch.zeros(len(hidden[0]), dtype=torch.bool)
    is_read[batch.logit_rows] = True
    torch.testing.assert_close(hidden[1][is_read], hidden[0][is_read], rtol=tolerance, atol=tolerance)
    assert not any(torch.equal(*both) for both in zip(hidden[1][4:100], hidden[0][4:100], strict=True))


def test_nothing_stale_is_read_or_left(tmp_path: Path) -> None:
    """A block's first token clears it for the other way of attention, which reads whole blocks."""
    both = Both(make_llama(tmp_path, SHAPES["mha"]), "float32", stale=float("nan"))
    both.add(2, 3)
    both.step(1)
    used = [row.blocks[0] for row in both.rows[0]]
    assert not both.drivers[0].caches[1].data[used].isnan().any()
    both.drivers[0].engine._model.kernel_layers = None  # type: ignore[attr-defined]
    for _ in range(6):
        ours, theirs = both.step(1)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_gets_what_it_gets_alone(tmp_path: Path, dtype: str) -> None:
    """To the bit, as long as a step is of few tokens."""
    engine = native(make_llama(tmp_path, SHAPES["group of 4"]), dtype=dtype)
    alone = _logits_of(engine, [13])
    assert torch.equal(_logits_of(engine, [13, 5, 1, 9, 2]), alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_nothing_else_has_a_say(tmp_path: Path, dtype: str) -> None:
    """Neither who is in the batch, nor how many, nor how a prompt is cut into steps: all to the bit."""
    directory = make_llama(tmp_path, SHAPES["group of 4"])
    engine = native(directory, dtype=dtype, deterministic=True)
    [prompt, *others] = prompts_for(VOCAB, 75, 3, 40, 90, 1)
    crowd = prompts_for(VOCAB, *range(1, 50))  # so many that a thread attends with all heads at once
    alone = _decoded(engine, [prompt], chunk=80)
    assert torch.equal(_decoded(engine, [prompt, *crowd], chunk=80), alone)
    assert torch.equal(_decoded(engine, [prompt], chunk=7), alone)
    assert torch.equal(_decoded(engine, [prompt, *others], chunk=33), alone)
    assert torch.equal(_decoded(engine, [prompt, *others], chunk=80), alone)


def test_deterministic_is_refused_where_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Shape(hidden=64, layers=1, heads=4, kv_heads=1, head_dim=26, ffn=96, vocab=257)
    with pytest.raises(UnsupportedModel, match=r"deterministic: true needs .* torch.float32 with 104 inputs"):
        native(make_llama(tmp_path / "odd", odd), deterministic=True)
    directory = make_llama(tmp_path / "even", SHAPES["mha"])
    with pytest.raises(UnsupportedModel, match=r"deterministic: true .* torch\.float16"):
        native(directory, dtype="float16", deterministic=True)
    monkeypatch.setattr(library, "_load", lambda: "cannot be had: no compiler")
    with pytest.raises(UnsupportedModel, match="cannot be had: no compiler; remove it"):
        native(directory, deterministic=True)


def _decoded(engine: NativeEngine, prompts: list[list[int]], chunk: int) -> Tensor:
    """The logits of the first prompt's next five tokens."""
    driver = Driver(engine, num_blocks=512, block_size=4)
    rows = [driver.add(prompt, 8) for prompt in prompts]
    found = []
    while len(rows[0].generated) < 5:
        before = len(rows[0].generated)
        logits = driver.step(rows, chunk)
        if len(rows[0].generated) > before:
            assert logits is not None
            found.append(logits[0])
    return torch.stack(found)


def _logits_of(engine: NativeEngine, lengths: list[int]) -> Tensor:
    """Of the first sequence, over some steps."""
    driver = Driver(engine, num_blocks=64, block_size=4)
    rows = [driver.add(prompt, 8) for prompt in prompts_for(VOCAB, *lengths)]
    found = [driver.step(rows, 3) for _ in range(10)]
    return torch.stack([logits[0] for logits in found if logits is not None])


def test_a_large_step_goes_through_the_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = native(make_llama(tmp_path, SHAPES["mha"]))
    few = engine._model.kernel_layers
    assert few is not None
    few.takes_all = False  # as with AMX
    taken = []
    run = few.run
    monkeypatch.setattr(few, "run", lambda hidden: taken.append(len(hidden)) or run(hidden))
    driver = Driver(engine, num_blocks=64, block_size=4)
    row = driver.add(list(range(2, 2 + MOST_ROWS + 2)), 4)
    driver.step([row], MOST_ROWS + 1)
    driver.step([row], MOST_ROWS)
    assert taken == [1]


def test_shapes_that_do_not_fit_are_left_to_torch(tmp_path: Path) -> None:
    assert native(make_llama(tmp_path, ODD))._model.kernel_layers is None
