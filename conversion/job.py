"""One conversion from start to end: plan, files, manifest, rename. Crash-safe at every point.

Everything is written into a directory beside the target, the manifest last, and that directory is
renamed: the target is complete or it is not there.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Event, Lock

import msgspec
import numpy as np

from conversion.journal import Journal, digest, locked, partial_dir
from conversion.plan import OutputFile, Plan
from conversion.progress import Progress
from conversion.sidecar import SideFile, side_files
from conversion.sizes import shown_bytes
from conversion.source import Source
from conversion.tensors import CannotConvert, LogicalTensor, windows
from conversion.write import write_file
from engines.base import BadCheckpoint
from engines.models.manifest import MANIFEST_NAME, Manifest, WrittenFile

_BUFFERS = 10  # windows that a file may hold at once: as read, put in order, converted, waiting


class Stopped(Exception):  # noqa: N818
    """Another file has failed, or the user has interrupted."""


class Interrupted(CannotConvert):
    """By Ctrl-C, while files were written. The message says how to go on."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to work; what to make is in the plan. `max_memory`: bytes of buffers, all jobs together."""

    max_memory: int = 512 << 20
    jobs: int = 0  # files at once; 0: as many as there are cores
    resume: bool = False


def run(source: Source, plan: Plan, target: Path, options: Options, progress: Progress) -> Manifest:
    """Raises CannotConvert, BadCheckpoint; an OSError becomes one of them, with file and tensor."""
    check_start(source, plan, target)
    _check_replicas(source)
    sides = side_files(source, plan)
    partial = partial_dir(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            manifest = _convert(source, plan, sides, target, options, progress)
            shutil.rmtree(partial)
            return manifest
    except OSError as error:
        raise CannotConvert(_os_error(error, target)) from None


def check_start(source: Source, plan: Plan, target: Path) -> None:
    """Raises CannotConvert where a conversion cannot begin, before there is anything to clear away."""
    check_target(source, target)
    if not partial_dir(target).exists():
        check_room(target, plan.num_bytes)


def check_target(source: Source, target: Path) -> None:
    """Raises CannotConvert unless the target is outside the source, and absent or an empty directory."""
    if target.resolve() == source.root.resolve() or source.root.resolve() in target.resolve().parents:
        raise CannotConvert(f"{target}: lies in the source, which is left as it is: name another target")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CannotConvert(f"{target}: is there already: name another target, or remove it")


def _os_error(error: OSError, target: Path) -> str:
    where = "; ".join(getattr(error, "__notes__", [])) or str(error.filename or target)
    remedy = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = ": make room, and run the same command with --resume to go on; the target is not there yet"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = ": choose a target that you may write to"
    return f"{target}: {where}: {error.strerror or error}{remedy}"


def _convert(
    source: Source, plan: Plan, sides: list[SideFile], target: Path, options: Options, progress: Progress
) -> Manifest:
    partial = partial_dir(target)
    journal = Journal(partial, _digest(source, plan), options.resume)
    try:
        todo = [file for file in plan.files if file.name not in journal.finished]
        _check_room_for(todo, journal, partial)
        _write_all(todo, journal, options, progress)
        for side in sides:
            _write_side(journal.out / side.name, side)
        manifest = _manifest(source, plan, journal, sides)
        content = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        _write_side(journal.out / MANIFEST_NAME, SideFile(MANIFEST_NAME, content))
        _sync_directories(journal.out)
    except KeyboardInterrupt:
        done = f"{len(journal.finished)} of {len(plan.files)} file(s) of weights are finished"
        raise Interrupted(
            f"interrupted: {done}: run the same command with --resume to go on, or remove {partial}"
        ) from None
    finally:
        journal.close()
    os.rename(journal.out, target)
    _sync_directory(target.parent)
    return manifest


def _digest(source: Source, plan: Plan) -> str:
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    return digest(version("sluice"), stats, sorted(source.config_json.items()), plan.target)


def check_room(path: Path, needed: int) -> None:
    """Raises CannotConvert if the disk of a path, which need not be there yet, has less room than that."""
    directory = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CannotConvert(
            f"{path}: needs {shown_bytes(needed)}, and the disk of {directory} has {shown_bytes(free)} free: "
            "make room, or choose another disk"
        )


def _check_room_for(todo: Sequence[OutputFile], journal: Journal, partial: Path) -> None:
    """As check_room; leaves nothing behind that a later --resume could not use."""
    try:
        check_room(partial, sum(file.num_bytes for file in todo))
    except CannotConvert:
        if not journal.finished:
            shutil.rmtree(partial)
        raise


def _write_all(todo: Sequence[OutputFile], journal: Journal, options: Options, progress: Progress) -> None:
    """A thread for each file that is open: copying, hashing and writing all let go of the GIL."""
    jobs = max(1, min(options.jobs or len(os.sched_getaffinity(0)), len(todo)))
    window_bytes = max(1 << 16, options.max_memory // (jobs * _BUFFERS))
    stop, lock = Event(), Lock()

    def write(file: OutputFile) -> None:
        def advance(num_bytes: int) -> None:
            progress.advance(file.name, num_bytes)
            if stop.is_set():
                raise Stopped

        progress.start(file.name, file.num_bytes)
        written = write_file(journal.out / file.name, file, window_bytes, advance)
        with lock:
            journal.add(file.name, written)
        progress.finish(file.name, written.sha256)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(write, file) for file in todo]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            stop.set() if any(future.exception() for future in done) else None
        except KeyboardInterrupt:
            stop.set()
            raise
        finally:
            for future in futures:
                future.cancel()
    errors = [future.exception() for future in futures if not future.cancelled()]
    for error in errors:
        if error is not None and not isinstance(error, Stopped):
            raise error


def _check_replicas(source: Source) -> None:
    """What several shards hold must be the same in all of them. Raises BadCheckpoint."""
    for first, second in source.replicas:
        if not same_values(first, second):
            path = second.parts[0].path
            raise BadCheckpoint(
                f"{path}: tensor {first.name}: is not what {first.parts[0].path.name} holds, and must be: "
                "the shards do not belong together"
            )


def same_values(first: LogicalTensor, second: LogicalTensor) -> bool:
    """Bit by bit, a window at a time."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    row_bytes = first.num_bytes // max(1, first.num_rows)
    for start, stop in windows(first.num_rows, row_bytes, 4 << 20):
        rows = np.arange(start, stop, dtype=np.int64)
        if not np.array_equal(first.read(rows), second.read(rows)):
            return False
    if first.scale is None or second.scale is None:
        return first.scale is second.scale
    return same_values(first.scale, second.scale)


def _write_side(path: Path, side: SideFile) -> None:
    with path.open("wb") as file:
        file.write(side.content)
        file.flush()
        os.fsync(file.fileno())


def _manifest(source: Source, plan: Plan, journal: Journal, sides: Sequence[SideFile]) -> Manifest:
    files = {file.name: journal.finished[file.name] for file in plan.files}
    files |= {side.name: WrittenFile(len(side.content), side.sha256) for side in sides}
    return Manifest(
        tool=f"sluice {version('sluice')}",
        format=plan.target.format,
        config=next(side.config for side in sides if side.config is not None),
        files=files,
        layout=plan.layout,
        source={"format": source.format, "layout": source.layout, "name": source.root.name},
    )


def _sync_directories(root: Path) -> None:
    for path in [root, *(p for p in root.rglob("*") if p.is_dir())]:
        _sync_directory(path)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
