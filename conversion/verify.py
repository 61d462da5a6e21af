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
from threading import Event

import numpy as np
import torch

from conversion.job import same_values
from conversion.problems import absent
from conversion.sizes import shown_bytes
from conversion.source import Source
from conversion.tensors import CannotConvert, LogicalTensor, Rows, windows
from engines.base import COPY_AGAIN, BadCheckpoint
from engines.modeldir import read_json
from engines.models.checkpoint import read_header
from engines.models.manifest import Manifest, WrittenFile, WrittenTensor

_CHUNK = 8 << 20
_CONFIG = "config"  # as the name of what differs
_FLOAT_ERROR = 1.001  # of the arithmetic in float32


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two checkpoints differ.

    `loss`: the relative error of a tensor that differs from its quantised self by no more than that must.
    """

    what: str
    why: str
    loss: float | None = None


def differences(first: Source, second: Source) -> Iterator[Difference]:
    """All of them: configuration first, then every tensor, streamed. Nothing is written."""
    if first.config != second.config:
        yield Difference(_CONFIG, _config_difference(first, second))
    for name in dict.fromkeys([*first.tensors, *second.tensors]):  # the model's order
        one, two = first.tensors.get(name), second.tensors.get(name)
        if one is None or two is None:
            missing = first.root if one is None else second.root
            yield Difference(name, f"missing from {missing}")
        elif (one.scale is None) != (two.scale is None):
            yield _quantized(name, one, two)
        elif one.shape != two.shape or one.dtype != two.dtype:
            yield Difference(name, f"{one.dtype} {list(one.shape)} and {two.dtype} {list(two.shape)}")
        elif not same_values(one, two):
            yield Difference(name, "values differ")
    for source in (first, second):
        for one, two in source.replicas:
            if not same_values(one, two):
                yield Difference(one.name, f"{two.parts[0].path} differs from {one.parts[0].path}")


def _quantized(name: str, one: LogicalTensor, two: LogicalTensor) -> Difference:
    """How far whichever is quantised is from the other: root of the squared error over that of the squares,
    and whether every value is the nearest that there is. Streamed."""
    exact, near = (one, two) if one.scale is None else (two, one)
    if exact.shape != near.shape:
        return Difference(name, f"{one.dtype} {list(one.shape)} and {two.dtype} {list(two.shape)}")
    error = squares = 0.0
    is_nearest = True
    for start, stop in windows(exact.num_rows, 4 * exact.num_columns, _CHUNK):
        rows = np.arange(start, stop, dtype=np.int64)
        values = exact.values(rows)
        lost = (near.values(rows) - values).abs()
        most = _rounding(near, values, rows) * _FLOAT_ERROR
        is_nearest &= bool((lost <= most).all())  # not if one is not a number
        error += float(lost.square().sum())
        squares += float(values.square().sum())
    loss = sqrt(error / squares) if squares else sqrt(error)
    why = f"{one.dtype} and {two.dtype}, relative error {loss:.3%}"
    if is_nearest:
        return Difference(name, why, loss)
    return Difference(name, f"{why}, more than quantising loses")


def _rounding(near: LogicalTensor, values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """By how much quantising changes each of the values at most: half the distance of what can be stored."""
    assert near.scale is not None
    scale = near.scale.values(rows)
    if near.dtype == "I8":
        return scale / 2
    return torch.maximum(values.abs() / 16, scale / 1024)  # e4m3: three bits behind the first; denormals


def summary(first: Source, second: Source, found: Sequence[Difference]) -> str:
    """What the differences of two checkpoints come to, in a line."""
    num_tensors = len(first.tensors.keys() | second.tensors.keys())
    differing = {difference.what for difference in found if difference.loss is None}
    near = [one for one in found if one.loss is not None and one.what not in differing]
    num_equal = num_tensors - len(near) - len(differing - {_CONFIG})
    if not found:
        return f"all {num_tensors} tensors are equal, bit by bit"
    parts = [f"of {num_tensors} tensors {num_equal} are equal, bit by bit"]
    if near:
        worst = max(near, key=lambda one: one.loss or 0.0)
        kind = first.quantization or second.quantization
        parts.append(f"{len(near)} within what {kind} loses (the worst: {worst.what}, {worst.why})")
    if differing - {_CONFIG}:
        parts.append(f"{len(differing - {_CONFIG})} differ")
    return ", ".join(parts) + (f"; {_CONFIG} differs" if _CONFIG in differing else "")


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
        num_files = len(source.manifest.files)
        return f"all {num_files} files ({shown_bytes(num_bytes)}) are what manifest.json says"
    zipped = [path for path in source.files if path.suffix in (".pth", ".bin")]
    _at_once(jobs, [partial(_check_zip, path) for path in zipped])
    listed = _check_list(source.root / "checklist.chk")
    what = [f"{len(zipped)} file(s) match their own checksums"] if zipped else []
    what += [f"{listed} match checklist.chk"] if listed else []
    return ", ".join(what)


def _at_once(jobs: int, calls: Sequence[Callable[[Event], int]]) -> int:
    """The sum of what they return. Raises what the first of them raises, and tells the others to stop; so
    does Ctrl-C. Hashing lets go of the GIL."""
    stop = Event()
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        futures = [pool.submit(call, stop) for call in calls]
        try:
            return sum([future.result() for future in futures])
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _check_zip(path: Path, stop: Event) -> int:
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                _check_record(path, archive, info, stop)
    except BadCheckpoint:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BadCheckpoint(f"{path}: cannot be read: {error}: {COPY_AGAIN}") from None
    return path.stat().st_size


def _check_record(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, stop: Event) -> None:
    """As ZipFile.testzip, which cannot be stopped."""
    try:
        with archive.open(info) as record:
            while not stop.is_set() and record.read(1 << 20):
                pass
    except zipfile.BadZipFile:
        wrong = f"{path}: record {info.filename}: is damaged: its checksum does not match"
        raise BadCheckpoint(f"{wrong}: {COPY_AGAIN}") from None


def _check_list(path: Path) -> int:
    """Lines of an md5 and a file's name."""
    if not path.is_file():
        return 0
    lines = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    pairs = [(line[0], line[1].lstrip("*")) for line in lines if len(line) == 2]
    for md5, name in pairs:
        file = path.parent / name
        if Path(name).name != name or not file.is_file():
            wrong = f"{path}: names {name!r}, which is no file beside it"
            raise BadCheckpoint(f"{wrong}: copy or download it as well, or remove {path.name}")
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "md5").hexdigest() != md5.lower():
                raise BadCheckpoint(f"{file}: is damaged: its md5 is not checklist.chk's: {COPY_AGAIN}")
    return len(pairs)


