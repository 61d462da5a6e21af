"""A decoding step of the native engine as contexts grow: `python -m tests.bench.bench_context --shape small`.

Sequences of one length decode in bfloat16, on all cores, over K/V filled with random numbers. Reported: the
step's time, what of it grew since the shortest context, and at what rate that read the K/V; beside it the
rates at which weights of 400 MB are read by `linear` at one row and by torch's sum. Medians over the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from engines.kernels import library
from engines.native import NativeEngine
from gateway.bench import machine
from tests.bench.bench_quantized import in_turn
from tests.engines.driver import Driver, native
from tests.models import SHAPES, make_llama

SHORTEST, STEPS, BLOCK_SIZE = 64, 15, 16


def seconds(work: Callable[[], object], count: int = STEPS) -> float:
    return median(in_turn([work], count)[0])


def step_seconds(engine: NativeEngine, batch: int, context: int) -> tuple[float, int]:
    """Of a step, and the bytes of K/V that it reads."""
    blocks = -(-(context + STEPS + 1) // BLOCK_SIZE)
    driver = Driver(engine, num_blocks=batch * blocks, block_size=BLOCK_SIZE)
    for cache in driver.caches:
        cache.data.normal_()
    rows = [driver.add([7] * context, STEPS + 1) for _ in range(batch)]
    for row in rows:
        row.num_computed = context - 1
    return seconds(lambda: driver.step(rows, 1)), batch * context * engine.kv_spec.bytes_per_token()


def bandwidth() -> dict[str, float]:
    """GB/s."""
    weight = torch.randn(100_000, 2048).bfloat16()
    found = {"torch.sum": weight.nbytes / seconds(lambda: weight.view(torch.float32).sum(), 5) / 1e9}
    kernels = library.load()
    if kernels is not None:
        x, operand = torch.randn(1, 2048).bfloat16(), library.Weight(weight)
        found["linear"] = weight.nbytes / seconds(lambda: kernels.linear(operand, x), 5) / 1e9
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    results = []
    with tempfile.TemporaryDirectory() as root:
        shape = replace(SHAPES[args.shape], max_positions=max(args.contexts) + 2 * STEPS)
        engine = native(make_llama(Path(root), shape, dtype=torch.bfloat16), dtype="bfloat16")
        before = bandwidth()
        shortest, least = step_seconds(engine, args.batch, SHORTEST)
        for context in args.contexts:
            taken, read = step_seconds(engine, args.batch, context)
            grown = taken - shortest
            rate = (read - least) / grown / 1e9
            results.append(
                {"context": context, "step_ms": 1e3 * taken, "grown_ms": 1e3 * grown, "kv_gb_per_s": rate}
            )
            print(json.dumps(results[-1]), flush=True)
    record = {
        "command": f"python -m tests.bench.bench_context --shape {args.shape} --batch {args.batch}",
        "machine": machine(),
        "shortest": {"context": SHORTEST, "step_ms": 1e3 * shortest},
        "results": results,
        "gb_per_s": {"before": before, "after": bandwidth()},
    }
    print(json.dumps(record["gb_per_s"]))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
