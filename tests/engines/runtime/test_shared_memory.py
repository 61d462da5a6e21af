"""Sums and gathers between real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from engines.runtime.shared_memory import CAPACITY, SharedGroup, path_for


def part(rank: int, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def _rank(rank: int, size: int, path: Path, dtype: torch.dtype, results: Path) -> None:
    torch.set_num_threads(1)
    group = SharedGroup(path, rank, size, timeout=30)
    sums, gathered = [], []
    for step in range(60):
        rows = 1 + step % 7
        x = part(rank, step, (rows, 96), dtype)
        group.all_reduce(x)
        sums.append(x)
        gathered.append(group.gather_columns(part(rank, step, (rows, 33), dtype)))
    large = part(rank, 1000, (3, CAPACITY // dtype.itemsize // 2 + 5), dtype)
    group.all_reduce(large)
    torch.save((sums, gathered, large), results / f"{rank}.pt")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_agree_and_are_right(size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, (size, tmp_path / "shared", dtype, tmp_path), nprocs=size)
    outcomes = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    for step in range(60):
        rows = 1 + step % 7
        parts = torch.stack([part(rank, step, (rows, 96), dtype) for rank in range(size)])
        torch.testing.assert_close(outcomes[0][0][step], parts.sum(0), rtol=1e-2, atol=1e-2)
        assert all(torch.equal(outcomes[0][0][step], other[0][step]) for other in outcomes)
        columns = [part(rank, step, (rows, 33), dtype) for rank in range(size)]
        assert torch.equal(outcomes[0][1][step], torch.cat(columns, dim=1).float())
        assert all(other[1][step] is None for other in outcomes[1:])
    shape = outcomes[0][2].shape
    parts = torch.stack([part(rank, 1000, tuple(shape), dtype) for rank in range(size)])
    torch.testing.assert_close(outcomes[0][2], parts.sum(0), rtol=1e-2, atol=1e-2)
    assert torch.equal(outcomes[0][2], outcomes[1][2])


def test_a_rank_that_does_not_come_is_a_timeout(tmp_path: Path) -> None:
    group = SharedGroup(tmp_path / "shared", 0, 2, timeout=0.05)
    with pytest.raises(TimeoutError, match="operation 1"):
        group.all_reduce(torch.ones(4))


def test_the_guard_finds_the_name() -> None:
    run_dir = Path("/tmp/sluice-1-abc")
    assert run_dir.name in path_for(run_dir, "stage0").name
    assert path_for(run_dir, "stage0") != path_for(run_dir, "stage1")
