"""What a model directory says about itself besides its weights, read as data. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

_HASHED_WHOLE = ("config.json", "generation_config.json", "manifest.json", "model.safetensors.index.json")
_WINDOW = 4096  # bytes of a sample


class BadModelDir(ValueError):  # noqa: N818
    """A file of the model directory is missing or not what its name says. Names the file."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that config.json states by one of their usual names; None where it does not."""

    num_layers: int | None
    num_heads: int | None
    num_kv_heads: int | None  # those of attention where only these are stated
    intermediate_size: int | None
    max_positions: int | None


def shape(model_dir: str | Path) -> Shape:
    """From `model_dir`/config.json, of the language model where there are several. Raises BadModelDir."""
    data = read_json(Path(model_dir) / "config.json")
    inner = data.get("text_config")
    sizes = inner if isinstance(inner, dict) else data
    num_heads = _size(sizes, "num_attention_heads", "n_head", "num_heads")
    return Shape(
        num_layers=_size(sizes, "num_hidden_layers", "n_layer", "num_layers"),
        num_heads=num_heads,
        num_kv_heads=_size(sizes, "num_key_value_heads") or num_heads,
        intermediate_size=_size(sizes, "intermediate_size"),
        max_positions=_size(sizes, "max_position_embeddings", "n_positions"),
    )


def _size(sizes: dict[str, Any], *names: str) -> int | None:
    found = (sizes.get(name) for name in names)
    return next((size for size in found if type(size) is int and size > 0), None)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises BadModelDir if it is missing, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadModelDir(
            f"{path}: no such file; a model directory holds config.json and *.safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise BadModelDir(f"{path}: cannot be read as JSON: {error}: copy or download it again") from None
    if not isinstance(value, dict):
        raise BadModelDir(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def eos_token_ids(model_dir: str | Path) -> tuple[int, ...]:
    """The ids that end a generation: generation_config.json's, or else config.json's; ascending.

    generation_config.json wins where it names any, as in Hugging Face's `generate`: instruct models
    list there what config.json does not (end of turn beside end of text).
    """
    root = Path(model_dir)
    generation = root / "generation_config.json"
    if generation.exists():
        ids = _token_ids(generation, read_json(generation).get("eos_token_id"))
        if ids:
            return ids
    config = root / "config.json"
    return _token_ids(config, read_json(config).get("eos_token_id"))


def _token_ids(path: Path, value: object) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise BadModelDir(f"{path}: eos_token_id must be an id or a list of ids, found {value!r}")
    return tuple(sorted(set(ids)))


def fingerprint(model_dir: str | Path) -> str:
    """12 hex digits that change with the model: how it is configured, and what its weights are.

    Read are what config.json, generation_config.json, the index and a manifest of `sluice convert` (it has
    every tensor's sha256) say, and of each safetensors file its size, its header and samples all over its
    data, first and last bytes included. Not seen is a change of weights between the samples that leaves
    names, shapes and manifest as they were: a few values patched in place, no other training run. Tokenizer
    and chat template are the gateway's, and not part of it.
    """
    root = Path(model_dir)
    digest = sha256()
    for name in _HASHED_WHOLE:
        if (root / name).exists():
            _add(digest, name, (root / name).read_bytes())
    files = sorted([*root.glob("*.safetensors"), *root.glob("tp*-of-*/*.safetensors")])
    for path in files:
        _add(digest, str(path.relative_to(root)), *_samples(path, max(4, min(64, 1024 // len(files)))))
    return digest.hexdigest()[:12]


def _add(digest: Hash, name: str, *parts: bytes) -> None:
    for part in (name.encode(), *parts):
        digest.update(len(part).to_bytes(8, "little") + part)


def _samples(path: Path, count: int) -> Iterator[bytes]:
    """Of a safetensors file: its size, its header, and `count` windows spread evenly over the data."""
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    with path.open("rb", buffering=0) as file:
        yield file.read(min(int.from_bytes(file.read(8), "little"), size))
        first = file.tell()
        last = max(first, size - _WINDOW)
        for number in range(count):
            file.seek(first + (last - first) * number // (count - 1))
            yield file.read(_WINDOW)
