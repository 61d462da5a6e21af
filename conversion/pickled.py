"""Reads .pth and .bin files: torch's own restricted unpickler over a mapped file, and no other way.

This is the one place of ours that unpickles. `weights_only` builds tensors and plain containers only;
whatever a file needs beyond that is refused by name, and there is no switch that would allow it.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path

import torch

from conversion.sizes import shown_bytes
from conversion.tensors import DTYPE_NAMES, Bytes
from engines.base import COPY_AGAIN, BadCheckpoint
from engines.models.checkpoint import StoredTensor, refuse_stand_in

_FORBIDDEN = re.compile(r"GLOBAL (\S+) was not an allowed global")


def read_pickled(path: Path) -> dict[str, tuple[StoredTensor, Bytes]]:
    """The tensors of one file, mapped: what is stored, and its bytes [rows, bytes].

    Raises BadCheckpoint: missing, not a zip file, corrupt, something else than tensors in it.
    """
    _check_zip(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of an unusual protocol: it is read, or refused below
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the unpickler raises nearly anything on a damaged file
        raise BadCheckpoint(f"{path}: {_reason(error)}") from None
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path}: holds a {type(content).__name__}, not tensors by name")
    return {_name(path, name): _entry(path, name, value) for name, value in content.items()}


def _check_zip(path: Path) -> None:
    """Every record stored as it is, inside the file, and none twice: what mapping relies on."""
    try:
        _check_start(path)
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: no such file: copy or download it as well") from None
    except BadCheckpoint:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BadCheckpoint(
            f"{path}: truncated or corrupt ({shown_bytes(path.stat().st_size)}): {error}: {COPY_AGAIN}"
        ) from None
    size = path.stat().st_size
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED:
            raise BadCheckpoint(f"{path}: record {info.filename}: is compressed, and cannot be mapped")
        if info.header_offset + info.file_size > size or info.compress_size != info.file_size:
            raise BadCheckpoint(f"{path}: record {info.filename}: truncated or corrupt: {COPY_AGAIN}")
    if len({info.filename for info in infos}) != len(infos):
        raise BadCheckpoint(f"{path}: corrupt: a record is there twice: {COPY_AGAIN}")


def _check_start(path: Path) -> None:
    """Whether it begins as something else than a zip file, that can be told."""
    with path.open("rb") as file:
        start = file.read(16)
    refuse_stand_in(path, start)
    if start.startswith(b"\x80"):
        raise BadCheckpoint(
            f"{path}: is in torch's format from before version 1.6: if it is yours, load and save it again "
            "with a current torch"
        )


def _reason(error: Exception) -> str:
    text = str(error)
    forbidden = _FORBIDDEN.search(text)
    if forbidden is not None:
        return f"its pickle needs {forbidden[1]}, more than tensors: refused, nothing of it has run"
    if "eights only" in text or "weights_only" in text:
        found = re.search(r"(Unsupported \w+[^.\n]*|Trying to [^.\n]*)", text)
        what = f" ({found[1].strip()})" if found else ""
        return f"its pickle holds more than tensors{what}: refused, nothing of it has run"
    return f"cannot be read: {type(error).__name__}: {(text.splitlines() or ['?'])[0][:200]}: {COPY_AGAIN}"


def _name(path: Path, name: object) -> str:
    if not isinstance(name, str):
        raise BadCheckpoint(f"{path}: a tensor's name is {type(name).__name__}, not text")
    return name


def _entry(path: Path, name: str, value: object) -> tuple[StoredTensor, Bytes]:
    if not isinstance(value, torch.Tensor):
        raise BadCheckpoint(f"{path}: {name}: is a {type(value).__name__}, not a tensor")
    value = value.detach()
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise BadCheckpoint(f"{path}: tensor {name}: is not a plain dense tensor")
    if value.dtype not in DTYPE_NAMES:
        raise BadCheckpoint(f"{path}: tensor {name}: is {value.dtype}, which cannot be converted")
    if not value.is_contiguous():
        raise BadCheckpoint(f"{path}: tensor {name}: is not contiguous: save it again with .contiguous()")
    if value.untyped_storage().nbytes() < (value.storage_offset() + value.numel()) * value.itemsize:
        wrong = f"{path}: tensor {name}: truncated: its storage is smaller than its shape"
        raise BadCheckpoint(f"{wrong}: {COPY_AGAIN}")
    rows = value.shape[0] if value.dim() else 1
    data: Bytes = value.reshape(rows, -1 if value.numel() else 0).view(torch.uint8).numpy()
    stored = StoredTensor(path, DTYPE_NAMES[value.dtype], tuple(value.shape), 0, value.nbytes, name)
    return stored, data
