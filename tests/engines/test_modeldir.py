"""End tokens of a model directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engines.modeldir import BadModelDir, eos_token_ids


def write(directory: Path, name: str, value: object) -> None:
    (directory / name).write_text(json.dumps(value))


def test_generation_config_comes_first(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"eos_token_id": 128001})
    assert eos_token_ids(tmp_path) == (128001,)
    write(tmp_path, "generation_config.json", {"eos_token_id": [128009, 128001, 128008]})
    assert eos_token_ids(tmp_path) == (128001, 128008, 128009)


def test_config_speaks_where_generation_config_is_silent(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"eos_token_id": [2, 3]})
    write(tmp_path, "generation_config.json", {"temperature": 0.6})
    assert eos_token_ids(tmp_path) == (2, 3)


def test_a_model_may_have_no_end_token(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"eos_token_id": None})
    assert eos_token_ids(tmp_path) == ()


@pytest.mark.parametrize("value", ["</s>", [1, "2"], -1, True, {"id": 2}])
def test_anything_else_is_refused(tmp_path: Path, value: object) -> None:
    write(tmp_path, "config.json", {"eos_token_id": value})
    with pytest.raises(BadModelDir, match=r"config\.json: eos_token_id must be"):
        eos_token_ids(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read as JSON"), ("[]", "expected a JSON object")]
)
def test_a_broken_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadModelDir, match=r"config\.json: " + message):
        eos_token_ids(tmp_path)


def test_it_needs_no_torch() -> None:
    code = "import sys, engines.modeldir; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
