"""All-reduce between two local CPU ranks, gloo beside shared memory: `python -m tests.bench.bench_reduce`."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from engines.runtime.shared_memory import SharedGroup
from gateway.bench import machine

SIZES = (4 << 10, 16 << 10, 64 << 10, 1 << 20)
ROUNDS, CALLS = 5, 300


def microseconds(reduce: Callable[[torch.Tensor], object], num_bytes: int) -> float:
    x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16)
    for _ in range(20):
        reduce(x)
    started = time.perf_counter()
    for _ in range(CALLS):
        reduce(x)
    return 1e6 * (time.perf_counter() - started) / CALLS


def rank_main(rank: int, work: Path) -> None:
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
    if rank == 0:
        (work / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        multiprocessing.spawn(rank_main, (Path(work),), nprocs=2)
        rows = json.loads((Path(work) / "rows.json").read_text())
    record = {
        "command": "python -m tests.bench.bench_reduce",
        "machine": machine(),
        "microseconds, median of rounds": rows,
    }
    print(json.dumps(record, indent=2))
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
