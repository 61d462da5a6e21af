"""A small Llama, served in this process, and the same by transformers; a module may have its own instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.base import Engine
from tests.engines.runtime.in_process import load
from tests.models import GQA, make_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "gqa", GQA, seed=3)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return load(model)


@pytest.fixture(scope="module")
def reference(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
