"""An engine over real ranks without a worker group: what several models give, or why they are refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engines.base import Engine, UnsupportedModel
from engines.models.hf_support import EXACT_TYPES
from engines.runtime.mesh import Mesh
from tests.engines.driver import generate
from tests.engines.models.hf_models import make_hf
from tests.engines.models.test_hf import CHANGES, hf_tokens, prompts

Load = Callable[[Path, Mesh], Engine]
"""A function of a module, for processes to find it by its name."""

Special = dict[str, tuple[str, dict[str, Any]]]
"""Models beside those of every type: a name, and the type with its changes."""


def make_models(root: Path, special: Special) -> Path:
    """One of every type that is served, and the special ones, each in a directory by its name."""
    wanted = {kind: (kind, CHANGES.get(kind, {})) for kind in EXACT_TYPES} | special
    for name, (kind, changes) in wanted.items():
        make_hf(root / name, kind, **changes)
    return root


def expected_tokens(models: Path, special: Special) -> dict[str, list[list[int]]]:
    """What `run_ranks` shall find."""
    return {name: hf_tokens(models / name, prompts(), 12) for name in (*EXACT_TYPES, *special)}


def run_to_end(rank_main: Callable[..., None], arguments: Sequence[tuple[Any, ...]], seconds: float) -> None:
    """A process for each, all to their end; none outlives the test, or waits for one that has failed."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_main, args=each) for each in arguments]
    try:
        for process in ranks:
            process.start()
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            if any(process.exitcode for process in ranks):
                break
            time.sleep(0.05)
        assert [process.exitcode for process in ranks] == [0] * len(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def run_ranks(world: int, root: Path, names: list[str], load: Load) -> dict[str, Any]:
    """12 greedy tokens for each of `prompts()` from each model of `root`, or the refusal, as rank 0 has it.

    Tensor parallelism over `world` ranks, all to their end; none outlives the test.
    """
    run_to_end(_run, [(rank, world, root, names, load) for rank in range(world)], seconds=240)
    results: dict[str, Any] = json.loads((root / f"tp{world}.json").read_text())
    return results


def _run(rank: int, world: int, root: Path, names: list[str], load: Load) -> None:
    torch.set_num_threads(1)
    init, timeout = f"file://{root}/init{world}", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=timeout)
    group = dist.new_group(list(range(world)))
    mesh = Mesh(rank=rank, tp_size=world, pp_size=1, device=torch.device("cpu"), tp_group=group)
    results: dict[str, Any] = {}
    for name in names:
        try:
            engine = load(root / name, mesh)
        except UnsupportedModel as refusal:
            results[name] = str(refusal)
            continue
        results[name] = generate(engine, prompts(), 12, stagger=2, group=group)
    if rank == 0:
        (root / f"tp{world}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # as a worker ends
