"""Greedy tokens beside Hugging Face's in float32: `python -m tests.bench.bench_parity --json FILE`.

Every model in every engine and layout, as real worker groups: each prompt alone, then all in one mixed batch
whose pool of K/V blocks is too small, so that prefixes are shared and sequences preempted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from gateway.bench import machine
from gateway.model_source import demo_directory
from tests.engines.harness import Group, StartFailed, running
from tests.engines.layouts import LAYOUTS, Layout
from tests.engines.models.hf_models import make_hf
from tests.engines.reference import hf_greedy, prompts, request_of
from tests.models import GQA, MHA, ODD, Shape, make_llama

NUM_BLOCKS, BLOCK_SIZE = 64, 16
FOUR_RANKS = [Layout("pipeline", pp=4), Layout("deepspeed_tp", tp=4)]  # beside those that the tests run

GQA_FOUR_LAYERS = Shape(hidden=128, layers=4, heads=8, kv_heads=4, head_dim=16, ffn=256, vocab=512)
SHAPES = {"llama-mha": MHA, "llama-gqa": GQA, "llama-gqa-4-layers": GQA_FOUR_LAYERS, "llama-odd": ODD}
"""llama-odd: biases, llama3 rope scaling, tied embeddings, one K/V head, an unusual head size."""


def model_dirs(work: Path) -> dict[str, Path]:
    made = {name: make_llama(work / name, shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    others = {kind: make_hf(work / kind, kind) for kind in ("qwen3", "mistral")}
    return {"sluice-demo": demo_directory(), **made, **others}


def differing(group: Group, batch: list[list[int]], expected: list[list[int]], output_len: int) -> int:
    """Tokens that differ, alone and mixed together."""
    requests = [request_of(f"{i}", prompt, output_len) for i, prompt in enumerate(batch)]
    alone = [group.run([request])[0].token_ids for request in requests]
    mixed = [ended.token_ids for ended in group.run(requests)]
    return sum(
        a != b
        for got in (alone, mixed)
        for ours, theirs in zip(got, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def check(name: str, model: Path, layout: Layout, num_prompts: int, output_len: int) -> dict[str, object]:
    """One engine and layout over one model. A refusal is a result, too."""
    row: dict[str, object] = {"model": name, "layout": str(layout)}
    config = layout.config(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_batched=128)
    batch = prompts(num_prompts, json.loads((model / "config.json").read_text())["vocab_size"], seed=7)
    try:
        with running(config) as group:
            wrong = differing(group, batch, reference_tokens(model, num_prompts, output_len), output_len)
            stats = group.idle_stats()
    except StartFailed as failure:
        return {**row, "refused": str(failure).replace(str(model), name)}
    return {
        **row,
        "prompts": 2 * num_prompts,
        "tokens_compared": 2 * num_prompts * output_len,
        "tokens_different": wrong,
        "preemptions": stats.num_preemptions,
        "prefix_hit_tokens": stats.num_prefix_hits,
    }


@cache
def reference_tokens(model: Path, num_prompts: int, output_len: int) -> list[list[int]]:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batch = prompts(num_prompts, reference.config.vocab_size, seed=7)
    return [hf_greedy(reference, prompt, output_len) for prompt in batch]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--engines", nargs="+", default=sorted({layout.engine for layout in LAYOUTS}))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name, model in model_dirs(Path(work)).items():
            for layout in LAYOUTS + FOUR_RANKS:
                if layout.engine in args.engines:
                    rows.append(check(name, model, layout, args.prompts, args.output_len))
                    print(json.dumps(rows[-1]), flush=True)
    record = {
        "command": (
            f"python -m tests.bench.bench_parity --prompts {args.prompts} --output-len {args.output_len}"
            f" --engines {' '.join(args.engines)}"
        ),
        "prompts": sum(int(str(row.get("prompts", 0))) for row in rows),
        "tokens_compared": sum(int(str(row.get("tokens_compared", 0))) for row in rows),
        "tokens_different": sum(int(str(row.get("tokens_different", 0))) for row in rows),
        "machine": machine(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "results": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(any(row.get("tokens_different") for row in rows))


if __name__ == "__main__":
    main()
