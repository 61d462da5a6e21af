"""What is wrong with a checkpoint is said in one line with file and tensor; nothing of it is ever run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.main import USER_ERRORS
from conversion.open import open_checkpoint
from conversion.pickled import read_pickled
from conversion.plan import Target
from conversion.source import Choices
from conversion.verify import check_source
from engines.base import COPY_AGAIN, BadCheckpoint
from tests.conversion.helpers import convert
from tests.conversion.hostile import as_pth, payloads
from tests.models import GQA, MHA, make_llama

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("what", ["os.system", "in a tensor's place", "nothing"])
def test_a_hostile_pickle_is_refused_in_a_line_with_the_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(as_pth(dict(payloads(tmp_path / "canary"))[what]))
    with pytest.raises(BadCheckpoint) as error:
        read_pickled(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_forbidden_name_is_told(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "x.pth").write_bytes(as_pth(dict(payloads(canary))["os.system"]))
    with pytest.raises(BadCheckpoint, match=r"x\.pth: its pickle .*os.*: refused, nothing of it has run"):
        read_pickled(tmp_path / "x.pth")


def test_hostile_pickles_never_run_and_damaged_files_never_crash() -> None:
    argv = [sys.executable, "-m", "tests.soak.convert_hostile", "--trials", "240"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(argv, capture_output=True, text=True, timeout=600, cwd=ROOT, env=env)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["pickles_refused"] >= 60
    assert sum(figures["outcomes"].values()) == 240
    assert figures["outcomes"]["refused"] > 100


Damage = Callable[[Path], object]


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


HF_DAMAGE: dict[str, tuple[Damage, str]] = {
    "truncated": (
        lambda d: os.truncate(d / "model.safetensors", 20_000),
        rf"model\.safetensors: tensor .*: truncated: .*: {COPY_AGAIN}",
    ),
    "empty": (
        lambda d: os.truncate(d / "model.safetensors", 0),
        rf"model\.safetensors: truncated: .*: {COPY_AGAIN}",
    ),
    "renamed": (
        lambda d: (d / "model.safetensors").rename(d / "weights.safetensors"),
        r"no checkpoint that is known \(weights\.safetensors alone is none\): copy or download",
    ),
    "missing": (lambda d: (d / "model.safetensors").unlink(), "holds no checkpoint that is known"),
    "a tensor missing": (
        lambda d: rewrite(d / "model.safetensors", lambda t: t.pop("model.norm.weight")),
        r"tensor model\.norm\.weight: missing",
    ),
    "an unknown tensor": (
        lambda d: rewrite(d / "model.safetensors", lambda t: t.update(odd=torch.ones(3))),
        r"tensor odd: unknown: .*--allow-extra",
    ),
    "an odd shape": (
        lambda d: rewrite(d / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        r"tensor model\.norm\.weight: its shape is \[3\], config\.json makes it \[96\]",
    ),
    "an odd dtype": (
        lambda d: rewrite(
            d / "model.safetensors",
            lambda t: t.update({"model.norm.weight": torch.ones(96, dtype=torch.int64)}),
        ),
        r"tensor model\.norm\.weight: is I64",
    ),
    "no config": (
        lambda d: (d / "config.json").unlink(),
        r"config\.json: missing: .*copy or download it, and the tokenizer's",
    ),
    "another model's config": (lambda d: edit(d / "config.json", hidden_size=100), r"its shape is"),
    "not a Llama": (lambda d: edit(d / "config.json", model_type="gpt2"), "model_type"),
}


@pytest.mark.parametrize("name", HF_DAMAGE)
def test_a_damaged_hugging_face_checkpoint(tmp_path: Path, name: str) -> None:
    damage, message = HF_DAMAGE[name]
    hf = make_llama(tmp_path / "hf", GQA)
    damage(hf)
    with pytest.raises(USER_ERRORS, match=message):
        convert(hf, tmp_path / "out", Target("hf"))
    assert not (tmp_path / "out").exists()


def reindex(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


INDEX_DAMAGE: dict[str, tuple[Damage, str]] = {
    "lies about a file": (
        lambda d: reindex(d, lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]})),
        r"tensor model\.norm\.weight: (missing, though|duplicate: )",
    ),
    "leaves a tensor out": (
        lambda d: reindex(d, lambda m: m.pop("model.norm.weight")),
        r"tensor model\.norm\.weight: model\.safetensors\.index\.json does not name it",
    ),
    "names a file that is not there": (
        lambda d: reindex(d, lambda m: m.update(odd="odd.safetensors")),
        r"odd\.safetensors: missing: model\.safetensors\.index\.json names \d+ files: copy or download it",
    ),
    "leads out of the directory": (
        lambda d: reindex(d, lambda m: m.update(odd="../../etc/passwd")),
        "only names of files beside it",
    ),
    "is absolute": (
        lambda d: reindex(d, lambda m: m.update(odd="/etc/passwd")),
        "only names of files beside",
    ),
    "is a link that leads out": (
        lambda d: (
            (d / "odd.safetensors").symlink_to("/etc/passwd"),
            reindex(d, lambda m: m.update(odd="odd.safetensors")),
        ),
        "is a link that leads out",
    ),
    "is no object": (
        lambda d: (d / "model.safetensors.index.json").write_text("[]"),
        "expected a JSON object",
    ),
}


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_an_index_that_lies(tmp_path: Path, name: str) -> None:
    damage, message = INDEX_DAMAGE[name]
    hf = make_llama(tmp_path / "hf", GQA, shard_bytes=200_000)
    damage(hf)
    with pytest.raises(USER_ERRORS, match=message):
        open_checkpoint(hf)


META_DAMAGE: dict[str, tuple[Damage, str]] = {
    "a shard missing": (
        lambda d: (d / "consolidated.01.pth").unlink(),
        r"consolidated\.01\.pth: missing: the model is in 4 shards, 00 to 03",
    ),
    "a shard twice": (
        lambda d: (d / "consolidated.1.pth").write_bytes((d / "consolidated.01.pth").read_bytes()),
        r"consolidated\.1\.pth: duplicate|consolidated\.01\.pth: duplicate",
    ),
    "a shard copied over another": (
        lambda d: (d / "consolidated.02.pth").write_bytes((d / "consolidated.01.pth").read_bytes()),
        r"consolidated\.02\.pth: duplicate: holds the same weights as consolidated\.01\.pth",
    ),
    "the last one missing": (
        lambda d: (d / "consolidated.03.pth").unlink(),
        r"consolidated\.03\.pth: missing: the model is in 4 shards, 00 to 03",
    ),
    "truncated": (
        lambda d: os.truncate(d / "consolidated.02.pth", 30_000),
        rf"consolidated\.02\.pth: truncated or corrupt \(30\.0 kB\): .*: {COPY_AGAIN}",
    ),
    "a pointer of Git LFS": (
        lambda d: (d / "consolidated.02.pth").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"consolidated\.02\.pth: is a pointer of Git LFS, not the weights: run `git lfs pull`",
    ),
    "an old pickle": (
        lambda d: (d / "consolidated.02.pth").write_bytes(pickle.dumps({}, protocol=2)),
        r"consolidated\.02\.pth: is in torch's format from before version 1\.6: if it is yours",
    ),
    "no params": (lambda d: (d / "params.json").unlink(), r"params\.json: missing"),
    "another dim": (lambda d: edit(d / "params.json", dim=65), r"params\.json: dim \(65\)"),
    "more layers": (lambda d: edit(d / "params.json", n_layers=3), r"params\.json: n_layers \(3\)"),
}


@pytest.mark.parametrize("name", META_DAMAGE)
def test_a_damaged_meta_checkpoint(tmp_path: Path, name: str) -> None:
    damage, message = META_DAMAGE[name]
    hf = make_llama(tmp_path / "hf", MHA)
    convert(hf, tmp_path / "meta", Target("meta", shards=4))
    damage(tmp_path / "meta")
    with pytest.raises(USER_ERRORS, match=message):
        convert(tmp_path / "meta", tmp_path / "out", Target("hf"))
    assert not (tmp_path / "out").exists()


def test_wrong_params_without_a_manifest(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", MHA)
    convert(hf, tmp_path / "meta", Target("meta", shards=2))
    (tmp_path / "meta" / "manifest.json").unlink()
    choices = Choices(max_positions=2048)
    assert open_checkpoint(tmp_path / "meta", choices).config.num_heads == MHA.heads
    for wrong, message in (
        ({"n_heads": 5}, "n_heads"),
        ({"n_kv_heads": 2}, "n_kv_heads"),
        ({"vocab_size": 5}, "vocab_size"),
        ({"multiple_of": 7}, "multiple_of"),
        ({"n_layers": 5}, r"layers\.2\.attention_norm\.weight: missing"),
        ({"dim": "64"}, "dim"),
        ({"norm_eps": None}, "norm_eps"),
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args"),
    ):
        original = (tmp_path / "meta" / "params.json").read_text()
        edit(tmp_path / "meta" / "params.json", **wrong)
        with pytest.raises(USER_ERRORS, match=message):
            open_checkpoint(tmp_path / "meta", choices)
        (tmp_path / "meta" / "params.json").write_text(original)


def test_shards_of_two_models_do_not_mix(tmp_path: Path) -> None:
    for seed in (1, 2):
        hf = make_llama(tmp_path / f"hf{seed}", MHA, seed)
        convert(hf, tmp_path / f"meta{seed}", Target("meta", shards=2))
    stray = tmp_path / "meta2" / "consolidated.01.pth"
    (tmp_path / "meta1" / "consolidated.01.pth").write_bytes(stray.read_bytes())
    with pytest.raises(
        BadCheckpoint, match=r"consolidated\.01\.pth: tensor .*norm.*: is not what consolidated"
    ):
        convert(tmp_path / "meta1", tmp_path / "out", Target("hf"))


@pytest.mark.parametrize("what", ["checksum", "md5"])
def test_a_changed_value_is_found_by_what_the_source_says(tmp_path: Path, what: str) -> None:
    hf = make_llama(tmp_path / "hf", MHA)
    meta = tmp_path / "meta"
    convert(hf, meta, Target("meta", shards=2))
    (meta / "manifest.json").unlink()
    source = open_checkpoint(meta, Choices(max_positions=2048))
    assert "2 file(s) match their own checksums" in check_source(source)
    path = meta / "consolidated.01.pth"
    data = bytearray(path.read_bytes())
    if what == "md5":
        (meta / "checklist.chk").write_text(f"{'0' * 32}  consolidated.01.pth\n")
    else:
        data[-20_000] ^= 1
        path.write_bytes(data)
    with pytest.raises(
        BadCheckpoint, match=rf"consolidated\.01\.pth: .*is damaged: its {what}.*: {COPY_AGAIN}"
    ):
        check_source(open_checkpoint(meta, Choices(max_positions=2048)))


def test_values_that_are_not_numbers_are_reported(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, dtype=torch.bfloat16)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = float("nan")
        tensors["lm_head.weight"][200, 90] = float("-inf")

    rewrite(hf / "model.safetensors", spoil)
    manifest = convert(hf, tmp_path / "out", Target("hf"))
    written = manifest.files["model.safetensors"].tensors
    odd = [name for name, tensor in written.items() if not tensor.is_finite]
    assert sorted(odd) == ["lm_head.weight", "model.norm.weight"]


def test_extra_tensors_are_left_out_on_request(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    rewrite(hf / "model.safetensors", lambda t: t.update(odd=torch.ones(3)))
    source = open_checkpoint(hf, Choices(allow_extra=True))
    assert source.ignored == ("odd",)
    assert "odd" not in source.tensors


def test_no_warning_reaches_the_user(tmp_path: Path) -> None:
    """A mapped file is read-only, which torch would warn about."""
    hf = make_llama(tmp_path / "hf", GQA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(hf, tmp_path / "out", Target("hf", dtype="BF16"))
