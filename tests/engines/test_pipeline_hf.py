"""Hugging Face models in the pipeline, by their pp plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.base import UnsupportedModel
from engines.models import hf
from engines.models.hf_inspect import inspect_model
from engines.models.hf_stage import HFStage, sizes_of
from engines.models.stages import split_layers
from tests.engines.harness import StartFailed, running
from tests.engines.models.hf_models import BASE, make_hf
from tests.engines.test_pipeline import config_for, tokens_equal

LAYERS = 3


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3", {"tie_word_embeddings": True}),
        ("mistral", {}),
        ("gemma", {}),
    ],
)
def test_stages_give_the_tokens_of_the_whole(tmp_path: Path, kind: str, changes: dict[str, object]) -> None:
    model = make_hf(tmp_path / kind, kind, num_hidden_layers=LAYERS, **changes)
    with running(config_for(model)) as group:
        assert tokens_equal(group, model, BASE["vocab_size"])


def test_a_stage_reads_its_own_weights_only(tmp_path: Path) -> None:
    found = inspect_model(make_hf(tmp_path, "qwen3", num_hidden_layers=LAYERS), None)
    checkpoint = hf.open_checkpoint(found)
    first, last = split_layers(sizes_of(found, checkpoint), 2, (1, 2))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()
    held = [parameters_of(found, checkpoint, layers) for layers in (first, last)]
    assert sum(held) == whole
    assert all(held)


def parameters_of(found: hf.HFModel, checkpoint: hf.Checkpoint, layers: range) -> int:
    read = []
    original = checkpoint.read_into
    checkpoint.read_into = lambda out, name, part: (read.append(out.numel()), original(out, name, part))[1]  # type: ignore[method-assign]
    HFStage(found, checkpoint, torch.float32, layers, torch.device("cpu"), lambda fraction: None)
    checkpoint.read_into = original  # type: ignore[method-assign]
    return sum(read)


def test_what_scales_its_embedding_outside_of_the_plan_is_refused(tmp_path: Path) -> None:
    found = inspect_model(
        make_hf(tmp_path, "granite", num_hidden_layers=LAYERS, embedding_multiplier=3.0), None
    )
    checkpoint = hf.open_checkpoint(found)
    with pytest.raises(UnsupportedModel, match="'granite' changes hidden states between"):
        parameters_of(found, checkpoint, range(1))


def test_tensor_parallel_stages_are_for_llamas(tmp_path: Path) -> None:
    model = make_hf(tmp_path, "qwen3", num_hidden_layers=LAYERS)
    with pytest.raises(StartFailed, match="'qwen3' cannot be split over 2 ranks each"):
        running(config_for(model, tp_size=2, parallel_type="pptp")).__enter__()
