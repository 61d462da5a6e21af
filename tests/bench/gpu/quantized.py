"""The same engine over weights of one byte: decoding at few sequences, and prompts in fp8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.models.layers import LinearOp
from engines.models.quantized import ENCODINGS, make_quantized_linear
from engines.native import NativeEngine
from tests.bench.gpu import model, prefill
from tests.bench.gpu.bench import Bench
from tests.bench.gpu.decode import Decoder, few, part_of, recorded_steps

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""By encoding, what the largest weight of each output becomes."""
_LINEARS = (("attention", "qkv"), ("attention", "output"), ("mlp", "gate_up"), ("mlp", "down"))


def measure_int8(bench: Bench) -> None:
    _measure(bench, "int8")


def measure_fp8(bench: Bench) -> None:
    _measure(bench, "fp8")


def _measure(bench: Bench, encoding: str) -> None:
    engine, batches, plain_ms = bench.engine(), few(bench.options.batches), recorded_steps(bench)
    decoder = Decoder(bench, engine, max(batches), weight_bytes=1)
    expected = decoder.first_tokens(decoder.runner(is_recorded=False), max(batches))
    with quantized_layers(engine, encoding):
        if encoding == "fp8":
            bench.part("prompt", lambda: _prompt(bench, engine))
        runner = decoder.runner(is_recorded=True)
        for batch in batches:

            def row(batch: int = batch) -> dict[str, Any]:
                own = decoder.row(runner, batch)
                return own | {"times_as_fast_as_bf16": round(plain_ms[batch] / own["step_ms"], 3)}

            bench.part(part_of(batch), row)
        drawn = decoder.first_tokens(runner, max(batches))
        bench.put("first tokens as in bf16", round(float(np.mean(drawn == expected)), 3))


def _prompt(bench: Bench, engine: NativeEngine) -> dict[str, Any]:
    own, plain = prefill.row(bench, engine), bench.of("prefill", "prompt", "seconds")
    return own | ({} if plain is None else {"times_as_fast_as_bf16": round(plain / own["seconds"], 3)})


@contextmanager
def quantized_layers(engine: NativeEngine, encoding: str) -> Iterator[None]:
    """Within, its layers' linears have weights of one byte, quantised on their device; the head has not."""
    llama = engine._model
    kernel_layers, llama.kernel_layers = llama.kernel_layers, None  # they know the weights of the start
    replaced = []
    try:
        for layer in llama.layers:
            for part, name in _LINEARS:
                owner = getattr(layer, part)
                replaced.append((owner, name, getattr(owner, name)))
                setattr(owner, name, quantized(getattr(owner, name), encoding))
        yield
    finally:
        llama.kernel_layers = kernel_layers
        for owner, name, linear in replaced:
            setattr(owner, name, linear)


@torch.inference_mode()
def quantized(linear: LinearOp, encoding: str) -> LinearOp:
    """The same over its weight in that encoding, each output with a scale of its own."""
    weight: Tensor = getattr(linear, "operand", linear).weight  # type: ignore[union-attr]
    wide = weight.float()
    scale = (wide.abs().amax(dim=1) / LARGEST[encoding]).clamp_min(1e-12)
    wide /= scale.unsqueeze(1)
    small = wide.round_() if encoding == "int8" else wide.clamp_(-LARGEST[encoding], LARGEST[encoding])
    return make_quantized_linear(small.to(ENCODINGS[encoding][1]), scale, None, model.DTYPE)
