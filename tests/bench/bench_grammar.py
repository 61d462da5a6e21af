"""What grammars add to the time of a step: 32 constrained sequences beside 32 free ones, native engine.

    python -m tests.bench.bench_grammar [--dtypes float32,bfloat16] [--rounds N] [--json FILE]

Random weights of 125M parameters, a byte-pair vocabulary of 32,000, one process. A step is the leader's
round: scheduling, model, masks, sampling (temperature 1). Free and constrained rounds take turns; a round's
time is the median of its decoding steps, the figure the median over rounds. The constrained sequences have
eight schemas; they write long lists, so that none ends. The same is told of the process's processor time,
which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from engines.base import Engine
from engines.runtime.grammar import Grammars
from engines.wire import Generate, SamplingParams
from gateway import bench
from gateway.grammar_process import make
from tests.engines.driver import native
from tests.engines.runtime.in_process import InProcess
from tests.models import SMALL, make_llama, write_tokenizer

NUM_SEQS, PROMPT_TOKENS, NUM_STEPS, WARM_STEPS = 32, 64, 48, 4
EOS = 1


def schema(number: int) -> dict[str, Any]:
    """A list of records, as an extraction asks for."""
    record = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            f"field_{number}": {"enum": ["one", "two", "three", f"value {number}"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "email": {"type": "string", "format": "email"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
            "address": {
                "type": "object",
                "properties": {
                    "street": {"type": "string"},
                    "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
                },
                "required": ["street", "zip"],
                "additionalProperties": False,
            },
        },
        "required": ["name", f"field_{number}", "age", "email", "tags", "address"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": record, "minItems": 1000}


def load(directory: Path, dtype: str) -> Engine:
    return native(directory, dtype=dtype, max_model_len=2048)


def step_times(group: InProcess, grammars: list[str], round: int) -> tuple[float, float]:
    """Of one round's decoding steps the median of the seconds, and of the processor's; a sequence for each
    grammar, the empty one frees it."""
    generator = torch.Generator().manual_seed(round)
    requests = [
        Generate(
            id=f"{round}-{i}-{len(grammar)}",
            prompt_ids=torch.randint(2, 8000, (PROMPT_TOKENS,), generator=generator).tolist(),
            max_tokens=NUM_STEPS,
            ignore_eos=True,
            sampling=SamplingParams(temperature=1.0, seed=round * 1000 + i),
            grammar=grammar,
        )
        for i, grammar in enumerate(grammars)
    ]
    group.send(*requests)
    times = []
    while group.scheduler.stats(0).num_running < NUM_SEQS:
        group.leader.step()
    while group.scheduler.has_work:  # each of these steps draws a token for every one
        started, cpu = time.perf_counter(), time.process_time()
        group.leader.step()
        times.append((time.perf_counter() - started, time.process_time() - cpu))
    for request in requests:
        ended = group.ended(request.id)
        assert ended.finish_reason == "length", ended
        assert len(ended.token_ids) == NUM_STEPS
    walls, cpus = zip(*times[WARM_STEPS:], strict=True)
    return statistics.median(walls), statistics.median(cpus)


def measure(directory: Path, dtype: str, rounds: int) -> dict[str, object]:
    engine = load(directory, dtype)
    grammars = Grammars(directory / "tokenizer.json", engine.vocab_size, [EOS])
    group = InProcess(engine, num_blocks=512, max_num_seqs=NUM_SEQS, max_batched=4096, grammars=grammars)
    schemas = [make("json_schema", json.dumps(schema(i % 8))) for i in range(NUM_SEQS)]
    free, bound = [""] * NUM_SEQS, schemas
    step_times(group, free, 0)
    step_times(group, bound, 0)
    pairs = [(step_times(group, free, i), step_times(group, bound, i)) for i in range(1, rounds + 1)]
    return {
        "step": compared([(one[0], other[0]) for one, other in pairs]),
        "processor": compared([(one[1], other[1]) for one, other in pairs]),
    }


def compared(rounds: list[tuple[float, float]]) -> dict[str, object]:
    """Free and constrained seconds of each round."""
    added = [100 * (bound / free - 1) for free, bound in rounds]
    return {
        "free_ms": round_to(statistics.median(free for free, _ in rounds) * 1e3),
        "constrained_ms": round_to(statistics.median(bound for _, bound in rounds) * 1e3),
        "added_percent": round_to(statistics.median(added)),
        "added_percent_of_each_round": [round_to(each) for each in added],
    }


def round_to(value: float) -> float:
    return round(value, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", type=Path, help="keep the model here and use it again")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        directory = (args.models or Path(scratch)) / "small"
        if not (directory / "tokenizer.json").exists():
            make_llama(directory, SMALL, seed=1)
            write_tokenizer(directory, SMALL.vocab)
        record = {
            "command": f"python -m tests.bench.bench_grammar --dtypes {args.dtypes} --rounds {args.rounds}",
            "machine": bench.machine(),
            "threads": threads,
            "sequences": NUM_SEQS,
            "vocabulary": SMALL.vocab,
            **{dtype: measure(directory, dtype, args.rounds) for dtype in args.dtypes.split(",")},
        }
    print(json.dumps(record, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
