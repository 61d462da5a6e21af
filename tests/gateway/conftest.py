"""A model directory without a model, and a group that answers a fixed text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes import FakeGroup
from tests.gateway.serving import make_group, make_model_dir


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture
def group(model_dir: Path) -> FakeGroup:
    return make_group(model_dir)
