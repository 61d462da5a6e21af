"""The one picture that every format is read into and written from: a tensor by its logical name, its
global shape, its dtype, and the stored pieces that it is made of. Nothing is read until rows are asked for.

Rows are bytes: uint8 arrays [rows, columns * itemsize]. A vector is a matrix of one column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Rows = NDArray[np.int64]

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}
"""safetensors' names of the dtypes that can be converted."""

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class CannotConvert(ValueError):  # noqa: N818
    """What was asked for cannot be done. The message says what, why, and the remedy."""


def itemsize(dtype: str) -> int:
    return TORCH_DTYPES[dtype].itemsize


@dataclass(frozen=True, slots=True)
class Part:
    """start .. stop of the split dimension, as stored in one file. `data` maps the file: [rows, bytes]."""

    start: int
    stop: int
    data: Bytes
    path: Path


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor as Hugging Face names it and orders its rows, wherever and however it is stored.

    `dim` is the one that `parts` split, in order and without gaps; rows beyond shape[0] of the last
    part are padding. `meta_head_dim`: rows lie in Meta's order within heads of that size; 0: they do not.
    `scale`: of a quantised tensor, what each row is to be multiplied by.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dim: int
    parts: tuple[Part, ...]
    meta_head_dim: int = 0
    scale: LogicalTensor | None = None

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def num_columns(self) -> int:
        return self.shape[1] if len(self.shape) == 2 else 1

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.num_columns * itemsize(self.dtype)

    def read(self, rows: Rows, start: int = 0, stop: int | None = None) -> Bytes:
        """Those rows, columns start .. stop of them: [len(rows), (stop - start) * itemsize].

        A view of the file where that is possible, else a copy."""
        stop = self.num_columns if stop is None else stop
        rows = stored_order(rows, self.meta_head_dim) if self.meta_head_dim else rows
        if self.dim == 1:
            return self._columns(rows, start, stop)
        size = itemsize(self.dtype)
        return self._rows(rows, slice(start * size, stop * size))

    def values(self, rows: Rows, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """As `read`, the numbers that are meant: float32 [len(rows), stop - start]."""
        values = to_float(self.read(rows, start, stop), self.dtype)
        return values if self.scale is None else values.mul_(self.scale.values(rows))

    def _rows(self, rows: Rows, columns: slice) -> Bytes:
        low, high = int(rows.min(initial=0)), int(rows.max(initial=0))
        for part in self.parts:
            if part.start <= low and high < part.stop:
                return _pick(part.data[:, columns], rows - part.start)
        out = np.empty((len(rows), columns.stop - columns.start), np.uint8)
        for part in self.parts:
            inside = (rows >= part.start) & (rows < part.stop)
            if inside.any():
                out[inside] = _pick(part.data[:, columns], rows[inside] - part.start)
        return out

    def _columns(self, rows: Rows, start: int, stop: int) -> Bytes:
        size = itemsize(self.dtype)
        pieces = []
        for part in self.parts:
            low, high = max(start, part.start), min(stop, part.stop)
            if low < high:
                columns = slice((low - part.start) * size, (high - part.start) * size)
                pieces.append(_pick(part.data[:, columns], rows))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)


def replicas(
    name: str, shape: tuple[int, ...], dtype: str, first: Part, second: Part
) -> tuple[LogicalTensor, LogicalTensor]:
    """Two parts that should hold the same rows, as a tensor each. `shape` is that of the whole tensor."""
    count = first.stop - first.start
    one, two = (
        LogicalTensor(name, (count, *shape[1:]), dtype, 0, (Part(0, count, part.data, part.path),))
        for part in (first, second)
    )
    return one, two


def _pick(data: Bytes, rows: Rows) -> Bytes:
    """data[rows], a view if the rows follow each other."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return data[int(rows[0]) : int(rows[-1]) + 1]
    return data[rows]


def stored_order(rows: Rows, head_dim: int) -> Rows:
    """Where Meta stores Hugging Face's rows of a rotated projection.

    Meta turns neighbours (2 j, 2 j + 1), Hugging Face the halves (j, j + d / 2) of a head.
    """
    head, row = np.divmod(rows, head_dim)
    half = head_dim // 2
    return np.asarray(head * head_dim + np.where(row < half, 2 * row, 2 * (row - half) + 1))


def logical_order(rows: Rows, head_dim: int) -> Rows:
    """Which of Hugging Face's rows stand at Meta's rows: the inverse of stored_order."""
    head, row = np.divmod(rows, head_dim)
    return np.asarray(head * head_dim + np.where(row % 2 == 0, row // 2, head_dim // 2 + row // 2))


def windows(num_rows: int, row_bytes: int, window_bytes: int) -> Iterator[tuple[int, int]]:
    """Spans of rows that fit into a window; a row that is longer has one of its own."""
    step = max(1, window_bytes // max(row_bytes, 1))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def convert(data: Bytes, source: str, target: str) -> Bytes:
    """[rows, bytes] in another dtype."""
    if source == target:
        return data
    values = torch.from_numpy(np.array(data, copy=True)).view(TORCH_DTYPES[source])
    return np.asarray(values.to(TORCH_DTYPES[target]).view(torch.uint8).numpy())


def to_float(data: Bytes, dtype: str) -> torch.Tensor:
    """[rows, bytes] to float32 [rows, columns]."""
    values: torch.Tensor = torch.from_numpy(np.array(data, copy=True)).view(TORCH_DTYPES[dtype])
    return values.float()


_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
"""As a whole number of its bits; what is not a number is above it, what is finite below."""


def is_finite(data: Bytes, dtype: str) -> bool:
    """Whether no value of contiguous `data` is infinite or not a number."""
    if dtype not in _INFINITY or not data.size:
        return True
    size, infinity = itemsize(dtype), _INFINITY[dtype]
    if data.ctypes.data % size:
        data = data.copy()
    signed, unsigned = (data.reshape(-1).view(f"{kind}{size}") for kind in "iu")
    negative_infinity = infinity + (1 << (8 * size - 1))  # signed.max() does not see the negative ones
    return bool(signed.max() < infinity and unsigned.max() < negative_infinity)
