"""A peer for bench_peers.py: Hugging Face `generate`, no server, one static batch a request line.

Reads "BATCH PROMPT_LEN OUTPUT_LEN SEED" lines from stdin and answers each with the output tokens per
second of one batch, prompt included, as the server figures include it too.
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    directory, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    print("ready", flush=True)
    for line in sys.stdin:
        batch, prompt_len, output_len, seed = map(int, line.split())
        print(f"{tokens_per_second(model, batch, prompt_len, output_len, seed):.3f}", flush=True)


def tokens_per_second(
    model: torch.nn.Module, batch: int, prompt_len: int, output_len: int, seed: int
) -> float:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(16, model.config.vocab_size, (batch, prompt_len), generator=generator)
    prompts = prompts.to(model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=output_len,
            max_new_tokens=output_len,
            pad_token_id=0,
        ).cpu()
    elapsed = time.perf_counter() - started
    assert out.shape[1] == prompt_len + output_len
    return batch * output_len / elapsed


if __name__ == "__main__":
    main()
