"""Whether two checkpoints hold the same model, and whether one still holds what its manifest says."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np

from conversion.job import same_values
from conversion.source import Source
from conversion.tensors import CannotConvert, LogicalTensor, windows
from engines.base import BadCheckpoint
from engines.modeldir import read_json
from engines.models.checkpoint import read_header
from engines.models.manifest import Manifest, WrittenFile, WrittenTensor

_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two checkpoints differ."""

    what: str
    why: str


def differences(first: Source, second: Source) -> Iterator[Difference]:
    """All of them: configuration first, then every tensor, streamed. Nothing is written."""
    if first.config != second.config:
        yield Difference("config", _config_difference(first, second))
    for name in dict.fromkeys([*first.tensors, *second.tensors]):  # the model's order
        one, two = first.tensors.get(name), second.tensors.get(name)
        if one is None or two is None:
            missing = first.root if one is None else second.root
            yield Difference(name, f"missing from {missing}")
        elif (one.scale is None) != (two.scale is None):
            yield Difference(name, f"{one.dtype} and {two.dtype}, relative error {_error(one, two):.3%}")
        elif one.shape != two.shape or one.dtype != two.dtype:
            yield Difference(name, f"{one.dtype} {list(one.shape)} and {two.dtype} {list(two.shape)}")
        elif not same_values(one, two):
            yield Difference(name, "values differ")
    for source in (first, second):
        for one, two in source.replicas:
            if not same_values(one, two):
                yield Difference(one.name, f"{two.parts[0].path} differs from {one.parts[0].path}")


def _error(one: LogicalTensor, two: LogicalTensor) -> float:
    """Root of the squared error over that of the squares of whichever is not quantised; streamed."""
    exact, near = (one, two) if one.scale is None else (two, one)
    error = squares = 0.0
    for start, stop in windows(exact.num_rows, 4 * exact.num_columns, _CHUNK):
        rows = np.arange(start, stop, dtype=np.int64)
        values = exact.values(rows)
        error += float((near.values(rows) - values).square().sum())
        squares += float(values.square().sum())
    return sqrt(error / squares) if squares else sqrt(error)


def _config_difference(first: Source, second: Source) -> str:
    pairs = [
        (name, getattr(first.config, name), getattr(second.config, name)) for name in first.config.__slots__
    ]
    return "; ".join(f"{name}: {one} and {two}" for name, one, two in pairs if one != two)


def check_source(source: Source, jobs: int = 0) -> str:
    """Hash the source as far as it says what it should be. Returns what that was, empty if it does not.

    By manifest.json if there is one; else by the checksums within .pth and .bin files, and by the md5
    of Meta's checklist.chk. `jobs`: files at once; 0: as many as there are cores. Raises BadCheckpoint."""
    if source.manifest is not None:
        num_bytes = check_manifest(source.root, source.manifest, jobs)
        return f"{num_bytes / 1e9:.2f} GB are what manifest.json says"
    zipped = [path for path in source.files if path.suffix in (".pth", ".bin")]
    _at_once(jobs, [partial(_check_zip, path) for path in zipped])
    listed = _check_list(source.root / "checklist.chk")
    what = [f"{len(zipped)} file(s) match their own checksums"] if zipped else []
    what += [f"{listed} match checklist.chk"] if listed else []
    return ", ".join(what)


def _at_once(jobs: int, calls: Sequence[Callable[[], int]]) -> int:
    """The sum of what they return. Raises what the first of them raises. Hashing lets go of the GIL."""
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            return sum([future.result() for future in futures])
        finally:
            pool.shutdown(cancel_futures=True)


def _check_zip(path: Path) -> int:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BadCheckpoint(f"{path}: cannot be read: {error}") from None
    if damaged is not None:
        raise BadCheckpoint(f"{path}: record {damaged}: is damaged: its checksum does not match")
    return path.stat().st_size


def _check_list(path: Path) -> int:
    """Lines of an md5 and a file's name."""
    if not path.is_file():
        return 0
    lines = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    pairs = [(line[0], line[1].lstrip("*")) for line in lines if len(line) == 2]
    for md5, name in pairs:
        file = path.parent / name
        if Path(name).name != name or not file.is_file():
            raise BadCheckpoint(f"{path}: names {name!r}, which is no file beside it")
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "md5").hexdigest() != md5.lower():
                raise BadCheckpoint(f"{file}: is damaged: its md5 is not checklist.chk's")
    return len(pairs)


def check_manifest(root: Path, manifest: Manifest, jobs: int = 0) -> int:
    """Hash every file that the manifest lists. Returns bytes read. Raises BadCheckpoint."""
    calls = [partial(_check_file, root, name, written) for name, written in manifest.files.items()]
    num_bytes = _at_once(jobs, calls)
    if "config.json" in manifest.files and read_json(root / "config.json") != manifest.config:
        raise BadCheckpoint(f"{root / 'manifest.json'}: config: is not what config.json says")
    return num_bytes


def _check_file(root: Path, name: str, written: WrittenFile) -> int:
    if name.startswith("/") or ".." in Path(name).parts:
        raise CannotConvert(f"{root / 'manifest.json'}: names the file {name!r}, outside the directory")
    path = root / name
    if not path.is_file():
        raise BadCheckpoint(f"{path}: missing, though manifest.json names it")
    if path.stat().st_size != written.num_bytes:
        raise BadCheckpoint(
            f"{path}: has {path.stat().st_size} bytes, manifest.json says {written.num_bytes}"
        )
    if _sha256(path, 0, written.num_bytes) != written.sha256:
        raise BadCheckpoint(f"{path}: {_damaged(path, written.tensors)}its sha256 is not manifest.json's")
    return written.num_bytes


def _damaged(path: Path, tensors: dict[str, WrittenTensor]) -> str:
    """Which tensors, where the format tells where they lie."""
    if path.suffix != ".safetensors":
        return ""
    header = read_header(path)
    for name, written in tensors.items():
        stored = header.get(name)
        if stored is None or _sha256(path, stored.offset, stored.num_bytes) != written.sha256:
            return f"tensor {name}: is damaged: "
    return ""


def _sha256(path: Path, offset: int, num_bytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while num_bytes > 0 and (data := file.read(min(_CHUNK, num_bytes))):
            digest.update(data)
            num_bytes -= len(data)
    return digest.hexdigest()
