"""Decode step time of the native engine alone, beside Hugging Face `generate`, in one process.

    python -m tests.bench.bench_native --shapes tiny,small,b1 --batches 1,8,32

Prompts of 128 random tokens, 64 tokens out, greedy, bfloat16. The two take turns; a time is the median
over the steps of all rounds. Prefill is not counted. Native includes making the batch and the argmax.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tests.engines.driver import Driver, native
from tests.models import SHAPES, make_llama

PROMPT_TOKENS, NEW_TOKENS, BLOCK_SIZE = 128, 64, 16

Decode = Callable[[list[list[int]]], list[float]]
"""Prompts to the seconds of each decode step."""


def native_decode(directory: Path) -> Decode:
    engine = native(directory, dtype="bfloat16", max_model_len=2048)

    def decode(prompts: list[list[int]]) -> list[float]:
        num_blocks = -(-(PROMPT_TOKENS + NEW_TOKENS) // BLOCK_SIZE) * len(prompts)
        driver = Driver(engine, num_blocks, BLOCK_SIZE)
        rows = [driver.add(prompt, NEW_TOKENS) for prompt in prompts]
        driver.step(rows, PROMPT_TOKENS)
        times = []
        for _ in range(NEW_TOKENS - 1):
            start = time.perf_counter()
            driver.step(rows, 1)
            times.append(time.perf_counter() - start)
        return times

    return decode


def hugging_face_decode(directory: Path) -> Decode:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)

    def decode(prompts: list[list[int]]) -> list[float]:
        stamps: list[float] = []

        def stamp(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return scores

        ids = torch.tensor(prompts)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=model.config.vocab_size,
            pad_token_id=0,
            logits_processor=[stamp],
        )
        return [b - a for a, b in pairwise(stamps)]

    return decode


def measure(directory: Path, batches: list[int], rounds: int) -> Iterator[tuple[int, float, float]]:
    """(batch, native ms, Hugging Face ms) of one shape."""
    native, peer = native_decode(directory), hugging_face_decode(directory)
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        prompts = torch.randint(2, 8000, (batch, PROMPT_TOKENS), generator=generator).tolist()
        times: dict[Decode, list[float]] = {native: [], peer: []}
        for _ in range(rounds):
            for decode in (native, peer):
                times[decode] += decode(prompts)
        yield batch, statistics.median(times[native]) * 1e3, statistics.median(times[peer]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="tiny,small,b1")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=Path, help="keep the models here and use them again")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    print(f"{'shape':8}{'batch':>6}{'native ms':>12}{'generate ms':>13}{'ratio':>8}{'tokens/s':>10}")
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for name in args.shapes.split(","):
            directory = (args.models or Path(scratch)) / name
            if not (directory / "config.json").exists():
                make_llama(directory, SHAPES[name], seed=1, dtype=torch.bfloat16)
            for batch, own, peer in measure(
                directory, [int(b) for b in args.batches.split(",")], args.rounds
            ):
                print(
                    f"{name:8}{batch:6}{own:12.2f}{peer:13.2f}{peer / own:8.2f}{batch / own * 1e3:10.0f}",
                    flush=True,
                )
            gc.collect()


if __name__ == "__main__":
    main()
