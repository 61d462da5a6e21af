"""Each engine as a group serves it, beside Hugging Face `generate` with one static batch.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_engines --shape small --batch 32 --rounds 5 --json FILE

The same bfloat16 weights, greedy, all requests at once; output tokens a second of the whole batch, with
prompts. Every side has two cores: two ranks with a thread each, or one process with two threads. They take
turns, so that other load on the machine falls on all. Reported: medians, and medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import cast

import torch
from transformers import AutoModelForCausalLM

from engines.config import ModelConfig, ParallelType
from engines.wire import Generate, SamplingParams
from gateway.bench import machine
from tests.bench.hf_generate import tokens_per_second
from tests.engines.harness import Group, running
from tests.models import SHAPES, make_llama

SIDES = {
    "native tp=1": ("tp", "native", 1, 2),
    "native tp=2": ("tp", "native", 2, 1),
    "accelerate": ("custom", "accelerate", 1, 2),
    "AutoTP tp=2": ("tp", "deepspeed_tp", 2, 1),
}
"""parallelType, engine, ranks, threads of each."""
PEER = "generate"
RATIOS = (
    ("native tp=2", "native tp=1"),
    ("native tp=1", PEER),
    ("accelerate", PEER),
    ("AutoTP tp=2", PEER),
)


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


def config_for(side: str, directory: Path) -> ModelConfig:
    kind, engine, ranks, threads = SIDES[side]
    return ModelConfig(
        model_name="bench",
        served_model_names=("bench",),
        model_path=str(directory),
        parallel_type=cast(ParallelType, kind),
        engine=engine,
        tp_size=ranks,
        omp_threads=threads,
        prefix_cache=False,
        startup_timeout=300,  # DeepSpeed compiles its all-reduce at first use
    )


def measure(directory: Path, sizes: tuple[int, int, int], rounds: int) -> dict[str, list[float]]:
    """Output tokens per second of each side, a figure a round; the first, to warm up, is left out."""
    rates: dict[str, list[float]] = {side: [] for side in (*SIDES, PEER)}
    with ExitStack() as stack:
        groups = {side: stack.enter_context(running(config_for(side, directory))) for side in SIDES}
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        for seed in range(rounds + 1):
            for side, group in groups.items():
                rates[side].append(served(group, *sizes, seed))
            rates[PEER].append(tokens_per_second(model, *sizes, seed))
            print({side: round(found[-1], 1) for side, found in rates.items()}, flush=True)
    return {side: found[1:] for side, found in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    for name, default in (("batch", 32), ("prompt", 128), ("output", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch:
        directory = make_llama(Path(scratch) / "model", SHAPES[args.shape], seed=1, dtype=torch.bfloat16)
        rates = measure(directory, (args.batch, args.prompt, args.output), args.rounds)
    ratios = {
        f"{one} / {other}": round(median(a / b for a, b in zip(rates[one], rates[other], strict=True)), 3)
        for one, other in RATIOS
    }
    record = {
        "command": (
            f"python -m tests.bench.bench_engines --shape {args.shape} --batch {args.batch}"
            f" --prompt {args.prompt} --output {args.output} --rounds {args.rounds}"
        ),
        "machine": machine(),
        "versions": {p: version(p) for p in ("torch", "transformers", "deepspeed", "accelerate")},
        "output tokens per second": {side: [round(r, 1) for r in found] for side, found in rates.items()},
        "median ratios": ratios,
    }
    print(json.dumps(ratios, indent=2))
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
