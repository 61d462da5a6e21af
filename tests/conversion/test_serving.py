"""The native engine on per-rank files: mapped, the same weights as its own slices, and the same tokens."""

from __future__ import annotations

import json
import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conversion.plan import Target
from engines.base import BadCheckpoint, UnsupportedModel
from engines.models.checkpoint import Checkpoint
from engines.models.config import LlamaConfig
from engines.models.llama import WeightLoader
from engines.models.rank_weights import MappedRank, open_weights
from engines.models.stages import sizes_of, split_layers
from engines.runtime.mesh import Mesh, single
from tests.conversion.helpers import ODD_FOR_META, convert
from tests.engines.driver import generate, native
from tests.engines.test_native import hf_greedy, prompts_for
from tests.models import GQA, ODD, Shape, make_llama

SHAPES = {"gqa": GQA, "odd": ODD_FOR_META}
CPU = torch.device("cpu")


def fused_names(layer: int) -> list[tuple[str, ...]]:
    prefix = f"model.layers.{layer}."
    attention = tuple(f"{prefix}self_attn.{kind}_proj.weight" for kind in "qkv")
    mlp = tuple(f"{prefix}mlp.{kind}_proj.weight" for kind in ("gate", "up"))
    return [attention, mlp, (f"{prefix}self_attn.o_proj.weight",), (f"{prefix}input_layernorm.weight",)]


def names_of(config: LlamaConfig, layers: range) -> list[tuple[str, ...]]:
    names = [name for layer in layers for name in fused_names(layer)]
    first, last = layers.start == 0, layers.stop == config.num_layers
    if first or (last and config.tie_word_embeddings):
        names.append(("model.embed_tokens.weight",))
    if last:
        names.append(("model.norm.weight",))
    if last and not config.tie_word_embeddings:
        names.append(("lm_head.weight",))
    return names


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2), (1, 2)])
def test_every_rank_maps_what_it_would_have_sliced(tmp_path: Path, name: str, tp: int, pp: int) -> None:
    hf = make_llama(tmp_path / "hf", SHAPES[name], 8, torch.bfloat16)
    config = LlamaConfig.load(hf)
    convert(hf, tmp_path / "s", Target("sluice", tp=tp, pp=pp))
    stages = split_layers(sizes_of(config), pp)
    for rank in range(tp * pp):
        mesh = Mesh(rank=rank, tp_size=tp, pp_size=pp, device=CPU)
        layers = stages[mesh.stage]
        ours = open_weights(tmp_path / "s", config, mesh, layers)
        assert isinstance(ours, MappedRank)
        loaders = [
            WeightLoader(weights, config, mesh, torch.bfloat16, lambda *_: None)
            for weights in (ours, Checkpoint(hf))
        ]
        for names in names_of(config, layers):
            mapped, sliced = (loader.load(*names) for loader in loaders)
            assert torch.equal(mapped, sliced), names
            assert ours.mapped(names, torch.bfloat16) is not None, "one view of the file"


def test_mapped_weights_are_the_files_own_pages(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 8)
    convert(hf, tmp_path / "s", Target("sluice"))
    weights = open_weights(tmp_path / "s", LlamaConfig.load(hf), single(), range(GQA.layers))
    names = fused_names(0)[0]
    one, other = weights.mapped(names, torch.float32), weights.mapped(names[1:], torch.float32)
    assert one is not None
    assert other is not None
    assert one.data_ptr() + GQA.hidden * GQA.heads * GQA.head_dim * 4 == other.data_ptr()


