"""Hugging Face models in the pipeline, by their pp plan and, within stages, their tp plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from engines.base import UnsupportedModel
from engines.models import hf
from engines.models.hf_inspect import inspect_model
from engines.models.hf_stage import HFStage, sizes_of
from engines.models.hf_support import EXACT_TYPES, WITHOUT_PIPELINE_PLAN
from engines.models.stages import split_layers
from engines.pipeline import PipelineEngine
from engines.runtime.mesh import Mesh, single
from tests.engines.harness import running
from tests.engines.models.hf_models import BASE, make_hf
from tests.engines.models.test_hf import write_config
from tests.engines.test_pipeline import config_for, tokens_equal

LAYERS = 3


@pytest.mark.parametrize(
    ("kind", "changes", "tp"),
    [
        ("qwen3", {"tie_word_embeddings": True}, 1),
        ("qwen3", {"tie_word_embeddings": True}, 2),
        ("mistral", {}, 2),
        ("gemma", {"num_key_value_heads": 1}, 2),
        ("phi3", {}, 2),
    ],
)
def test_stages_give_the_tokens_of_the_whole(
    tmp_path: Path, kind: str, changes: dict[str, object], tp: int
) -> None:
    model = make_hf(tmp_path / kind, kind, num_hidden_layers=LAYERS, **changes)
    with running(config_for(model, tp_size=tp, parallel_type="pptp" if tp > 1 else "pp")) as group:
        assert tokens_equal(group, model, BASE["vocab_size"])


def test_types_without_a_pipeline_plan_are_known_by_name() -> None:
    plans = {kind: CONFIG_MAPPING[kind].base_model_pp_plan or {} for kind in EXACT_TYPES}
    without = [kind for kind, plan in plans.items() if set(plan) != {"embed_tokens", "layers", "norm"}]
    assert tuple(without) == WITHOUT_PIPELINE_PLAN


def test_a_stage_reads_its_own_weights_only(tmp_path: Path) -> None:
    found = inspect_model(make_hf(tmp_path, "qwen3", num_hidden_layers=LAYERS), None)
    checkpoint = hf.open_checkpoint(found)
    first, last = split_layers(sizes_of(found, checkpoint), 2, (1, 2))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()
    held = [elements_read(found, checkpoint, layers) for layers in (first, last)]
    assert sum(held) == whole
    assert all(held)


@pytest.mark.parametrize(("kind", "size_of_norms"), [("qwen3", 2 * 64 + 2 * 16), ("phi3", 2 * 64)])
def test_ranks_of_a_stage_read_their_slices_only(tmp_path: Path, kind: str, size_of_norms: int) -> None:
    found = inspect_model(make_hf(tmp_path, kind, num_hidden_layers=LAYERS, vocab_size=132), None)
    checkpoint = hf.open_checkpoint(found)
    meshes = [Mesh(rank, 2, 1, torch.device("cpu")) for rank in range(2)]
    held = [elements_read(found, checkpoint, range(LAYERS), mesh) for mesh in meshes]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()
    assert held[0] == held[1]
    assert sum(held) == whole + LAYERS * size_of_norms + 64  # norms are on both


def elements_read(
    found: hf.HFModel, checkpoint: hf.Checkpoint, layers: range, mesh: Mesh | None = None
) -> int:
    read = []
    original = checkpoint.read_into
    checkpoint.read_into = lambda out, name, part: (read.append(out.numel()), original(out, name, part))[1]  # type: ignore[method-assign]
    HFStage(found, checkpoint, torch.float32, layers, mesh or single(), lambda *_: None)
    checkpoint.read_into = original  # type: ignore[method-assign]
    return sum(read)


def test_what_scales_its_embedding_outside_of_the_plan_is_refused(tmp_path: Path) -> None:
    found = inspect_model(
        make_hf(tmp_path, "granite", num_hidden_layers=LAYERS, embedding_multiplier=3.0), None
    )
    checkpoint = hf.open_checkpoint(found)
    with pytest.raises(UnsupportedModel, match="'granite' changes hidden states between"):
        elements_read(found, checkpoint, range(1))


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({}, 3, r"config\.json: num_attention_heads \(4\) .* 3 ranks of a stage: set tensorParallel"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, r"num_key_value_heads \(3\) .* 2 ranks"),
    ],
    ids=["heads", "kv_heads"],
)
def test_heads_that_ranks_cannot_share_are_refused_before_weights_are_looked_for(
    tmp_path: Path, changes: dict[str, object], tp: int, message: str
) -> None:
    unread = write_config(tmp_path, "qwen3", num_hidden_layers=LAYERS, **changes)
    config, mesh = config_for(unread, tp_size=tp), Mesh(0, tp, 2, torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=message):
        PipelineEngine(config, mesh, lambda *_: None)


def set_plan(config: type[PreTrainedConfig], monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    plan = {f"layers.*.{name.replace('__', '.')}": style for name, style in changes.items()}
    both = (config.base_model_tp_plan or {}) | plan
    kept = {name: style for name, style in both.items() if style is not None}
    monkeypatch.setattr(config, "base_model_tp_plan", kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"self_attn__q_proj": "packed_colwise"}, "colwise, packed_colwise, rowwise in attention"),
        ({"self_attn__o_proj": "rowwise_split_input"}, "of colwise, rowwise_split_input in attention"),
        ({"mlp__up_proj": None}, r"has model\.layers\.0\.mlp\.up_proj\.weight, which .* does not divide"),
        ({"self_attn__v_proj": None}, r"has model\.layers\.0\.self_attn\.v_proj\.weight, which"),
    ],
    ids=["unknown", "mixed", "mlp", "attention"],
)
def test_a_plan_that_does_not_divide_all_of_a_layer_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    found = inspect_model(make_hf(tmp_path, "qwen3", num_hidden_layers=LAYERS), None)
    set_plan(type(found.config), monkeypatch, **changes)
    refuses_unread(found, rf"model_type \('qwen3'\) .*{message}.*: write parallelType: pp, or")


def test_a_type_without_a_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = inspect_model(make_hf(tmp_path, "qwen3", num_hidden_layers=LAYERS), None)
    monkeypatch.setattr(type(found.config), "base_model_tp_plan", None)
    refuses_unread(found, "model_type .* has no tensor-parallel plan")


def test_an_inner_size_that_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    found = inspect_model(make_hf(tmp_path, "qwen3", num_hidden_layers=LAYERS, intermediate_size=97), None)
    refuses_unread(found, r"intermediate_size \(97\) cannot be shared evenly by the 2 ranks")


def test_a_norm_over_heads_that_a_plan_cuts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = inspect_model(make_hf(tmp_path, "olmo2", num_hidden_layers=LAYERS), None)
    cut = {f"self_attn__{name}_proj": "colwise" for name in "qkv"} | {"self_attn__o_proj": "rowwise"}
    set_plan(type(found.config), monkeypatch, **cut)
    refuses_unread(found, r"has model\.layers\.0\.self_attn\.q_norm\.weight, which .* does not divide")


def test_a_plan_in_config_json_is_not_taken(tmp_path: Path) -> None:
    make_hf(tmp_path, "qwen3", num_hidden_layers=LAYERS)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"base_model_tp_plan": {"layers.*": "colwise"}}))
    found = inspect_model(tmp_path, None)
    mesh = Mesh(0, 2, 1, torch.device("cpu"))
    assert elements_read(found, hf.open_checkpoint(found), range(LAYERS), mesh)


def refuses_unread(found: hf.HFModel, message: str) -> None:
    """The second of two ranks refuses the model, and has read no weight."""
    checkpoint = hf.open_checkpoint(found)
    checkpoint.read_into = None  # type: ignore[assignment, method-assign]
    mesh = Mesh(1, 2, 1, torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=message):
        HFStage(found, checkpoint, torch.float32, range(LAYERS), mesh, lambda *_: None)
