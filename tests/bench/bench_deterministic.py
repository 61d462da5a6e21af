"""What `deterministic: true` costs on this CPU: `python -m tests.bench.bench_deterministic --shape small`.

The native engine with and without, in bfloat16, on all cores, taking turns: decoding steps after prompts of
16 tokens, and a prompt alone. Medians, and medians of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch

from gateway.bench import machine
from tests.bench.bench_quantized import in_turn, step_seconds
from tests.engines.driver import Driver, native
from tests.models import SHAPES, make_llama

PROMPT, ROUNDS = 512, 5


def read_prompt(driver: Driver) -> None:
    driver.step([driver.add(list(range(2, 2 + PROMPT)), 1)], PROMPT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    timed: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as root:
        directory = make_llama(Path(root), SHAPES[args.shape], dtype=torch.bfloat16)
        engines = [native(directory, dtype="bfloat16", deterministic=value) for value in (False, True)]
        for batch in (1, 8, 32, 128):
            timed[f"{batch} sequences"] = step_seconds(engines, batch, SHAPES[args.shape].vocab, steps=9)
        drivers = [
            Driver(engine, num_blocks=(PROMPT // 16 + 1) * ROUNDS, block_size=16) for engine in engines
        ]
        works = [partial(read_prompt, driver) for driver in drivers]
        timed[f"a prompt of {PROMPT}"] = in_turn(works, ROUNDS)
    results = [
        {
            "what": what,
            "ms": 1e3 * median(plain),
            "deterministic_ms": 1e3 * median(exact),
            "ratio": median(b / a for a, b in zip(plain, exact, strict=True)),
        }
        for what, (plain, exact) in timed.items()
    ]
    command = f"python -m tests.bench.bench_deterministic --shape {args.shape}"
    record = {"command": command, "machine": machine(), "results": results}
    print(json.dumps(record, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
