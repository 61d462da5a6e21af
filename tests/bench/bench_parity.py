"""Greedy tokens beside Hugging Face's in float32: `python -m tests.bench.bench_parity --json FILE`.

Every model at tp 1, 2 and 4, in real torchrun groups: each prompt alone, then all in one mixed batch
whose pool of K/V blocks is too small, so that prefixes are shared and sequences preempted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from engines.config import ModelConfig
from gateway.bench import machine
from gateway.model_source import demo_directory
from tests.engines.harness import Group, running
from tests.engines.reference import hf_greedy, prompts, request_of
from tests.models import GQA, MHA, ODD, make_llama

NUM_BLOCKS, BLOCK_SIZE = 64, 16


def model_dirs(work: Path) -> dict[str, Path]:
    shapes = {"mha": MHA, "gqa": GQA, "odd (biases, llama3 rope, tied)": ODD}
    made = {name: make_llama(work / str(i), shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return {"sluice-demo": demo_directory(), **made}


def config_for(model: Path, tp: int, bytes_per_block: int) -> ModelConfig:
    return ModelConfig(
        model_name="parity",
        served_model_names=("parity",),
        model_path=str(model),
        tp_size=tp,
        dtype="float32",
        max_num_batched_tokens=128,
        kv_block_size=BLOCK_SIZE,
        kv_cache_memory=NUM_BLOCKS * bytes_per_block,
    )


def bytes_per_block(model: Path, tp: int) -> int:
    """K/V bytes of a block on one rank, in float32."""
    config = json.loads((model / "config.json").read_text())
    heads = max(1, config["num_key_value_heads"] // tp)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * heads * head_dim * 4 * BLOCK_SIZE


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


def check(name: str, model: Path, tp: int, num_prompts: int, output_len: int) -> dict[str, object]:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batch = prompts(num_prompts, reference.config.vocab_size, seed=tp)
    expected = [hf_greedy(reference, prompt, output_len) for prompt in batch]
    with running(config_for(model, tp, bytes_per_block(model, tp))) as group:
        wrong = differing(group, batch, expected, output_len)
        stats = group.idle_stats()
    return {
        "model": name,
        "tp": tp,
        "prompts": num_prompts,
        "tokens_compared": 2 * num_prompts * output_len,
        "tokens_different": wrong,
        "preemptions": stats.num_preemptions,
        "prefix_hit_tokens": stats.num_prefix_hits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name, model in model_dirs(Path(work)).items():
            for tp in args.tp:
                rows.append(check(name, model, tp, args.prompts, args.output_len))
                print(json.dumps(rows[-1]), flush=True)
    record = {
        "command": "python -m tests.bench.bench_parity",
        "machine": machine(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "results": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(any(row["tokens_different"] for row in rows))


if __name__ == "__main__":
    main()
