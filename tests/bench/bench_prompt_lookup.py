"""What the guesses of promptLookup give: `python -m tests.bench.bench_prompt_lookup`.

Two real worker groups of one model, without guesses and with up to `--tokens` at once, taking turns; batches
of greedy sequences in bfloat16. A random model of the shape `small`: its answers come to repeat themselves
or do not, and what they repeat is no language. Reported: output tokens a second, their ratio round by round,
and the share of the guesses that held.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch

from engines.config import ModelConfig
from engines.wire import Generate, SamplingParams
from gateway.bench import machine
from tests.bench.bench_pipeline import Layout, config_for
from tests.engines.harness import Group, running
from tests.models import SMALL, make_llama

PROMPT_LEN, OUTPUT_LEN = 128, 128


def requests(count: int, seed: int, pattern: int) -> list[Generate]:
    """`pattern`: prompts that repeat so many random tokens; 0: that don't repeat any."""
    chosen = random.Random(seed)
    prompts = []
    for _ in range(count):
        tokens = [chosen.randrange(2, SMALL.vocab) for _ in range(pattern or PROMPT_LEN)]
        prompts.append((tokens * PROMPT_LEN)[:PROMPT_LEN])
    return [
        Generate(
            id=f"{seed}-{pattern}-{number}",
            prompt_ids=prompt,
            max_tokens=OUTPUT_LEN,
            ignore_eos=True,
            sampling=SamplingParams(temperature=0.0),
        )
        for number, prompt in enumerate(prompts)
    ]


def measure(group: Group, work: list[Generate]) -> dict[str, float]:
    before, started = group.stats(), time.perf_counter()
    for ended in [group.start(request) for request in work]:
        assert ended.result(timeout=300).error is None
    seconds, after = time.perf_counter() - started, group.stats()
    drafted = after.num_drafted_tokens - before.num_drafted_tokens
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    return {"tokens/s": len(work) * OUTPUT_LEN / seconds, "held": accepted / drafted if drafted else 0.0}


def compare(plain: Group, guessing: Group, concurrency: int, rounds: int, pattern: int) -> dict[str, object]:
    pairs = []
    for seed in range(rounds + 1):  # the first warms up
        work = requests(concurrency, seed + 100 * concurrency, pattern)
        pairs.append((measure(plain, work), measure(guessing, work)))
    ratios = [with_guesses["tokens/s"] / without["tokens/s"] for without, with_guesses in pairs[1:]]
    row: dict[str, object] = {
        "at once": concurrency,
        "prompts repeat": pattern,
        "tokens/s without": round(median(one["tokens/s"] for one, _ in pairs[1:]), 1),
        "tokens/s with": round(median(other["tokens/s"] for _, other in pairs[1:]), 1),
        "ratio": round(median(ratios), 2),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "guesses that held": round(median(other["held"] for _, other in pairs[1:]), 2),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        model = make_llama(Path(work) / "model", SMALL, dtype=torch.bfloat16)
        plain: ModelConfig = config_for(Layout("plain", 1, 1, max(2, threads), 0), model, "work")
        guessing = plain.model_copy(update={"prompt_lookup": args.tokens, "model_name": "guessing"})
        groups = [stack.enter_context(running(config)) for config in (plain, guessing)]
        rows = [
            compare(*groups, concurrency, args.rounds, pattern)
            for pattern in (0, 24)
            for concurrency in (1, 8)
        ]
    record = {
        "command": f"python -m tests.bench.bench_prompt_lookup --tokens {args.tokens}",
        "machine": machine(),
        "results": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
