"""The model that all are measured with: made, loaded, and what a step of it reads and multiplies."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from engines.native import NativeEngine
from engines.runtime.mesh import single
from tests.bench.gpu.bench import Bench
from tests.bench.gpu.options import Options
from tests.bench.gpu.timing import timed
from tests.engines.driver import native
from tests.models import Shape, make_llama

DTYPE = torch.bfloat16
_SHARD_BYTES = 4 << 30


def make(bench: Bench) -> None:
    """The section: so that the time is seen."""
    bench.put("gb_of_weights", round(DTYPE.itemsize * num_weights(bench.options.shape) / 1e9, 2))
    bench.put("made_in_s", round(timed(lambda: model_of(bench.options), bench.device), 1))


def model_of(options: Options, *, has_own_kv_heads: bool = False) -> Path:
    """A model of the shape, with a tokenizer, made on the device unless it is there; `has_own_kv_heads`: with
    keys and values for each query head."""
    shape, name = options.shape, options.shape_name
    if has_own_kv_heads and shape.kv_heads < shape.heads:
        shape, name = replace(shape, kv_heads=shape.heads), f"{name}-mha"
    directory = options.work / name
    if not directory.exists():
        part = options.work / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)  # of one that was ended
        make_llama(part, shape, dtype=DTYPE, tokenizer=True, shard_bytes=_SHARD_BYTES, device=options.device)
        part.rename(directory)
    return directory


def load(directory: Path, device: torch.device) -> NativeEngine:
    return native(directory, single(device), dtype="bfloat16")


@contextmanager
def plain_modules(engine: NativeEngine) -> Iterator[None]:
    """Within, its layers are torch's operations one by one, as on a device for which there are no kernels."""
    model = engine._model
    fused, kernels = model.fused_layers, model.kernel_layers
    model.fused_layers = model.kernel_layers = None
    try:
        yield
    finally:
        model.fused_layers, model.kernel_layers = fused, kernels


def layer_weights(shape: Shape) -> int:
    """Numbers in the linears of all layers."""
    heads = 2 * shape.heads + 2 * shape.kv_heads  # query and output; key and value
    return shape.layers * shape.hidden * (heads * shape.head_dim + 3 * shape.ffn)


def head_weights(shape: Shape) -> int:
    return shape.vocab * shape.hidden


def num_weights(shape: Shape) -> int:
    """In the files, norms not counted."""
    return layer_weights(shape) + head_weights(shape) * (1 if shape.tied else 2)


def kv_bytes(shape: Shape) -> int:
    """Of one token, over all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * DTYPE.itemsize


def attention_flops(shape: Shape, num_pairs: float) -> float:
    """Of all layers, for so many pairs of a query and a key that it sees: two products of two operations."""
    return 4.0 * shape.layers * shape.heads * shape.head_dim * num_pairs
