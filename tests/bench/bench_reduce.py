"""What two local CPU ranks pass each other: `python -m tests.bench.bench_reduce`.

All-reduce, gloo beside shared memory; and of a decoding step all but the model, as the leader sees it: the
plan packed and sent, taken up and unpacked by the other rank, and its half of the logits fetched.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from engines.runtime.channel import Pipe
from engines.runtime.plan import StepPlan, StepResult
from engines.runtime.scheduler import ContinuousScheduler
from engines.runtime.shared_memory import SharedGroup
from engines.wire import Generate
from gateway.bench import machine

SIZES = (4 << 10, 16 << 10, 64 << 10, 1 << 20)
NUM_SEQS, VOCAB_SIZES, PROMPT_LEN, BLOCK_SIZE = (1, 8, 32), (8192, 32000), 128, 16
ROUNDS, CALLS = 5, 300


def microseconds(reduce: Callable[[torch.Tensor], object], num_bytes: int) -> float:
    x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16)
    for _ in range(20):
        reduce(x)
    started = time.perf_counter()
    for _ in range(CALLS):
        reduce(x)
    return 1e6 * (time.perf_counter() - started) / CALLS


def decoding_plan(num_seqs: int) -> StepPlan:
    """One token for each of so many sequences."""
    num_blocks = num_seqs * (PROMPT_LEN // BLOCK_SIZE + 2)
    tokens = num_seqs * PROMPT_LEN
    scheduler = ContinuousScheduler(
        num_blocks, BLOCK_SIZE, num_seqs, tokens, 2 * PROMPT_LEN, eos_token_ids=()
    )
    for number in range(num_seqs):
        prompt = [number, *range(PROMPT_LEN - 1)]
        scheduler.add(Generate(id=str(number), prompt_ids=prompt, max_tokens=PROMPT_LEN))
    prompts = scheduler.schedule()
    scheduler.update(prompts, StepResult(np.ones(num_seqs, np.int32)))
    plan = scheduler.schedule()
    assert plan.num_tokens == num_seqs
    return plan


def step_microseconds(plan: StepPlan, logits: torch.Tensor, shared: SharedGroup, pipe: Pipe) -> float:
    """Of a step on the leader, the median. `logits`: this rank's columns."""
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        if shared.rank == 0:
            pipe.send(plan.pack())
        else:
            StepPlan.unpack(pipe.receive())
        shared.gather_columns(logits)
        times.append(1e6 * (time.perf_counter() - started))
    return median(times)


def step_rows(shared: SharedGroup, pipe: Pipe) -> list[dict[str, float]]:
    rows = []
    for vocab_size in VOCAB_SIZES:
        for num_seqs in NUM_SEQS:
            plan = decoding_plan(num_seqs)
            logits = torch.zeros(num_seqs, vocab_size // 2, dtype=torch.bfloat16)
            times = [step_microseconds(plan, logits, shared, pipe) for _ in range(ROUNDS)]
            rows.append({"sequences": num_seqs, "vocabulary": vocab_size, "us": round(median(times), 1)})
    return rows


def rank_main(rank: int, work: Path, pipes: tuple[socket.socket, socket.socket]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work}/init", rank=rank, world_size=2)
    shared = SharedGroup(work / "shared", rank, 2, timeout=30)
    rows = []
    for num_bytes in SIZES:
        times: dict[str, list[float]] = {"gloo": [], "shared": []}
        for _ in range(ROUNDS):
            times["gloo"].append(microseconds(dist.all_reduce, num_bytes))
            times["shared"].append(microseconds(shared.all_reduce, num_bytes))
        rows.append({"bytes": num_bytes, **{name: round(median(t), 1) for name, t in times.items()}})
    steps = step_rows(shared, Pipe(pipes[rank]))
    if rank == 0:
        (work / "rows.json").write_text(json.dumps([rows, steps]))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        multiprocessing.spawn(rank_main, (Path(work), socket.socketpair()), nprocs=2)
        rows, steps = json.loads((Path(work) / "rows.json").read_text())
    record = {
        "command": "python -m tests.bench.bench_reduce",
        "machine": machine(),
        "microseconds, median of rounds": rows,
        "a step without the model": steps,
    }
    print(json.dumps(record, indent=2))
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
