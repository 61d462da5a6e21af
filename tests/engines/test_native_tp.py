"""The native engine over two and four ranks: the same tokens, whatever does not divide."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engines.base import UnsupportedModel
from engines.runtime.mesh import Mesh
from tests.engines.driver import generate, native
from tests.engines.ranks import run_to_end
from tests.engines.test_native import prompts_for
from tests.models import GQA, MHA, ODD, Shape, make_llama

SHAPES = {
    "mha": MHA,
    "gqa": GQA,
    "odd": ODD,
}  # odd: one K/V head, tied, biases; gqa and odd: odd vocabularies
WORLD = 4


def run_rank(rank: int, root: Path) -> None:
    """One of four processes: the first two also form a group of their own."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{root}/init",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    for tp in (2, 4):
        group = dist.new_group(list(range(tp)))
        if rank < tp:
            mesh = Mesh(rank=rank, tp_size=tp, pp_size=1, device=torch.device("cpu"), tp_group=group)
            tokens = {name: tokens_of(root / name, shape, mesh) for name, shape in SHAPES.items()}
            (root / f"tp{tp}-rank{rank}.json").write_text(json.dumps(tokens))
    dist.destroy_process_group()


def tokens_of(directory: Path, shape: Shape, mesh: Mesh | None = None) -> list[list[int]]:
    engine = native(directory, mesh)
    prompts = prompts_for(shape.vocab, 3, 40, 17)
    return generate(engine, prompts, 16, chunk=7, stagger=1, group=mesh.tp_group if mesh else None)


def test_tokens_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    for name, shape in SHAPES.items():
        make_llama(tmp_path / name, shape, seed=5)
    expected = {name: tokens_of(tmp_path / name, shape) for name, shape in SHAPES.items()}
    run_to_end(run_rank, [(rank, tmp_path) for rank in range(WORLD)], seconds=120)
    for tp in (2, 4):
        assert json.loads((tmp_path / f"tp{tp}-rank0.json").read_text()) == expected


def test_a_split_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    directory = make_llama(tmp_path, GQA)
    mesh = Mesh(rank=0, tp_size=3, pp_size=1, device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match="3 ranks: its 8 attention heads"):
        native(directory, mesh)