def test_another_dtype_than_the_files_is_read_not_mapped(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", ODD, 8)
    convert(hf, tmp_path / "s", Target("sluice"))
    engines = [native(directory, dtype="bfloat16") for directory in (hf, tmp_path / "s")]
    prompts = prompts_for(ODD.vocab, 9)
    assert generate(engines[0], prompts, 8) == generate(engines[1], prompts, 8)


def test_files_for_another_group_are_refused_with_the_command(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 8)
    convert(hf, tmp_path / "s", Target("sluice", tp=2))
    with pytest.raises(UnsupportedModel) as refused:
        native(tmp_path / "s")
    command = f"sluice convert {tmp_path}/s {tmp_path}/s-tp1-pp1 --to sluice --tp 1 --pp 1"
    assert command in str(refused.value)
    assert "reshard: true" in str(refused.value)


def test_other_stages_are_refused_with_the_key(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 8)
    convert(hf, tmp_path / "s", Target("sluice", pp=2, stage_split=(1, 2)))
    config, mesh = LlamaConfig.load(hf), Mesh(rank=0, tp_size=1, pp_size=2, device=CPU)
    assert isinstance(open_weights(tmp_path / "s", config, mesh, range(1, 3)), MappedRank)
    with pytest.raises(UnsupportedModel, match=r"set stageSplit: \[1, 2\]"):
        open_weights(tmp_path / "s", config, mesh, range(2, 3))


def test_engines_that_read_whole_models_name_the_command(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 8)
    convert(hf, tmp_path / "s", Target("sluice", tp=2))
    with pytest.raises(BadCheckpoint, match=rf"`sluice convert {tmp_path}/s {tmp_path}/s-hf --to hf`"):
        Checkpoint(tmp_path / "s")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (4, 1)])
def test_they_are_divided_anew_on_request(tmp_path: Path, name: str, tp: int, pp: int) -> None:
    hf = make_llama(tmp_path / "hf", SHAPES[name], 8)
    convert(hf, tmp_path / "s", Target("sluice", tp=tp, pp=pp))
    prompts = prompts_for(SHAPES[name].vocab, 9, 30)
    assert generate(native(tmp_path / "s", reshard=True), prompts, 8) == generate(native(hf), prompts, 8)
    config = LlamaConfig.load(hf)
    mesh = Mesh(rank=1, tp_size=2, pp_size=1, device=CPU)
    resharded = open_weights(tmp_path / "s", config, mesh, range(config.num_layers), reshard=True)
    for names in names_of(config, range(config.num_layers)):
        loads = (
            WeightLoader(w, config, mesh, torch.float32, lambda *_: None) for w in (resharded, Checkpoint(hf))
        )
        assert torch.equal(*(loader.load(*names) for loader in loads)), names


def test_a_renamed_rank_is_seen(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 8)
    convert(hf, tmp_path / "s", Target("sluice", tp=2))
    one, other = (tmp_path / "s" / f"tp{rank}-of-2" / "pp0-of-1.safetensors" for rank in (0, 1))
    one.write_bytes(other.read_bytes())
    mesh = Mesh(rank=0, tp_size=2, pp_size=1, device=CPU)
    with pytest.raises(BadCheckpoint, match=r"tp0-of-2.*written as tp1-of-2"):
        open_weights(tmp_path / "s", LlamaConfig.load(hf), mesh, range(GQA.layers))


def run_rank(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/init", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    mesh = Mesh(rank=rank, tp_size=2, pp_size=1, device=CPU, tp_group=dist.new_group([0, 1]))
    tokens = {}
    for name, shape in SHAPES.items():
        engine = native(root / f"{name}-s", mesh)
        tokens[name] = generate(engine, prompts_for(shape.vocab, 5, 20), 16, group=mesh.tp_group)
    if rank == 0:
        (root / "tokens.json").write_text(json.dumps(tokens))
    dist.destroy_process_group()


def through_meta(root: Path, name: str, shape: Shape) -> list[list[int]]:
    """Hugging Face's tokens of a model that then goes through Meta's format into files for two ranks."""
    hf = make_llama(root / name, shape, seed=9)
    convert(hf, root / f"{name}-meta", Target("meta", shards=2))
    convert(root / f"{name}-meta", root / f"{name}-s", Target("sluice", tp=2))
    return [hf_greedy(hf, prompt, 16) for prompt in prompts_for(shape.vocab, 5, 20)]


def test_two_ranks_give_hugging_faces_tokens(tmp_path: Path) -> None:
    expected = {name: through_meta(tmp_path, name, shape) for name, shape in SHAPES.items()}
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, tmp_path)) for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=120)
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert json.loads((tmp_path / "tokens.json").read_text()) == expected
