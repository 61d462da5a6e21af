"""Loading: what is wrong with a checkpoint is said before it serves, with the file and the tensor."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.base import COPY_AGAIN, BadCheckpoint
from engines.models.checkpoint import Checkpoint
from engines.models.config import LlamaConfig
from engines.models.names import RULES, Placement, Slice, expected_tensors, slice_of
from tests.models import GQA, MHA, ODD, Shape, make_llama

WEIGHTS = "model.safetensors"
NORM = "model.layers.1.input_layernorm.weight"


def open_and_check(directory: Path) -> None:
    config = LlamaConfig.load(directory)
    checkpoint = Checkpoint(directory)
    checkpoint.check(expected_tensors(config).values())
    for name, spec in expected_tensors(config).items():
        checkpoint.read_into(torch.empty(spec.shape), name, Slice(0, 0, spec.shape[0]))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def truncate(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[:-100])


def shrink_to_nothing(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"\0\0")


def garble_header(directory: Path) -> None:
    data = bytearray((directory / WEIGHTS).read_bytes())
    data[8:12] = b"!!!!"
    (directory / WEIGHTS).write_bytes(data)


def claim_a_huge_header(directory: Path) -> None:
    data = bytearray((directory / WEIGHTS).read_bytes())
    data[:8] = struct.pack("<Q", 1 << 60)
    (directory / WEIGHTS).write_bytes(data)


def overlap_offsets(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[NORM]["data_offsets"] = [0, 4 * MHA.hidden]
    text = json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rename_a_pickle(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(pickle.dumps({"weight": [1.0]}))


def rename_a_torch_zip(directory: Path) -> None:
    torch.save({"weight": torch.ones(2)}, directory / WEIGHTS)


def leave_only_a_bin(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def leave_a_shard(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "model-00001-of-00002.safetensors")


def leave_a_pointer(directory: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 16060556376\n"
    (directory / WEIGHTS).write_text(text)


def leave_a_web_page(directory: Path) -> None:
    (directory / WEIGHTS).write_text("<!doctype html><title>Access denied</title>")


def quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = tensors[NORM].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, rf"{WEIGHTS}: tensor [\w.]+: truncated.*: {COPY_AGAIN}"),
        (shrink_to_nothing, rf"{WEIGHTS}: truncated: 2 bytes.*: {COPY_AGAIN}"),
        (garble_header, rf"{WEIGHTS}: corrupt header.*: {COPY_AGAIN}"),
        (claim_a_huge_header, rf"{WEIGHTS}: corrupt or truncated.*: {COPY_AGAIN}"),
        (leave_a_pointer, rf"{WEIGHTS}: is a pointer of Git LFS, not the weights: run `git lfs pull`"),
        (leave_a_web_page, rf"{WEIGHTS}: is a web page, not the weights: {COPY_AGAIN}"),
        (overlap_offsets, rf"{WEIGHTS}: tensor [\w.]+: cannot be read"),
        (rename_a_pickle, rf"{WEIGHTS}: holds a pickle.*sluice convert"),
        (rename_a_torch_zip, rf"{WEIGHTS}: holds a pickle.*sluice convert"),
        (leave_only_a_bin, r"pytorch_model\.bin: run `sluice convert (\S+) \1-hf --to hf`, and serve \1-hf"),
        (leave_a_shard, r"holds neither .* \(but model-00001-of-00002\.\w+\): download model\.\w+\.index"),
        (lambda d: (d / WEIGHTS).unlink(), r"holds neither model\.safetensors nor"),
        (lambda d: edit(d, lambda t: t.pop(NORM)), f"tensor {NORM}: missing"),
        (
            lambda d: edit(d, lambda t: t.update({NORM: torch.ones(3)})),
            rf"{NORM}: its shape is \[3\].* \[64\]",
        ),
        (lambda d: edit(d, quantise), f"tensor {NORM}: is I8; F32, BF16, F16"),
        (lambda d: edit(d, lambda t: t.update(extra=torch.ones(1))), "tensor extra: .* no place"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    directory = make_llama(tmp_path, MHA)
    open_and_check(directory)
    damage(directory)
    with pytest.raises(BadCheckpoint, match=message):
        open_and_check(directory)


def reindex(directory: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def link_out(directory: Path) -> None:
    outside = directory.parent / "elsewhere.safetensors"
    shard = sorted(directory.glob("model-*.safetensors"))[0]
    shard.rename(outside)
    shard.symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: reindex(d, lambda m: m.update({NORM: "../x.safetensors"})),
            "only names of files beside it",
        ),
        (lambda d: reindex(d, lambda m: m.update({NORM: "/etc/passwd"})), "only names of files beside it"),
        (
            lambda d: reindex(d, lambda m: m.update({NORM: ".."})),
            r"cannot|only names|leads out|no such|directory",
        ),
        (lambda d: reindex(d, lambda m: m.update({NORM: "x.pth"})), "sluice convert"),
        (lambda d: reindex(d, lambda m: m.update({NORM: 7})), "weight_map must be"),
        (lambda d: reindex(d, lambda m: m.pop(NORM)), f"tensor {NORM}: missing"),
        (lambda d: reindex(d, lambda m: m.update(other=m[NORM])), "tensor other: missing, though"),
        (lambda d: sorted(d.glob("model-*.safetensors"))[1].unlink(), "model-00002-of-.*: no such file"),
        (link_out, "leads out of the model directory"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    directory = make_llama(tmp_path / "model", MHA, shard_bytes=100_000)
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    open_and_check(directory)
    damage(directory)
    with pytest.raises(BadCheckpoint, match=message):
        open_and_check(directory)


def test_links_into_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = make_llama(tmp_path / "snapshots" / "revision", MHA, shard_bytes=100_000)
    (tmp_path / "blobs").mkdir()
    for shard in snapshot.glob("model-*.safetensors"):
        shard.rename(tmp_path / "blobs" / shard.name)
        shard.symlink_to(Path("../../blobs") / shard.name)
    open_and_check(snapshot)


@pytest.mark.parametrize("shape", [MHA, GQA, ODD])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_ranks_slices_make_up_the_tensor(tmp_path: Path, shape: Shape, tp: int) -> None:
    directory = make_llama(tmp_path, shape)
    config, checkpoint = LlamaConfig.load(directory), Checkpoint(directory)
    whole = load_file(directory / WEIGHTS)
    for name, spec in expected_tensors(config).items():
        parts = []
        for rank in range(tp):
            part = slice_of(spec.rule.placement, spec.shape, config, rank, tp)
            size = list(spec.shape)
            size[part.dim] = part.length
            parts.append(torch.full(size, torch.nan))
            checkpoint.read_into(parts[-1], name, part)
        match spec.rule.placement:
            case Placement.REPLICATED:
                assert all(torch.equal(part, whole[name]) for part in parts)
            case Placement.KV_COLUMN if config.num_kv_heads < tp:
                copies = tp // config.num_kv_heads
                assert torch.equal(torch.cat(parts[::copies]), whole[name])
                assert all(torch.equal(part, parts[i // copies * copies]) for i, part in enumerate(parts))
            case Placement.VOCAB:
                joined = torch.cat(parts)
                assert torch.equal(joined[: config.vocab_size], whole[name])
                assert not joined[config.vocab_size :].any()
            case _:
                joined = torch.cat(parts, dim=1 if spec.rule.placement is Placement.ROW else 0)
                assert torch.equal(joined, whole[name])


def test_the_table_names_each_tensor_once_both_ways() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert len({rule.meta_name for rule in RULES}) == len(RULES)
    assert all(("{layer}" in rule.name) == ("{layer}" in rule.meta_name) for rule in RULES)


def test_the_table_is_what_hugging_face_saves(tmp_path: Path) -> None:
    from transformers import LlamaConfig as HuggingFaceConfig
    from transformers import LlamaForCausalLM

    for number, shape in enumerate((MHA, GQA, ODD)):
        directory = tmp_path / str(number)
        LlamaForCausalLM(HuggingFaceConfig(**shape.config_json(torch.float32))).save_pretrained(directory)
        open_and_check(directory)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_begins_as_pickles_do_is_none(length: int, tmp_path: Path) -> None:
    entry = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = tmp_path / WEIGHTS
    file.write_bytes(struct.pack("<Q", length) + entry.ljust(length) + bytes(4))
    assert load_file(file)["x"].shape == (1,)
    assert Checkpoint(tmp_path).tensors["x"].shape == (1,)
