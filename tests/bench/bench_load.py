"""Memory of a group right after loading, beside its weights.

    python -m tests.bench.bench_load --shape small [--kind qwen3 --layouts pp=2]

Proportional set size (PSS: a page that n processes share counts as 1/n in each) of all ranks together, above
that of as many idle processes, which have imported and joined the same but hold no model. K/V is a few
blocks, so that weights are what is measured. The bound is 1.25 times the weights. `--kind`: a type of
transformers' in place of llama, in float32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import cast

import psutil
import torch

from engines.config import ModelConfig, ParallelType
from gateway.bench import machine
from tests.engines.harness import running
from tests.engines.models.hf_models import make_hf
from tests.models import B1, SMALL, Shape, make_llama

SHAPES = {"small": SMALL, "b1": B1}
IDLE = Shape(hidden=64, layers=4, heads=4, kv_heads=4, head_dim=16, ffn=64, vocab=64)
"""A model of next to nothing, that divides like the real one."""
LAYOUTS = {"tp=4": ("tp", 4, 1), "pp=2": ("pp", 1, 2), "pptp 2x2": ("pptp", 2, 2)}
BOUND = 1.25


def group_pss(model: Path, kind: str, tp: int, pp: int) -> int:
    """Bytes of all ranks, ready and idle."""
    config = ModelConfig(
        model_name="load",
        served_model_names=("load",),
        model_path=str(model),
        parallel_type=cast(ParallelType, kind),
        engine="native" if pp == 1 else "pipeline",
        tp_size=tp,
        pp_size=pp,
        kv_cache_memory=1 << 20,
        max_model_len=64,
        max_num_batched_tokens=64,
    )
    with running(config) as group:
        return sum(int(psutil.Process(pid).memory_full_info().pss) for pid in group.info.pids)


def make(directory: Path, shape: Shape, kind: str) -> Path:
    if kind == "llama":
        return make_llama(directory, shape, dtype=torch.bfloat16)
    sizes = {"hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "intermediate_size": shape.ffn}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    rest = {"head_dim": shape.head_dim, "vocab_size": shape.vocab, "tie_word_embeddings": False}
    return make_hf(directory, kind, **sizes, **heads, **rest)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--kind", default="llama")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work:
        idle = make(Path(work) / "idle", IDLE, args.kind)
        model = make(Path(work) / "model", SHAPES[args.shape], args.kind)
        weights = (model / "model.safetensors").stat().st_size
        for name in args.layouts.split(","):
            above = group_pss(model, *LAYOUTS[name]) - group_pss(idle, *LAYOUTS[name])
            found[name] = above / weights
            sizes = f"{above / 2**20:8.1f} MiB, weights {weights / 2**20:.1f} MiB"
            print(f"{name:10} {sizes}: {found[name]:.3f}")
    if args.json:
        record = {
            "command": f"python -m tests.bench.bench_load --shape {args.shape} --kind {args.kind}",
            "machine": machine(),
            "weights_bytes": weights,
            "bytes of all ranks above idle ones, over the weights'": found,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    raise SystemExit(any(ratio > BOUND for ratio in found.values()))


if __name__ == "__main__":
    main()
