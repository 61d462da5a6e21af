"""Reads Hugging Face safetensors checkpoints, each rank its own slices only.

`Checkpoint` finds every tensor and checks names, shapes, dtypes and file sizes from the headers alone
before a weight is read. Nothing here unpickles.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engines.base import COPY_AGAIN, BadCheckpoint
from engines.modeldir import BadModelDir, read_json
from engines.models.layout import INDEX_NAME, PICKLE_SUFFIXES, SINGLE_NAME, convert_first, no_whole_tensors
from engines.models.names import IGNORED_SUFFIXES, Slice, TensorSpec

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100 << 20
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, from its file's header."""

    path: Path
    dtype: str  # safetensors' name: F32, BF16, ...
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int
    name: str  # in the file


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises BadCheckpoint: missing, pickled, corrupt, truncated."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """As read_header, and the texts that the file's writer left in it."""
    header, data_start = _header(path)
    data_bytes = path.stat().st_size - data_start
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise BadCheckpoint(f"{path}: corrupt header: __metadata__ must be an object")
    tensors = {name: _entry(path, name, entry, data_start, data_bytes) for name, entry in header.items()}
    return tensors, metadata


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON object at the start of a file, and where its data starts."""
    try:
        with path.open("rb") as file:
            start = file.read(_LENGTH.size)
            if len(start) < _LENGTH.size:
                _refuse_pickle(path, start)
                wrong = f"{path}: truncated: {len(start)} bytes are not even a header"
                raise BadCheckpoint(f"{wrong}: {COPY_AGAIN}")
            (length,) = _LENGTH.unpack(start)
            if length > min(_MAX_HEADER_BYTES, path.stat().st_size - _LENGTH.size):
                _refuse_pickle(path, start)  # not before: a length may begin as pickles do, 640 for one
                refuse_stand_in(path, start)
                raise BadCheckpoint(
                    f"{path}: corrupt or truncated: its header claims {length} bytes: {COPY_AGAIN}"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: no such file: copy or download it as well") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadCheckpoint):
            raise
        raise BadCheckpoint(f"{path}: corrupt header: {error}: {COPY_AGAIN}") from None
    if not isinstance(header, dict):
        raise BadCheckpoint(f"{path}: corrupt header: expected a JSON object: {COPY_AGAIN}")
    return header, _LENGTH.size + length


def _refuse_pickle(path: Path, start: bytes) -> None:
    if start.startswith(_PICKLE_MAGIC):
        raise BadCheckpoint(
            f"{path}: holds a pickle, whatever its name says: name it pytorch_model.bin, and "
            f"{convert_first(path.parent)}"
        )


def refuse_stand_in(path: Path, start: bytes) -> None:
    """Raises BadCheckpoint for what downloads leave in a file's place. `start`: its first bytes."""
    if start.startswith(b"version "):
        raise BadCheckpoint(f"{path}: is a pointer of Git LFS, not the weights: run `git lfs pull` beside it")
    if start.lstrip()[:1] == b"<":
        raise BadCheckpoint(f"{path}: is a web page, not the weights: {COPY_AGAIN}")


