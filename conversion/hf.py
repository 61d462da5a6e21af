"""Opens Hugging Face checkpoints: safetensors or pytorch_model*.bin, one file or many with an index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conversion.mapped import MappedFiles
from conversion.pickled import read_pickled
from conversion.problems import absent, collect
from conversion.source import Choices, Source
from conversion.tensors import Bytes, LogicalTensor, Part
from engines.base import BadCheckpoint
from engines.modeldir import BadModelDir, read_json
from engines.models.checkpoint import StoredTensor, read_header
from engines.models.config import LlamaConfig
from engines.models.layout import INDEX_NAME, SINGLE_NAME
from engines.models.manifest import read_manifest
from engines.models.names import IGNORED_SUFFIXES, TensorSpec, expected_tensors

Found = dict[str, tuple[StoredTensor, Bytes]]
_BIN_SINGLE, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def is_hf(root: Path) -> bool:
    return any((root / name).exists() for name in (INDEX_NAME, SINGLE_NAME, _BIN_INDEX, _BIN_SINGLE))


def open_hf(root: Path, choices: Choices) -> Source:
    """Raises BadCheckpoint, BadModelDir, UnsupportedModel."""
    if not (root / "config.json").exists():
        raise BadModelDir(
            f"{root / 'config.json'}: missing: the model's sizes are in it: copy or download it, and the "
            "tokenizer's files, from where the weights are from"
        )
    config_json = read_json(root / "config.json")
    config = LlamaConfig.parse(config_json, str(root / "config.json"))
    layout, found, files, notes = _locate(root)
    expected = expected_tensors(config)
    unknown = [] if choices.allow_extra else _unknown(found, expected)
    tensors, problems = collect(expected.values(), unknown, lambda spec: _tensor(root, spec, found))
    return Source(
        root,
        "hf",
        layout,
        config,
        config_json,
        tensors,
        tuple(files),
        ignored=tuple(name for name in found if name not in expected),
        notes=tuple(notes),
        problems=problems,
        manifest=read_manifest(root),
    )


def _locate(root: Path) -> tuple[str, Found, list[Path], list[str]]:
    maps = MappedFiles()

    def safetensors(path: Path) -> Found:
        return {name: (stored, maps.tensor(name, stored)) for name, stored in read_header(path).items()}

    if (root / INDEX_NAME).exists():
        found, files, notes = _indexed(root / INDEX_NAME, safetensors)
        return f"{len(files)} safetensors files with an index", found, files, notes
    if (root / SINGLE_NAME).exists():
        return "one safetensors file", safetensors(root / SINGLE_NAME), [root / SINGLE_NAME], []
    if (root / _BIN_INDEX).exists():
        found, files, notes = _indexed(root / _BIN_INDEX, read_pickled)
        return f"{len(files)} pytorch_model files with an index", found, files, notes
    return "one pytorch_model.bin", read_pickled(root / _BIN_SINGLE), [root / _BIN_SINGLE], []


def _indexed(index: Path, read: Callable[[Path], Found]) -> tuple[Found, list[Path], list[str]]:
    """What an index names, each tensor from the file that it says. The index is untrusted data."""
    weight_map, total = _weight_map(index)
    files = {name: index.parent / _beside(index, name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, path in files.items() if not path.exists()]
    if missing:
        raise absent(index.parent, missing, f"{index.name} names {len(files)} files")
    contents = {name: read(path) for name, path in files.items()}
    for file, content in contents.items():
        _check_against_index(index, files[file], weight_map, file, content)
    found = {}
    for tensor, file in weight_map.items():
        if tensor not in contents[file]:
            raise BadCheckpoint(f"{files[file]}: tensor {tensor}: missing, though {index.name} names it")
        found[tensor] = contents[file][tensor]
    real = sum(stored.num_bytes for stored, _ in found.values())
    lies = total is not None and total != real
    notes = [f"{index.name}: total_size says {total}, the tensors have {real} bytes"] if lies else []
    return found, list(files.values()), notes


def _check_against_index(
    index: Path, path: Path, weight_map: dict[str, str], file: str, content: Found
) -> None:
    for tensor in content:
        if tensor not in weight_map:
            raise BadCheckpoint(f"{path}: tensor {tensor}: {index.name} does not name it")
        if weight_map[tensor] != file:
            raise BadCheckpoint(
                f"{path}: tensor {tensor}: duplicate: {index.name} says that it is in {weight_map[tensor]}"
            )


def _beside(index: Path, name: str) -> str:
    if Path(name).name != name or name in ("", ".", ".."):
        raise BadCheckpoint(f"{index}: names the shard {name!r}: only names of files beside it are allowed")
    path, root = index.parent / name, index.parent.resolve()
    if path.resolve().parent not in (root, root.parent.parent / "blobs"):
        raise BadCheckpoint(f"{path}: is a link that leads out of the model directory: copy the file there")
    return name


def _weight_map(index: Path) -> tuple[dict[str, str], int | None]:
    try:
        content = read_json(index)
    except BadModelDir as error:
        raise BadCheckpoint(str(error)) from None
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadCheckpoint(f"{index}: weight_map must be an object of tensor name to file name")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, total if type(total) is int else None


def _unknown(found: Found, expected: dict[str, TensorSpec]) -> list[str]:
    """A message for each tensor without a place in the model. A tied model's lm_head may be there."""
    known = {*expected, "lm_head.weight"}
    names = [name for name in found if name not in known and not name.endswith(IGNORED_SUFFIXES)]
    return [
        f"{found[name][0].path}: tensor {name}: unknown: the model of config.json has no place for it; "
        "--allow-extra leaves it out"
        for name in names
    ]


def _tensor(root: Path, spec: TensorSpec, found: Found) -> LogicalTensor:
    if spec.name not in found:
        raise BadCheckpoint(f"{root}: tensor {spec.name}: missing from every file of the checkpoint")
    stored, data = found[spec.name]
    if stored.shape != spec.shape:
        raise BadCheckpoint(
            f"{stored.path}: tensor {spec.name}: its shape is {list(stored.shape)}, "
            f"config.json makes it {list(spec.shape)}"
        )
    return LogicalTensor(spec.name, spec.shape, stored.dtype, 0, (Part(0, spec.shape[0], data, stored.path),))
