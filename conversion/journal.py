"""What of an interrupted conversion is finished: a line for each file, written once it is on the disk.

The directory beside the target that holds it all is `.NAME.partial`: journal, lock, and `out`, which
becomes the target when everything is in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from conversion.tensors import CannotConvert
from engines.models.manifest import WrittenFile


class Line(msgspec.Struct, frozen=True):
    """The first line has the plan's digest, all others a file."""

    plan: str = ""
    file: str = ""
    written: WrittenFile | None = None


def partial_dir(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Raises CannotConvert if another process converts into the same target."""
    partial.mkdir(exist_ok=True)
    fd = os.open(partial / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CannotConvert(f"{partial}: another conversion into this target is running") from None
    finally:
        os.close(fd)


class Journal:
    """The journal of one conversion. A `plan` is known by its digest: only the same one is resumed."""

    def __init__(self, partial: Path, plan: str, resume: bool) -> None:
        self._path, self.out = partial / "journal.jsonl", partial / "out"
        self.finished: dict[str, WrittenFile] = {}
        if resume:
            self._read(plan)
        else:
            shutil.rmtree(self.out, ignore_errors=True)
            self._path.unlink(missing_ok=True)
        self.out.mkdir(exist_ok=True)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if os.fstat(self._fd).st_size == 0:
            self._append(Line(plan=plan))

    def _read(self, plan: str) -> None:
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        for number, text in enumerate(lines):
            try:
                line = msgspec.json.decode(text, type=Line)
            except msgspec.MsgspecError:
                self._truncate(lines[:number])  # the line that was being written at the end
                return
            if number == 0 and line.plan != plan:
                raise CannotConvert(
                    f"{self._path.parent}: --resume: was left by another conversion than this one:"
                    " repeat that command, or leave out --resume to start anew"
                )
            if line.written is not None and self._is_there(line.file, line.written):
                self.finished[line.file] = line.written

    def _truncate(self, lines: list[bytes]) -> None:
        os.truncate(self._path, sum(len(line) + 1 for line in lines))

    def _is_there(self, name: str, written: WrittenFile) -> bool:
        path = self.out / name
        return path.is_file() and path.stat().st_size == written.num_bytes

    def add(self, name: str, written: WrittenFile) -> None:
        """Called when the file is on the disk."""
        self.finished[name] = written
        self._append(Line(file=name, written=written))

    def _append(self, line: Line) -> None:
        os.write(self._fd, msgspec.json.encode(line) + b"\n")
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def digest(*parts: object) -> str:
    """Of what must be the same for a conversion to be resumed."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
