"""Turns an entry of a file into its bytes, a window of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from conversion.plan import Entry
from conversion.quantize import Encoding, as_bytes, quantized, scales
from conversion.tensors import Bytes, convert, itemsize, logical_order, to_float, windows

_CACHE_WINDOW = 4 << 20  # larger windows leave the processor's cache between copying and hashing


def entry_windows(entry: Entry, max_bytes: int) -> Iterator[Bytes]:
    """The entry's bytes in order, contiguous, in windows of about `max_bytes` and its padding."""
    part, tensor = entry.part, entry.tensor
    wide = entry.encoding is not Encoding.PLAIN
    row_bytes = tensor.num_columns * (4 if wide else itemsize(tensor.dtype))
    first, count = (part.start, part.stop - part.start) if part.dim == 0 else (0, tensor.num_rows)
    for start, stop in windows(count, row_bytes, min(max_bytes, _CACHE_WINDOW)):
        rows = np.arange(first + start, first + stop, dtype=np.int64)
        rows = logical_order(rows, entry.meta_head_dim) if entry.meta_head_dim else rows
        yield _encoded(entry, rows)
    if part.pad:
        yield np.zeros((part.pad, tensor.num_columns * itemsize(entry.dtype)), np.uint8)


def _encoded(entry: Entry, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Bytes:
    part, tensor = entry.part, entry.tensor
    columns = (part.start, part.stop) if part.dim == 1 else (0, tensor.num_columns)
    if entry.encoding is Encoding.PLAIN:
        data = np.ascontiguousarray(tensor.read(rows, *columns))
        return convert(data, tensor.dtype, entry.dtype)
    whole = tensor.read(rows)  # a row's scale is that of all of it
    if entry.encoding.is_scale:
        return as_bytes(scales(to_float(whole, tensor.dtype), entry.encoding)[:, None])
    return as_bytes(quantized(whole, tensor.dtype, entry.encoding)[:, slice(*columns)])
