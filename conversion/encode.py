"""Turns an entry of a file into its bytes, a window of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from conversion.plan import Entry
from conversion.quantize import Encoding, as_bytes, quantized, scales
from conversion.tensors import TORCH_DTYPES, Bytes, Rows, convert, itemsize, logical_order, windows

_CACHE_WINDOW = 4 << 20  # larger windows leave the processor's cache between copying and hashing


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes of an entry, contiguous. The sums are over what quantisation changed: zero where nothing."""

    data: Bytes
    squared_error: float = 0.0
    squares: float = 0.0


def entry_windows(entry: Entry, max_bytes: int) -> Iterator[Window]:
    """The entry in order, in windows of about `max_bytes`, and its padding."""
    part, tensor = entry.part, entry.tensor
    is_widened = entry.encoding is not Encoding.PLAIN or tensor.scale is not None
    row_bytes = tensor.num_columns * (4 if is_widened else itemsize(tensor.dtype))
    first, count = (part.start, part.stop - part.start) if part.dim == 0 else (0, tensor.num_rows)
    for start, stop in windows(count, row_bytes, min(max_bytes, _CACHE_WINDOW)):
        rows = np.arange(first + start, first + stop, dtype=np.int64)
        rows = logical_order(rows, entry.meta_head_dim) if entry.meta_head_dim else rows
        yield _plain(entry, rows) if entry.encoding is Encoding.PLAIN else _quantized(entry, rows)
    if part.pad:
        yield Window(np.zeros((part.pad, tensor.num_columns * itemsize(entry.dtype)), np.uint8))


def _columns(entry: Entry) -> slice:
    part = entry.part
    return slice(part.start, part.stop) if part.dim == 1 else slice(0, entry.tensor.num_columns)


def _plain(entry: Entry, rows: Rows) -> Window:
    tensor, columns = entry.tensor, _columns(entry)
    if tensor.scale is not None and entry.dtype != tensor.dtype:
        values = tensor.values(rows, columns.start, columns.stop)
        return Window(as_bytes(values.to(TORCH_DTYPES[entry.dtype])))
    data = np.ascontiguousarray(tensor.read(rows, columns.start, columns.stop))
    return Window(convert(data, tensor.dtype, entry.dtype))


def _quantized(entry: Entry, rows: Rows) -> Window:
    """A row's scale is that of all of it, whatever part of the row the entry holds."""
    values = entry.tensor.values(rows)
    scale = scales(values, entry.encoding)[:, None]
    if entry.encoding.is_scale:
        return Window(as_bytes(scale))
    small, original = quantized(values, entry.encoding)[:, _columns(entry)], values[:, _columns(entry)]
    error = small.float() * scale - original
    return Window(as_bytes(small), float(error.square().sum()), float(original.square().sum()))