def _entry(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> StoredTensor:
    try:
        (begin, end), dtype = entry["data_offsets"], str(entry["dtype"])
        shape = tuple(int(size) for size in entry["shape"])
        in_order = type(begin) is type(end) is int and 0 <= begin <= end and min(shape, default=0) >= 0
    except (TypeError, KeyError, ValueError) as error:
        wrong = f"{path}: tensor {name}: corrupt header entry: {error!r}"
        raise BadCheckpoint(f"{wrong}: {COPY_AGAIN}") from None
    if not in_order:
        wrong = f"{path}: tensor {name}: corrupt header entry: bytes {begin} to {end}"
        raise BadCheckpoint(f"{wrong}: {COPY_AGAIN}")
    if end > data_bytes:
        raise BadCheckpoint(
            f"{path}: tensor {name}: truncated: it ends at byte {end} of the data, "
            f"the file has {data_bytes}: {COPY_AGAIN}"
        )
    return StoredTensor(path, dtype, shape, data_start + begin, end - begin, name)


_BASE = "model."


class Checkpoint:
    """The weights of a model directory. Opening it reads headers; `read_into` reads weights.

    Models that were made for embeddings are often stored without their head, under names of the base model
    (`layers.0...`): here they have those of the causal language model that it belongs to.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.root = Path(model_dir)
        located = self._locate()
        prefix = _BASE if "embed_tokens.weight" in located else ""
        self.tensors = {prefix + name: stored for name, stored in located.items()}

    def _locate(self) -> dict[str, StoredTensor]:
        if (self.root / INDEX_NAME).exists():
            return self._from_index(self.root / INDEX_NAME)
        if (self.root / SINGLE_NAME).exists():
            return read_header(self.root / SINGLE_NAME)
        raise no_whole_tensors(self.root)

    def _from_index(self, index: Path) -> dict[str, StoredTensor]:
        weight_map = _weight_map(index)
        headers = {name: read_header(self._inside(index, name)) for name in sorted(set(weight_map.values()))}
        tensors = {}
        for tensor, file in weight_map.items():
            if tensor not in headers[file]:
                raise BadCheckpoint(
                    f"{self.root / file}: tensor {tensor}: missing, though {index.name} names it"
                )
            tensors[tensor] = headers[file][tensor]
        return tensors

    def _inside(self, index: Path, name: str) -> Path:
        """The path of an index's shard. The index is untrusted data: it may name files beside it only.

        A link may lead to the blobs of the hub's cache that the directory belongs to.
        """
        if Path(name).name != name:
            raise BadCheckpoint(
                f"{index}: names the shard {name!r}: only names of files beside it are allowed"
            )
        path, root = self.root / name, self.root.resolve()
        if path.suffix in PICKLE_SUFFIXES:
            raise BadCheckpoint(f"{path}: {convert_first(self.root)}")
        if path.resolve().parent not in (root, root.parent.parent / "blobs"):
            raise BadCheckpoint(
                f"{path}: is a link that leads out of the model directory: copy the file there"
            )
        return path

    @property
    def dtype(self) -> torch.dtype:
        """What the embedding is stored as. Raises BadCheckpoint if that is not a float that can be served."""
        stored = self._stored("model.embed_tokens.weight")
        return DTYPES[stored.dtype]

    def check(self, expected: Iterable[TensorSpec], optional: frozenset[str] = frozenset()) -> None:
        """Raises BadCheckpoint unless exactly these tensors are there, in their shapes and a float dtype.

        `optional` names tensors that may be there and are not read.
        """
        wanted = {spec.name: spec for spec in expected}
        for spec in wanted.values():
            self._check_tensor(spec)
        extra = [
            name
            for name in self.tensors
            if name not in wanted and name not in optional and not name.endswith(IGNORED_SUFFIXES)
        ]
        if extra:
            raise BadCheckpoint(
                f"{self.tensors[extra[0]].path}: tensor {extra[0]}: the model of config.json has no place "
                f"for it ({len(extra)} such): config.json and weights do not belong together"
            )

    def _stored(self, name: str) -> StoredTensor:
        stored = self.tensors.get(name)
        if stored is None:
            raise BadCheckpoint(f"{self.root}: tensor {name}: missing from every file of the checkpoint")
        if stored.dtype not in DTYPES:
            raise BadCheckpoint(
                f"{stored.path}: tensor {name}: is {stored.dtype}; {', '.join(DTYPES)} can be served"
            )
        return stored

    def _check_tensor(self, spec: TensorSpec) -> None:
        stored = self._stored(spec.name)
        if stored.shape != spec.shape:
            raise BadCheckpoint(
                f"{stored.path}: tensor {spec.name}: its shape is {list(stored.shape)}, "
                f"config.json makes it {list(spec.shape)}"
            )

    def quantized(self, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """This rank's slices of quantised tensors and their scales; None: these are not quantised."""
        return None

    def mapped(self, names: Sequence[str], dtype: torch.dtype) -> Tensor | None:
        """This rank's slices of the tensors, one below the other, as they lie in a file of its own.

        None where they must be read: here always, for the files are the whole model's."""
        return None

    def let_go(self, weight: Tensor) -> None:
        """What `mapped` gave is read no more, or rarely."""

    def read_into(self, out: Tensor, name: str, part: Slice) -> None:
        """Fill `out` with a slice of the tensor `name` and its padding, in `out`'s dtype.

        The file is opened anew for each tensor: what stays mapped, and so counts as memory of the
        rank, is one tensor at most.
        """
        stored = self.tensors[name]
        try:
            with safe_open(str(stored.path), framework="pt") as file:
                view = file.get_slice(stored.name)
                if part.dim == 1:
                    out.copy_(view[:, part.start : part.stop])
                else:
                    length = part.stop - part.start
                    out[:length].copy_(view[part.start : part.stop])
                    out[length:].zero_()
        except (SafetensorError, OSError, RuntimeError) as error:
            _unreadable(stored.path, name, error)


def _unreadable(path: Path, name: str, error: Exception) -> NoReturn:
    raise BadCheckpoint(f"{path}: tensor {name}: cannot be read: {error}") from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json(index).get("weight_map")
    except BadModelDir as error:
        raise BadCheckpoint(str(error)) from None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadCheckpoint(f"{index}: weight_map must be an object of tensor name to file name")
    return weight_map
