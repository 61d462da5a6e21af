"""End tokens and fingerprint of a model directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines.modeldir import BadModelDir, eos_token_ids, fingerprint
from tests.models import GQA, make_llama


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


def test_the_fingerprint_is_of_what_is_in_the_directory_not_of_where_it_is(tmp_path: Path) -> None:
    first = make_llama(tmp_path / "first", GQA, seed=1, shard_bytes=1 << 17)
    assert len(list(first.glob("*.safetensors"))) > 1
    shutil.copytree(first, tmp_path / "copy")
    assert fingerprint(first) == fingerprint(tmp_path / "copy")
    assert len(fingerprint(first)) == 12


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    """The same configuration, names, shapes and sizes: only the values differ."""
    models = [make_llama(tmp_path / str(seed), GQA, seed=seed) for seed in (1, 2)]
    sizes = {(model / "model.safetensors").stat().st_size for model in models}
    assert len(sizes) == 1
    assert fingerprint(models[0]) != fingerprint(models[1])


@pytest.mark.parametrize("layout", [".", "tp0-of-2"], ids=["hugging face", "of a rank"])
def test_one_tensor_of_many_is_seen(tmp_path: Path, layout: str) -> None:
    """A sixteenth of 8 MiB, wherever it is; and the last byte."""
    size, header = 8 << 20, 8 + 1000
    path = tmp_path / layout / "weights.safetensors"
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text("{}")
    content = (1000).to_bytes(8, "little") + bytes(1000 + size)
    found = set()
    for number in range(17):
        changed = bytearray(content)
        start = header + number * size // 16
        changed[start : start + size // 16] = b"\1" * min(size // 16, len(content) - start)
        if number == 16:
            changed = bytearray(content[:-1] + b"\1")
        path.write_bytes(changed)
        found.add(fingerprint(tmp_path))
    path.write_bytes(content)
    assert len(found | {fingerprint(tmp_path)}) == 18


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "generation_config.json"])
def test_the_end_of_a_long_text_counts(tmp_path: Path, name: str) -> None:
    """A manifest is larger than any first part of it, and what differs may come last."""
    found = set()
    for end in ("1", "2"):
        write(tmp_path, name, {"long": "x" * 200_000, "end": end})
        found.add(fingerprint(tmp_path))
    assert len(found) == 2
