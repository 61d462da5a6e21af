"""Compiles the kernels for an H100 or H200 as an 8B Llama in bfloat16 launches them; needs no such device.

    python -m tests.engines.gpu.compile_for_hopper

Prints a JSON object: bytes of shared memory of each.
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engines.gpu import activation, cut, decode_attention, fp8, norm, rotary, weight_only

HOPPER = GPUTarget("cuda", 90, 32)
INTS, FLOATS = "*i32", "*fp32"


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> int:
    """Bytes of shared memory. `types`: of the arguments; "T" is those that are not named."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, types["T"]) for name in names}
    never = set(kernel.do_not_specialize)
    is_aligned = {  # as Triton sees it at a launch with such sizes
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name][0] in "*i" and name not in never
    }
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, fixed, is_aligned)
    return int(triton.compile(source, target=HOPPER, options=options).metadata.shared)


def attention(dtype: str, head_dim: int, tile: int) -> int:
    types = {"T": dtype, "block_tables": INTS, "context_lens": INTS, "sums": FLOATS, "marks": FLOATS}
    constants = {"BLOCK_SIZE": 256, "NUM_KV_HEADS": 8, "GROUP": 4, "ROWS": 16, "HEAD_DIM": head_dim}
    constants |= {"BLOCK": head_dim, "TILE": tile, "PARTS": 16, "PART_TILES": decode_attention._PART_TILES}
    types |= {"scale": "fp32", "table_stride": "i32"}
    return compiled(
        decode_attention._attend_part, types, constants, num_warps=4, num_stages=decode_attention._STAGES
    )


def weights(encoding: str, shape: weight_only._Shape) -> int:
    types = {"T": "i32", "x": "*bf16", "weight": encoding, "scale": FLOATS, "bias": "*bf16", "out": "*bf16"}
    constants = {"HAS_BIAS": False, "ROWS": shape.rows, "COLUMNS": shape.columns, "TILE": shape.tile}
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    return compiled(weight_only._weight_only, types, constants, **options)


def main() -> None:
    half = {"T": "*bf16"}
    shared = {
        "add_rms_norm": compiled(
            norm._add_rms_norm,
            half | {"hidden": "i32", "eps": "fp32"},
            {"IS_SUM": True, "BLOCK": 4096},
            num_warps=8,
        ),
        "rotate_and_write": compiled(
            rotary._rotate_and_write,
            half | {"positions": INTS, "slots": "*i64", "row_stride": "i32"},
            {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK": 128},
            num_warps=1,
        ),
        "silu_mul": compiled(activation._silu_mul, half | {"width": "i32"}, {"BLOCK": 1024}),
        "decode_attention, bf16": attention("*bf16", 128, 64),
        "decode_attention, heads of 256": attention("*bf16", 256, 32),
        "decode_attention, float32": attention(FLOATS, 128, 32),
        "join_parts": compiled(
            decode_attention._join_parts,
            {"T": FLOATS, "out": "*bf16"},
            {"HEAD_DIM": 128, "BLOCK": 128, "PARTS": 32},
            num_warps=4,
        ),
        "cut": compiled(
            cut._cut,
            {"T": FLOATS, "top_k": INTS, "size": "i32"},
            {"TILE": cut._TILE},
            num_warps=16,
        ),
        "weight_only, int8, few rows": weights("*i8", weight_only._FEW),
        "weight_only, int8, some rows": weights("*i8", weight_only._SOME),
        "weight_only, int8, many rows": weights("*i8", weight_only._MANY),
        "weight_only, fp8, few rows": weights("*fp8e4nv", weight_only._FEW),
        "widen": compiled(
            weight_only._widen,
            {"T": "*i8", "scale": FLOATS, "out": "*bf16", "num_inputs": "i32"},
            {"TILE": 1024},
        ),
        "quantize_rows": compiled(
            fp8._quantize_rows,
            {"T": "*bf16", "out": "*fp8e4nv", "scale": FLOATS, "width": "i32"},
            {"LARGEST": 448.0, "BLOCK": 16384},
            num_warps=16,
        ),
    }
    print(json.dumps(shared))


if __name__ == "__main__":
    main()
