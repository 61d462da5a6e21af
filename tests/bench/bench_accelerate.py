"""The accelerate engine as a group serves it, beside Hugging Face `generate` with one static batch.

    python -m tests.bench.bench_accelerate --shape small --batch 32 --prompt 128 --output 64 --rounds 3

The same bfloat16 weights, greedy, all requests at once; output tokens a second of the whole batch, with
prompts. The two take turns, so that other load on the machine falls on both; the median ratio counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from engines.config import ModelConfig
from engines.wire import Generate, SamplingParams
from tests.bench.hf_generate import tokens_per_second
from tests.engines.harness import Group, running
from tests.models import B1, SMALL, TINY, make_llama

SHAPES = {"tiny": TINY, "small": SMALL, "b1": B1}


def served(group: Group, batch: int, prompt_len: int, output_len: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(16, group.info.vocab_size, (batch, prompt_len), generator=generator).tolist()
    greedy = SamplingParams(temperature=0.0)
    requests = [
        Generate(id=f"{seed}-{i}", prompt_ids=p, max_tokens=output_len, sampling=greedy, ignore_eos=True)
        for i, p in enumerate(prompts)
    ]
    started = time.perf_counter()
    ended = group.run(requests, timeout=600)
    assert all(len(end.token_ids) == output_len for end in ended)
    return batch * output_len / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    for name, default in (("batch", 32), ("prompt", 128), ("output", 64), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = (args.batch, args.prompt, args.output)
    with tempfile.TemporaryDirectory() as scratch:
        directory = make_llama(Path(scratch) / "model", SHAPES[args.shape], seed=1, dtype=torch.bfloat16)
        config = ModelConfig(
            model_name="bench",
            served_model_names=("bench",),
            model_path=str(directory),
            parallel_type="custom",
            engine="accelerate",
            omp_threads=args.threads,
        )
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        ratios = []
        with running(config) as group:
            for seed in range(args.rounds):
                ours = served(group, *sizes, seed)
                peer = tokens_per_second(model, *sizes, seed)
                ratios.append(ours / peer)
                load = os.getloadavg()[0]
                print(f"accelerate {ours:.1f} generate {peer:.1f} ratio {ratios[-1]:.2f} load {load:.1f}")
        print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
