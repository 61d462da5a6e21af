"""What the memory soak measures: what a process has written, whoever else maps the same files."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.soak.memory import written

SIZE = 32 << 20
_PROGRAM = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(pages[:: mmap.PAGESIZE])
own = b"x" * int(sys.argv[2])
print("mapped", flush=True)
sys.stdin.read()
"""


@contextmanager
def reader_of(file: Path, num_own: int) -> Iterator[int]:
    """A process that has mapped and read a file, and holds so many bytes of its own; its pid."""
    argv = [sys.executable, "-c", _PROGRAM, str(file), str(num_own)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mapped\n"
        yield process.pid
        process.kill()


def test_memory_that_others_map_too_is_nobodys_growth(tmp_path: Path) -> None:
    file = tmp_path / "library"
    file.write_bytes(b"\1" * SIZE)
    with reader_of(file, 0) as pid:
        with reader_of(file, 0):
            shared, unique = written(pid), psutil.Process(pid).memory_full_info().uss
        alone, unique_alone = written(pid), psutil.Process(pid).memory_full_info().uss
        with reader_of(file, SIZE) as larger:
            assert 0.9 * SIZE < written(larger) - alone < 1.1 * SIZE
    assert unique_alone - unique > 0.9 * SIZE, "what is measured would have grown by the file"
    assert abs(alone - shared) < mmap.PAGESIZE * 16