def check_manifest(root: Path, manifest: Manifest, jobs: int = 0) -> int:
    """Hash every file that the manifest lists. Returns bytes read. Raises BadCheckpoint."""
    calls = [partial(_check_file, root, name, written) for name, written in manifest.files.items()]
    num_bytes = _at_once(jobs, calls)
    if "config.json" in manifest.files and read_json(root / "config.json") != manifest.config:
        raise BadCheckpoint(
            f"{root / 'manifest.json'}: config: is not what config.json says: one of them was changed since, "
            f"{_TAKE_BACK}"
        )
    return num_bytes


def _check_file(root: Path, name: str, written: WrittenFile, stop: Event) -> int:
    if name.startswith("/") or ".." in Path(name).parts:
        raise CannotConvert(f"{root / 'manifest.json'}: names the file {name!r}, outside the directory")
    path = root / name
    if not path.is_file():
        raise absent(root, [name], "manifest.json names it")
    if path.stat().st_size != written.num_bytes:
        raise BadCheckpoint(
            f"{path}: has {path.stat().st_size} bytes, manifest.json says {written.num_bytes}: "
            f"{_remedy(written)}"
        )
    if _sha256(path, 0, written.num_bytes, stop) != written.sha256 and not stop.is_set():
        damaged = _damaged(path, written.tensors)
        raise BadCheckpoint(f"{path}: {damaged}its sha256 is not manifest.json's: {_remedy(written)}")
    return written.num_bytes


_TAKE_BACK = "take that back, or convert with --no-check-source to leave this check out"


def _remedy(written: WrittenFile) -> str:
    """Weights get damaged, small files are edited."""
    return COPY_AGAIN if written.tensors else f"it was changed since: {_TAKE_BACK}"


def _damaged(path: Path, tensors: dict[str, WrittenTensor]) -> str:
    """Which tensors, where the format tells where they lie."""
    if path.suffix != ".safetensors":
        return ""
    header = read_header(path)
    for name, written in tensors.items():
        stored = header.get(name)
        if stored is None or _sha256(path, stored.offset, stored.num_bytes, Event()) != written.sha256:
            return f"tensor {name}: is damaged: "
    return ""


def _sha256(path: Path, offset: int, num_bytes: int, stop: Event) -> str:
    """Of a part of a file; of nothing in particular once it shall stop."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while not stop.is_set() and num_bytes > 0 and (data := file.read(min(_CHUNK, num_bytes))):
            digest.update(data)
            num_bytes -= len(data)
    return digest.hexdigest()
