"""What a decoding step costs outside the model: `python -m tests.bench.bench_step [--json FILE]`.

The real leader, scheduler, runner, sampler and inbox, in one process, over an engine that computes nothing:
its logits are made beforehand. A step is a whole round of the leader: schedule, plan, batch, sample, send to
a process that reads the socket as the gateway does. One thread, as a rank beside others has; times are
medians over the steps of all rounds. `bound` is what such a step may take: 150 us and 10 for each running
sequence.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engines.base import Batch
from engines.runtime.inbox import Inbox
from engines.runtime.leader import Leader
from engines.runtime.mesh import single
from engines.runtime.runner import ModelRunner
from engines.runtime.scheduler import ContinuousScheduler
from engines.wire import Generate, SamplingParams
from gateway import bench

NUM_SEQS = (1, 8, 32, 64, 128, 256)
FIXED_MICROSECONDS, MICROSECONDS_A_SEQUENCE = 150, 10
PROMPT_TOKENS, WARM_STEPS, STEPS = 128, 20, 200
BLOCK_SIZE, VOCAB_SIZE, MAX_LEN = 16, 2048, 1024

READER = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("listening", flush=True)
peer, _ = listener.accept()
while peer.recv(1 << 18):
    pass
"""


class NoModel:
    """An engine whose step takes no time."""

    batching = "continuous"
    plans_in_flight, vocab_size, max_model_len = 1, VOCAB_SIZE, MAX_LEN
    kv_spec = None

    def __init__(self) -> None:
        self._hidden = torch.zeros(max(NUM_SEQS) * PROMPT_TOKENS, 1)
        self._logits = torch.randn(max(NUM_SEQS), VOCAB_SIZE, generator=torch.Generator().manual_seed(0))

    def forward(self, batch: Batch) -> Tensor:
        return self._hidden[: batch.num_tokens]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._logits[: len(hidden)]


@contextmanager
def reader() -> Iterator[Path]:
    """A process that reads what comes, and where it listens."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "socket"
        argv = [sys.executable, "-c", READER, str(path)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            yield path
            child.terminate()


def step_seconds(num_seqs: int, logprobs: int | None) -> float:
    """Of one round's decoding steps the median."""
    num_blocks = num_seqs * (-(-(PROMPT_TOKENS + WARM_STEPS + STEPS) // BLOCK_SIZE) + 1)
    scheduler = ContinuousScheduler(
        num_blocks, BLOCK_SIZE, num_seqs, num_seqs * PROMPT_TOKENS, MAX_LEN, eos_token_ids=()
    )
    with reader() as path:
        inbox = Inbox(path)
        leader = Leader(scheduler, ModelRunner(NoModel(), single(), [], num_seqs), inbox, plans_in_flight=1)
        for number in range(num_seqs):
            prompt = [number, *range(PROMPT_TOKENS - 1)]  # nobody shares its blocks
            sampling = SamplingParams(temperature=0.0, logprobs=logprobs)
            request = Generate(
                id=f"cmpl-{number:032x}", prompt_ids=prompt, max_tokens=MAX_LEN, sampling=sampling
            )
            scheduler.add(request)
        times = []
        for _ in range(1 + WARM_STEPS + STEPS):
            started = time.perf_counter()
            leader.step()
            times.append(time.perf_counter() - started)
        inbox.close()
    return statistics.median(times[1 + WARM_STEPS :])


def measure(rounds: int, logprobs: int | None) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for num_seqs in NUM_SEQS:
        times = [1e6 * step_seconds(num_seqs, logprobs) for _ in range(rounds)]
        bound = FIXED_MICROSECONDS + MICROSECONDS_A_SEQUENCE * num_seqs
        row: dict[str, object] = {
            "sequences": num_seqs,
            "us": round(statistics.median(times)),
            "spread": [round(min(times)), round(max(times))],
            "bound": bound,
        }
        print(json.dumps({"logprobs": logprobs, **row}), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = {
        "command": f"python -m tests.bench.bench_step --rounds {args.rounds}",
        "machine": bench.machine(),
        "prompt tokens": PROMPT_TOKENS,
        "vocabulary": VOCAB_SIZE,
        "greedy": measure(args.rounds, None),
        "with 5 log-probabilities": measure(args.rounds, 5),
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
