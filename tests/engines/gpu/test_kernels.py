"""Each kernel against the same in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.gpu.activation import silu_mul
from engines.gpu.cut import cut
from engines.gpu.decode_attention import decode_attention, num_parts
from engines.gpu.fp8 import LARGEST, fp8_linear, quantize_rows
from engines.gpu.norm import add_rms_norm, rms_norm
from engines.gpu.rotary import rotate_and_write
from engines.gpu.weight_only import weight_only, widen
from engines.models.config import Rope
from engines.models.layers import Rotary
from engines.runtime import sampler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
EPS = 1e-5


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def near(actual: Tensor, expected: Tensor) -> None:
    """As near as the dtype can be, to what was computed in float32."""
    tolerance = 2e-5 if actual.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [48, 64])
def test_norms(hidden: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 5, hidden, device=DEVICE).to(dtype)
    weight = torch.randn(hidden, device=DEVICE).to(dtype)
    near(rms_norm(x, weight, EPS), F.rms_norm(x.float(), (hidden,), weight.float(), EPS))
    total = x + residual
    normed = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    near(normed, F.rms_norm(total.float(), (hidden,), weight.float(), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = torch.randn(3, 2 * 1_030, device=DEVICE).to(dtype)  # more than one program a row
    gate, up = gate_up.float().chunk(2, -1)
    near(silu_mul(gate_up), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 24])
def test_rotation_and_write(head_dim: int, dtype: torch.dtype) -> None:
    heads, kv_heads, positions = 4, 2, torch.tensor([3, 0, 9], device=DEVICE)
    rotary = Rotary(Rope(10_000.0), head_dim, 16, dtype, torch.device(DEVICE))
    qkv = torch.randn(3, (heads + 2 * kv_heads) * head_dim, device=DEVICE).to(dtype)
    slots = torch.tensor([7, 2, 11], device=DEVICE)
    keys, values = torch.zeros(2, 12, kv_heads, head_dim, device=DEVICE).to(dtype)
    query = rotate_and_write(qkv, rotary.cos, rotary.sin, positions, slots, keys, values)
    expected = qkv.float().view(3, -1, head_dim)
    cos, sin = rotary.rows(positions)
    rotary.turn(expected[:, : heads + kv_heads], cos.float(), sin.float())
    near(query, expected[:, :heads])
    near(keys[slots], expected[:, heads : heads + kv_heads])
    assert torch.equal(values[slots].float(), expected[:, heads + kv_heads :])
    others = [i for i in range(12) if i not in slots.tolist()]
    assert not keys[others].any()
    assert not values[others].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 3, 24), (20, 1, 16)])
@pytest.mark.parametrize("block_size", [8, 64])
def test_decode_attention(
    heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    """Parts without tokens, of one tile and of several; tiles of one block and of several."""
    contexts = [1, 37, 900]
    tables = torch.randperm(3 * 120, device=DEVICE).view(3, 120).to(torch.int32)
    pages = torch.full((2, 360, block_size, kv_heads, head_dim), torch.nan, device=DEVICE).to(dtype)
    for table, context in zip(tables.tolist(), contexts, strict=True):
        for position in range(context):
            row = torch.randn(2, kv_heads, head_dim, device=DEVICE)
            pages[:, table[position // block_size], position % block_size] = row.to(dtype)
    query = torch.randn(3, heads, head_dim, device=DEVICE).to(dtype)
    lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    out = decode_attention(query, pages[0], pages[1], tables, lens, 0.3)
    for i, context in enumerate(contexts):
        key, value = pages[:, tables[i].long()].flatten(1, 2)[:, :context].float().transpose(1, 2)
        expected = F.scaled_dot_product_attention(
            query[i].float().unsqueeze(1)[None], key[None], value[None], scale=0.3, enable_gqa=True
        )
        near(out[i], expected[0, :, 0])


def test_contexts_are_cut_where_few_would_leave_the_device_idle() -> None:
    assert num_parts(1, 8) == 32
    assert num_parts(8, 8) == 16
    assert num_parts(256, 8) == 8, "one long context among many is still read by several programs"


def test_cuts_are_those_of_a_sorted_vocabulary() -> None:
    probs = (torch.randn(8, 5_000) * 2).softmax(-1)
    probs[6, 100:] = 0.0  # most of it is nothing
    probs[7] = 1 / 5_000  # all alike
    top_k, top_p = [0, 5, 5_000, 40, 1, 0, 200, 3], [0.9, 1.0, 0.5, 0.8, 0.3, 0.999, 1.0, 0.5]
    expected = (probs >= sampler._cut(probs, top_k, top_p)) & (probs > 0)
    sizes = torch.tensor([k or 5_000 for k in top_k], dtype=torch.int32, device=DEVICE)
    found = cut(probs.to(DEVICE), sizes, torch.tensor(top_p, device=DEVICE))
    assert torch.equal((probs >= found.cpu()) & (probs > 0), expected)
    assert expected.sum(-1).tolist()[1::6] == [5, 5_000]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("num_rows", [1, 17, 70])
@pytest.mark.parametrize("has_bias", [False, True])
def test_weight_only(num_rows: int, has_bias: bool, encoding: torch.dtype, dtype: torch.dtype) -> None:
    weight = (torch.randn(40, 300, device=DEVICE) * 40).clamp(-127, 127).to(encoding)
    scale = torch.rand(40, device=DEVICE) / 100
    bias = torch.randn(40, device=DEVICE).to(dtype) if has_bias else None
    x = torch.randn(num_rows, 300, device=DEVICE).to(dtype)
    expected = x.double() @ (weight.double() * scale.double().unsqueeze(1)).T
    near(weight_only(x, weight, scale, bias), expected if bias is None else expected + bias.double())


def test_widened_weights_hold_their_scale() -> None:
    weight = torch.randint(-127, 128, (3, 1_030), device=DEVICE).to(torch.int8)
    scale = torch.rand(3, device=DEVICE)
    assert torch.equal(widen(weight, scale, torch.float32), weight.float() * scale.unsqueeze(1))


def test_rows_are_quantised_by_their_largest() -> None:
    exact = torch.tensor([[448.0, -104.0, 3.25, 0.0], [-0.875, 0.4375, 0.109375, 0.0]], device=DEVICE)
    values, scale = quantize_rows(exact)
    assert scale.squeeze(1).tolist() == pytest.approx([1.0, 0.875 / LARGEST])
    torch.testing.assert_close(values.float() * scale, exact)


def test_a_row_of_zeros_has_no_scale_of_zero() -> None:
    values, scale = quantize_rows(torch.zeros(1, 8, device=DEVICE))
    assert not values.float().any()
    assert scale.item() > 0


def test_fp8_products() -> None:
    weight = torch.randn(32, 64, device=DEVICE).to(torch.float8_e4m3fn)
    scale = torch.rand(32, device=DEVICE)
    # Of powers of two: Triton's interpreter rounds others to fp8 in a way of its own.
    x = 2.0 ** torch.randint(-3, 4, (5, 64), device=DEVICE).float()
    bias = torch.randn(32, device=DEVICE)
    expected = x @ (weight.float() * scale.unsqueeze(1)).T + bias
    torch.testing.assert_close(fp8_linear(x, weight, scale, bias), expected, rtol=1e-2, atol=1e-1)
