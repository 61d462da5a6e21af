"""Decoding against the bandwidth bound of one device: `python -m tests.bench.bench_gpu --work DIR`.

Makes a model with random weights where it runs (Llama-3-8B's shape, bf16), decodes greedily at a context
of 1,024 tokens through the real runner, and compares a step with the time that reading the weights and the
K/V takes at the device's measured copy bandwidth. Rehearse on a CPU with `--device cpu --shape tiny`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from engines.base import Engine
from engines.config import ModelConfig
from engines.native import NativeEngine
from engines.runtime import kv_cache
from engines.runtime.mesh import single
from engines.runtime.plan import RowSampling, RowUse, StepKind, StepPlan
from engines.runtime.runner import ModelRunner
from engines.wire import SamplingParams
from tests.models import LLAMA3_8B, TINY, Shape, make_llama

SHAPES = {"llama-3-8b": LLAMA3_8B, "tiny": TINY}
CONTEXT = 1024
GREEDY = SamplingParams(temperature=0.0)


def copy_bandwidth(device: torch.device, num_bytes: int = 1 << 30) -> float:
    """Bytes per second, read and written ones counted, median of ten copies."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median(timed(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * num_bytes / seconds


def timed(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decode_plan(batch: int, context: int, block_size: int, blocks_per_seq: int) -> StepPlan:
    """One token of each of `batch` sequences whose context, that token included, is `context` long."""
    sequence = np.arange(batch, dtype=np.int32)
    tables = sequence[:, None] * blocks_per_seq + np.arange(blocks_per_seq, dtype=np.int32)
    last = context - 1
    return StepPlan(
        kind=StepKind.RUN,
        input_ids=np.full(batch, 17, np.int32),
        positions=np.full(batch, last, np.int32),
        slot_mapping=tables[:, last // block_size] * block_size + last % block_size,
        query_start=np.arange(batch + 1, dtype=np.int32),
        context_lens=np.full(batch, context, np.int32),
        slots=sequence,
        logit_rows=sequence,
        row_use=np.full(batch, RowUse.SAMPLE, np.int32),
        block_tables=tables[:, : -(-context // block_size)],
        sampling=(RowSampling(GREEDY),) * batch,
    )


def step_seconds(engine: Engine, config: ModelConfig, device: torch.device, batch: int, steps: int) -> float:
    """The median time of a decode step, the context growing by a token each."""
    assert engine.kv_spec is not None
    blocks_per_seq = -(-(CONTEXT + steps + 8) // config.kv_block_size)
    caches = kv_cache.allocate(engine.kv_spec, batch * blocks_per_seq, config.kv_block_size)
    runner = ModelRunner(engine, single(device), caches, batch)
    times = []
    for i in range(steps + 8):
        plan = decode_plan(batch, CONTEXT + i, config.kv_block_size, blocks_per_seq)
        times.append(timed(lambda plan=plan: runner.execute(plan), device))  # type: ignore[misc]
    return median(times[8:])


def weight_bytes(shape: Shape, model: Path) -> int:
    """What a token reads of the weights: all but an embedding table that is not the head too."""
    total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return total - (0 if shape.tied else shape.vocab * shape.hidden * 2)


def measure(name: str, args: argparse.Namespace) -> list[dict[str, object]]:
    shape, device = SHAPES[name], torch.device(args.device)
    model = args.work / name
    if not (model / "config.json").exists():
        make_llama(model, shape, dtype=torch.bfloat16, shard_bytes=4 << 30)
    block_size = 256 if device.type == "cuda" else 16
    config = ModelConfig(
        model_name=name,
        served_model_names=(name,),
        model_path=str(model),
        dtype="bfloat16",
        device=device.type,  # type: ignore[arg-type]
        kv_block_size=block_size,
    )
    bandwidth = copy_bandwidth(device)
    engine = NativeEngine(config, single(device), lambda *_: None)
    rows: list[dict[str, object]] = []
    for batch in args.batch:
        seconds = step_seconds(engine, config, device, batch, args.steps)
        kv_bytes = batch * CONTEXT * engine.kv_spec.bytes_per_token()
        bound = (weight_bytes(shape, model) + kv_bytes) / bandwidth
        rows.append(
            {
                "shape": name,
                "batch": batch,
                "context": CONTEXT,
                "step_ms": round(1e3 * seconds, 3),
                "bound_ms": round(1e3 * bound, 3),
                "of_bound": round(bound / seconds, 3),
                "tokens_per_s": round(batch / seconds, 1),
                "copy_gb_per_s": round(bandwidth / 1e9, 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the model is made (16 GB)")
    parser.add_argument("--shape", default="llama-3-8b", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; rehearse with --device cpu --shape tiny")
    with torch.inference_mode():
        rows = measure(args.shape, args)
    on_gpu = args.device == "cuda"
    record = {
        "command": f"python -m tests.bench.bench_gpu --shape {args.shape} --device {args.device}",
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "results": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
