"""The process groups of a real mesh: who is in which, and for how long a rank waits in one."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engines.runtime.mesh import Mesh, join

TP, PP = 2, 2
PATIENCE = 77.0


def _timeout(group: dist.ProcessGroup) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def _rank(rank: int, init_file: Path, patience: float, answers: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    torch.set_num_threads(1)
    group = join(rank, TP, PP, "gloo", init_file, patience)
    assert group is not None
    assert dist.group.WORLD is not None
    mesh = Mesh(rank, TP, PP, torch.device("cpu"), group)
    total = mesh.all_reduce(torch.tensor([float(rank)])).item()
    answers.put((rank, mesh.stage, total, _timeout(group), _timeout(dist.group.WORLD)))
    answers.close()
    answers.join_thread()
    os._exit(0)  # as a worker ends


def test_every_group_has_the_patience_that_it_was_given(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, tmp_path / "init", PATIENCE, answers))
        for rank in range(TP * PP)
    ]
    try:
        for process in ranks:
            process.start()
        found = sorted(answers.get(timeout=120) for _ in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert found == [
        (0, 1, 1.0, PATIENCE, PATIENCE),
        (1, 1, 1.0, PATIENCE, PATIENCE),
        (2, 0, 5.0, PATIENCE, PATIENCE),
        (3, 0, 5.0, PATIENCE, PATIENCE),
    ]


def test_a_rank_that_does_not_come_is_not_waited_for_longer(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?i)timeout|clients joined"):
        join(0, 1, 2, "gloo", tmp_path / "init", 1.0)
