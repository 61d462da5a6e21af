"""Files mapped as bytes."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from conversion.tensors import TORCH_DTYPES, Bytes, itemsize
from engines.base import COPY_AGAIN, BadCheckpoint
from engines.models.checkpoint import StoredTensor


class MappedFiles:
    """Maps each file once, and hands out its tensors as [rows, bytes]."""

    def __init__(self) -> None:
        self._files: dict[Path, Bytes] = {}

    def tensor(self, name: str, stored: StoredTensor) -> Bytes:
        """Raises BadCheckpoint: an unknown dtype, a size that is not the shape's."""
        if stored.dtype not in TORCH_DTYPES:
            raise BadCheckpoint(
                f"{stored.path}: tensor {name}: is {stored.dtype}; {', '.join(TORCH_DTYPES)} can be converted"
            )
        num_bytes = itemsize(stored.dtype)
        for size in stored.shape:
            num_bytes *= size
        if num_bytes != stored.num_bytes:
            raise BadCheckpoint(
                f"{stored.path}: tensor {name}: corrupt header: {list(stored.shape)} {stored.dtype} are "
                f"{num_bytes} bytes, it says {stored.num_bytes}: {COPY_AGAIN}"
            )
        data = self._file(stored.path)[stored.offset : stored.offset + num_bytes]
        rows = stored.shape[0] if stored.shape else 1
        return data.reshape(rows, num_bytes // rows if rows else 0)

    def _file(self, path: Path) -> Bytes:
        if path not in self._files:
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise BadCheckpoint(f"{path}: cannot be mapped: {error}") from None
            self._files[path] = np.frombuffer(mapped, np.uint8)
        return self._files[path]
