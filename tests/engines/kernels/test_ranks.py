"""Layers whose ranks sum their shares by themselves: real processes, and what they give beside one rank's."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engines.kernels import library
from engines.models import kernel_layers
from engines.models.kernel_layers import KernelLayers
from engines.native import NativeEngine
from engines.runtime import cpu
from engines.runtime.mesh import Mesh
from engines.runtime.shared_memory import SharedGroup
from tests.engines.driver import Driver, generate, native
from tests.engines.ranks import run_to_end
from tests.engines.test_native import prompts_for
from tests.models import Shape, make_llama

pytestmark = pytest.mark.skipif(
    library.load() is None, reason="no kernels for this machine; the log says why"
)

SHAPE = Shape(hidden=256, layers=3, heads=8, kv_heads=4, head_dim=32, ffn=256, vocab=301)
DTYPES = ["float32", "bfloat16"]
LENGTHS = (3, 70, 41)
"""In one step as well: more than the layers take at once here, and not a multiple of that."""
NUM_TOKENS = 8


def load(model: Path, dtype: str, mesh: Mesh | None = None) -> NativeEngine:
    engine = native(model, mesh, dtype=dtype)
    assert isinstance(engine._model.kernel_layers, KernelLayers)
    return engine


def tokens_of(engine: NativeEngine, group: dist.ProcessGroup | None = None) -> list[list[int]]:
    prompts = prompts_for(SHAPE.vocab, *LENGTHS)
    return [
        *generate(engine, prompts, NUM_TOKENS, chunk=5, group=group),
        *generate(engine, prompts, NUM_TOKENS, chunk=100, block_size=16, group=group),
    ]


def run_rank(rank: int, size: int, threads: int, root: Path) -> None:
    library._BYTES_A_THREAD = 1  # all of them for any work
    kernel_layers._AT_ONCE = 64
    cpu.has_bfloat16 = lambda: False  # as on a processor without
    torch.set_num_threads(threads)
    init, patience = f"file://{root}/init", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=size, timeout=patience)
    group = dist.group.WORLD
    shared = SharedGroup(root / "shared", rank, size, timeout=60)
    mesh = Mesh(rank, tp_size=size, pp_size=1, device=torch.device("cpu"), tp_group=group, shared=shared)
    tokens = {dtype: tokens_of(load(root / "model", dtype, mesh), group) for dtype in DTYPES}
    torch.save(tokens, root / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "threads"), [(2, 1), (2, 3), (4, 1)])
def test_ranks_give_what_one_gives(size: int, threads: int, tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", SHAPE)
    run_to_end(run_rank, [(rank, size, threads, tmp_path) for rank in range(size)], seconds=120)
    outcomes = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert outcomes[0]["float32"] == tokens_of(load(model, "float32"))
    expected = tokens_of(load(model, "bfloat16"))
    rows = zip(outcomes[0]["bfloat16"], expected, strict=True)
    same = [a == b for got, want in rows for a, b in zip(got, want, strict=True)]
    assert sum(same) > 0.6 * len(same)  # rounded otherwise, a close choice may differ


def test_a_rank_that_stays_away_is_a_timeout(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", SHAPE)
    shared = SharedGroup(tmp_path / "shared", 0, 2, timeout=0.05)
    mesh = Mesh(0, tp_size=2, pp_size=1, device=torch.device("cpu"), shared=shared)
    engine = load(model, "float32", mesh)
    other = SharedGroup(tmp_path / "shared", 1, 2, timeout=0.05)
    other._counters[8] = 1  # it has given its share of the embeddings, and died
    driver = Driver(engine, 4, 16)
    with pytest.raises(TimeoutError, match="operation 2 within"):
        driver.step([driver.add([1, 2, 3], 4)], 3)
    assert shared.num_operations == 1
