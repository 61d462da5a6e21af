"""Writes the zip file that torch.save writes, without holding a tensor.

A record for the pickle that describes the tensors, one for the bytes of each, every one aligned as torch
aligns it, so that the file can be mapped. The pickle is written opcode by opcode: what it may contain is
what this file shows.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod

from conversion.hashed import HashedFile

Described = tuple[str, str, tuple[int, ...]]
"""A tensor's name, dtype (safetensors' name), shape."""

_STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "BF16": "BFloat16Storage",
    "F16": "HalfStorage",
    "I8": "CharStorage",
}
_ALIGNMENT = 64
_LOCAL_HEADER = 30
_ZIP64_EXTRA = 20


class _Stream:
    """A HashedFile as zipfile wants it. Without seek: sizes follow each record instead of preceding it."""

    def __init__(self, out: HashedFile) -> None:
        self._out = out

    def write(self, data: bytes) -> int:
        return self._out.write(data)

    def tell(self) -> int:
        return self._out.num_bytes

    def flush(self) -> None:
        """HashedFile has no buffer."""


class PthWriter:
    """Writes the records in order: the pickle first, then `storage(0)`, `storage(1)`, ..., then `close`."""

    def __init__(self, out: HashedFile, archive: str, tensors: Sequence[Described]) -> None:
        self._out, self._archive = out, archive
        self._zip = zipfile.ZipFile(_Stream(out), "w", zipfile.ZIP_STORED)  # type: ignore[call-overload]
        self._record("data.pkl", state_dict_pickle(tensors))
        self._record("byteorder", b"little")

    @contextmanager
    def storage(self, index: int) -> Iterator[Callable[[memoryview], object]]:
        """The record of a tensor's bytes, as a function that appends to it."""
        with self._zip.open(self._info(f"data/{index}"), "w", force_zip64=True) as record:
            yield lambda data: record.write(data)

    def close(self) -> None:
        self._record("version", b"3\n")
        self._zip.close()

    def _record(self, name: str, content: bytes) -> None:
        with self._zip.open(self._info(name), "w", force_zip64=True) as record:
            record.write(content)

    def _info(self, name: str) -> zipfile.ZipInfo:
        """A record whose content starts at a multiple of the alignment: an extra field fills up."""
        info = zipfile.ZipInfo(f"{self._archive}/{name}")
        start = self._out.num_bytes + _LOCAL_HEADER + len(info.filename.encode()) + _ZIP64_EXTRA + 4
        padding = -start % _ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        return info


def state_dict_pickle(tensors: Sequence[Described]) -> bytes:
    """{name: tensor} in pickle's protocol 2, tensor i in the storage of key str(i)."""
    items = b"".join(
        _text(name) + _tensor(key, dtype, shape) for key, (name, dtype, shape) in enumerate(tensors)
    )
    return b"\x80\x02" + b"}" + b"(" + items + b"u" + b"."


def _tensor(key: int, dtype: str, shape: tuple[int, ...]) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict())"""
    numel = prod(shape)
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    kind = _global("torch", _STORAGES[dtype])
    storage = b"(" + _text("storage") + kind + _text(str(key)) + _text("cpu") + _int(numel) + b"tQ"
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = b"(" + storage + _int(0) + _ints(shape) + _ints(strides) + b"\x89" + hooks + b"t"
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def _global(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _int(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _ints(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(_int(value) for value in values) + b"t"
