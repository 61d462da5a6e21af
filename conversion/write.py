"""Writes one file of weights, window by window: safetensors, or Meta's .pth."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

from conversion.encode import entry_windows
from conversion.hashed import HashedFile
from conversion.plan import Entry, OutputFile
from conversion.pth import PthWriter
from conversion.tensors import is_finite
from engines.base import BadCheckpoint
from engines.models.manifest import WrittenFile, WrittenTensor

Advance = Callable[[int], None]
"""Called with bytes written; raises to stop the conversion."""

_ALIGNMENT = 64


def write_file(path: Path, file: OutputFile, window_bytes: int, advance: Advance) -> WrittenFile:
    """Raises OSError (its note says which tensor), BadCheckpoint."""
    write = _write_pth if file.name.endswith(".pth") else _write_safetensors
    with HashedFile(path) as out:
        tensors = write(out, file, window_bytes, advance)
        return WrittenFile(out.num_bytes, out.sync(), tensors)


def _write_safetensors(
    out: HashedFile, file: OutputFile, window_bytes: int, advance: Advance
) -> dict[str, WrittenTensor]:
    out.write(safetensors_header(file))
    return {
        entry.name: _write_entry(out, entry, window_bytes, out.write, advance, file) for entry in file.entries
    }


def safetensors_header(file: OutputFile) -> bytes:
    """The length and the JSON object that start a safetensors file."""
    header: dict[str, object] = {"__metadata__": file.metadata}
    offset = 0
    for entry in file.entries:
        end = offset + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _write_pth(
    out: HashedFile, file: OutputFile, window_bytes: int, advance: Advance
) -> dict[str, WrittenTensor]:
    writer = PthWriter(out, Path(file.name).stem, [(e.name, e.dtype, e.shape) for e in file.entries])
    tensors = {}
    for index, entry in enumerate(file.entries):
        with writer.storage(index) as write:
            tensors[entry.name] = _write_entry(out, entry, window_bytes, write, advance, file)
    writer.close()
    return tensors


def _write_entry(
    out: HashedFile,
    entry: Entry,
    window_bytes: int,
    write: Callable[[memoryview], object],
    advance: Advance,
    file: OutputFile,
) -> WrittenTensor:
    digest, finite, num_bytes = hashlib.sha256(), True, 0
    squared_error = squares = 0.0
    try:
        for window in entry_windows(entry, window_bytes):
            view = window.data.reshape(-1).data
            write(view)
            digest.update(view)
            finite = is_finite(window.data, entry.dtype) and finite
            num_bytes += view.nbytes
            squared_error, squares = squared_error + window.squared_error, squares + window.squares
            advance(view.nbytes)
        out.drain()  # an error is this tensor's
    except OSError as error:
        error.add_note(f"{file.name}: tensor {entry.name}")
        raise
    if num_bytes != entry.num_bytes:
        raise BadCheckpoint(f"{entry.tensor.name}: gave {num_bytes} bytes, not {entry.num_bytes}")
    lost = (squared_error / squares) ** 0.5 if squares else None
    return WrittenTensor(entry.dtype, entry.shape, digest.hexdigest(), finite, lost)
