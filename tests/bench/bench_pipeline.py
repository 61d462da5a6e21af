"""Pipeline stages, and tensor parallelism, beside one rank: output tokens a second, busy shares, bubble.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_pipeline --shape small --concurrency 32

Real worker groups, taking turns; a closed loop of greedy sequences of 128 prompt and 32 to 96 output
tokens in bfloat16. pp=2 and tp=2 have a thread a rank; tp=1 has as many threads as they have ranks, and runs
at the concurrency of a micro-batch too, which is what each stage computes. Reported: medians over the rounds,
and of the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import cast

import torch

from engines.config import ModelConfig, ParallelType, StageSplit
from engines.wire import Generate, SamplingParams, Stats
from gateway.bench import machine
from tests.engines.harness import Ended, Group, running
from tests.models import SMALL, TINY, make_llama

SHAPES = {"tiny": TINY, "small": SMALL}
PROMPT_LEN, OUTPUT_LEN = 128, (32, 96)


@dataclass(frozen=True)
class Layout:
    """Ranks, threads of each, and sequences at once."""

    name: str
    tp: int
    pp: int
    threads: int
    concurrency: int

    @property
    def key(self) -> tuple[int, int, int]:
        """Groups that can be one."""
        return self.tp, self.pp, self.threads


@dataclass(frozen=True)
class Measured:
    tokens_per_second: float
    stage_busy_share: list[float]
    bubble: float  # of the stages' time, with plans in flight, in which they computed nothing


def config_for(layout: Layout, model: Path, split: StageSplit) -> ModelConfig:
    is_pipeline = layout.pp > 1
    kind = "pptp" if is_pipeline and layout.tp > 1 else "pp" if is_pipeline else "tp"
    return ModelConfig(
        model_name=layout.name,
        served_model_names=(layout.name,),
        model_path=str(model),
        parallel_type=cast(ParallelType, kind),
        engine="pipeline" if is_pipeline else "native",
        tp_size=layout.tp,
        pp_size=layout.pp,
        omp_threads=layout.threads,
        stage_split=split,
        prefix_cache=False,
        max_num_batched_tokens=256 if is_pipeline else 2048,  # as the configuration defaults to
    )


def requests(vocab: int, tag: str) -> Iterator[Generate]:
    """Endless and random. Lengths differ, so that sequences do not start and end together."""
    chosen = random.Random(0)
    for number in itertools.count():
        prompt = [chosen.randrange(2, vocab) for _ in range(PROMPT_LEN)]
        yield Generate(
            id=f"{tag}{number}",
            prompt_ids=prompt,
            max_tokens=chosen.randint(*OUTPUT_LEN),
            ignore_eos=True,
            sampling=SamplingParams(temperature=0.0),
        )


def measure(group: Group, concurrency: int, num_requests: int, vocab: int, tag: str) -> Measured:
    """Keep `concurrency` running; counted from the end of as many to that of `num_requests` more."""
    source = requests(vocab, tag)
    pending: set[Future[Ended]] = {group.start(next(source)) for _ in range(concurrency)}
    first, started = _after(group, pending, source, concurrency)
    last, stopped = _after(group, pending, source, num_requests)
    wait(pending, timeout=60)
    active = last.active_seconds - first.active_seconds
    pairs = zip(first.stage_busy_seconds, last.stage_busy_seconds, strict=True)
    shares = [(after - before) / active for before, after in pairs]
    tokens = last.num_generated_tokens - first.num_generated_tokens
    bubble = 1 - sum(shares) / len(shares) if shares else 0.0
    return Measured(tokens / (stopped - started), shares, bubble)


def _after(
    group: Group, pending: set[Future[Ended]], source: Iterator[Generate], num_requests: int
) -> tuple[Stats, float]:
    """Replace sequences that end until so many have, then read the counters."""
    num_ended = 0
    while num_ended < num_requests:
        done, _ = wait(pending, timeout=120, return_when=FIRST_COMPLETED)
        assert done, "nothing ends any more"
        for future in done:
            assert future.result().error is None
            pending.remove(future)
            pending.add(group.start(next(source)))
        num_ended += len(done)
    return group.stats(), time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--split", default="work", help="work, layers, bytes, or counts: 8,4")
    parser.add_argument("--only-pipeline", action="store_true", help="leave out what it is compared with")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    split = args.split if args.split.isalpha() else tuple(int(n) for n in args.split.split(","))
    pp, shape = args.stages, SHAPES[args.shape]
    layouts = [
        Layout(f"pp={pp}", 1, pp, 1, args.concurrency),
        Layout(f"tp={pp}", pp, 1, 1, args.concurrency),
        Layout(f"tp=1, {pp} threads", 1, 1, pp, args.concurrency),
        Layout(f"tp=1, {pp} threads, a micro-batch", 1, 1, pp, args.concurrency // pp),
    ]
    if args.only_pipeline:
        del layouts[1:]
    results: dict[str, list[Measured]] = {layout.name: [] for layout in layouts}
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        model = make_llama(Path(work) / "model", shape, dtype=torch.bfloat16)
        groups = {
            layout.key: stack.enter_context(running(config_for(layout, model, split)))
            for layout in {layout.key: layout for layout in layouts}.values()
        }
        for number, layout in itertools.product(range(args.rounds), layouts):
            tag = f"{layout.name}-{number}-"
            found = measure(groups[layout.key], layout.concurrency, args.requests, shape.vocab, tag)
            results[layout.name].append(found)
            shares = " ".join(f"{share:.2f}" for share in found.stage_busy_share)
            print(
                f"{layout.name:32} {found.tokens_per_second:8.1f} tok/s  {shares}  bubble {found.bubble:.3f}"
            )
    record = report(layouts, results)
    record["command"] = f"python -m tests.bench.bench_pipeline --shape {args.shape} --split {args.split}"
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


def report(layouts: list[Layout], results: dict[str, list[Measured]]) -> dict[str, object]:
    """Prints the medians; returns all there is to keep."""
    ratios = {}
    for first, other in itertools.combinations([layout.name for layout in layouts], 2):
        pairs = zip(results[first], results[other], strict=True)
        ratio = median(one.tokens_per_second / two.tokens_per_second for one, two in pairs)
        ratios[f"{first} / {other}"] = round(ratio, 3)
    bubble = round(median(found.bubble for found in results[layouts[0].name]), 3)
    print(json.dumps({"median ratios": ratios, "median bubble": bubble}, indent=2))
    return {
        "machine": machine(),
        "torch": torch.__version__,
        "median ratios": ratios,
        "median bubble": bubble,
        "rounds": {name: [asdict(one) for one in found] for name, found in results.items()},
    }


if __name__ == "__main__":
    main()
