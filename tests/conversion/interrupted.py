"""Kills conversions at random points, or takes the room from them, and looks at what they leave.

The process imports everything once and forks: a conversion of a small model is over before a Python
interpreter has started. AssertionError at the first wrong outcome.

    python -m tests.conversion.interrupted SOURCE DIR COUNT SEED

is full_disks, for on_a_small_disk.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from threading import Lock

import torch

from conversion.job import Options
from conversion.journal import partial_dir
from conversion.main import USER_ERRORS, verify
from conversion.plan import Target
from conversion.progress import Silent
from conversion.source import Choices
from tests.conversion.helpers import convert
from tests.models import Shape, make_llama

SHAPE = Shape(hidden=256, layers=4, heads=8, kv_heads=2, head_dim=32, ffn=512, vocab=2001)
TARGETS = (Target("sluice", tp=2, pp=2), Target("hf", max_file_bytes=1 << 20), Target("meta", shards=2))
REFUSED = 3
NO_MOUNT = 4
DISK_MIB = 32


def forked(work: Callable[[], object]) -> int:
    """The id of a child that does `work`: it ends with 0, or REFUSED after a clear error."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except USER_ERRORS as error:
        os.write(2, f"{error}\n".encode() if "make room" not in str(error) else b"")
        code = REFUSED if "make room" in str(error) else 1
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_same(source: Path, target: Path) -> bool:
    """Every byte as the manifest says, every tensor equal to the source's."""
    with contextlib.redirect_stdout(io.StringIO()):
        return verify(source, target, Choices(), numeric=False, layers=1) == 0


def check_absent_or_complete(source: Path, target: Path) -> bool:
    """Whether it is there. Raises if half of it is."""
    if not target.exists():
        return False
    if not is_same(source, target):
        raise AssertionError(f"{target} is there and is not the model")
    return True


def resume(source: Path, target: Path, how: Target) -> None:
    """Finish it, as a user would."""
    code = ended(forked(lambda: convert(source, target, how, Options(resume=True))))
    if code != 0 or not is_same(source, target) or partial_dir(target).exists():
        raise AssertionError(f"{target}: resuming ended with {code}")


def kill_once(source: Path, target: Path, how: Target, seconds: float) -> bool:
    """Whether the kill came before the end."""
    pid = forked(lambda: convert(source, target, how))
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    code = ended(pid)
    is_there = check_absent_or_complete(source, target)
    if not is_there:
        resume(source, target, how)
    return code == -signal.SIGKILL


def fill_once(source: Path, target: Path, how: Target, limit: int) -> bool:
    """No file may grow beyond `limit` bytes. Whether that stopped it."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        convert(source, target, how)

    code = ended(forked(limited))
    if code not in (0, REFUSED):
        raise AssertionError(f"{target}: ended with {code} where no file may be larger than {limit}")
    if check_absent_or_complete(source, target) != (code == 0):
        raise AssertionError(f"{target}: ended with {code}")
    if code == REFUSED:
        resume(source, target, how)
    return code == REFUSED


def duration(source: Path, scratch: Path, how: Target) -> float:
    start = time.perf_counter()
    assert ended(forked(lambda: convert(source, scratch, how))) == 0
    shutil.rmtree(scratch)
    return time.perf_counter() - start


class FillsDisk(Silent):
    """Takes all room but `left` bytes once `after` bytes are converted: what else grows on the disk."""

    def __init__(self, ballast: Path, after: int, left: int) -> None:
        self._ballast, self._after, self._left, self._lock = ballast, after, left, Lock()

    def advance(self, file: str, num_bytes: int) -> None:
        with self._lock:
            self._after -= num_bytes
            if self._after < 0 and not self._ballast.exists():
                fill(self._ballast, self._left)


def fill(ballast: Path, left: int) -> None:
    """Let a file grow until the disk is full, then give back `left` bytes."""
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(1 << 16))
    os.truncate(ballast, ballast.stat().st_size - left)


def crowd_once(source: Path, target: Path, how: Target, after: int, left: int) -> bool:
    """The disk of `target` fills up underway. Whether that stopped it."""
    ballast = target.parent / "ballast"
    code = ended(forked(lambda: convert(source, target, how, progress=FillsDisk(ballast, after, left))))
    if not ballast.exists() and code != 0:
        raise AssertionError(f"{target}: ended with {code} before the disk was full")
    if code not in (0, REFUSED) or check_absent_or_complete(source, target) != (code == 0):
        raise AssertionError(f"{target}: ended with {code} on a full disk")
    ballast.unlink(missing_ok=True)
    if code == REFUSED:
        resume(source, target, how)
    return code == REFUSED


def make_source(root: Path) -> Path:
    return make_llama(root / "source", SHAPE, 0, torch.float32)


def kills(source: Path, root: Path, count: int, seed: int) -> int:
    """How many of them came in the middle. Raises AssertionError."""
    rng, effective = random.Random(seed), 0
    seconds = {how: duration(source, root / "timed", how) for how in TARGETS}
    for number, how in zip(range(count), cycle(TARGETS)):
        target = root / f"killed-{number}"
        effective += kill_once(source, target, how, rng.uniform(0, 1.05) * seconds[how])
        shutil.rmtree(target)
    return effective


def size_limits(source: Path, root: Path, count: int, seed: int) -> int:
    """How many of them stopped a conversion. Raises AssertionError."""
    rng, effective = random.Random(seed), 0
    for number, how in zip(range(count), cycle(TARGETS)):
        target = root / f"limited-{number}"
        effective += fill_once(source, target, how, int(10 ** rng.uniform(2, 6.8)))
        shutil.rmtree(target)
    return effective


def full_disks(source: Path, root: Path, count: int, seed: int) -> int:
    """As size_limits; `root` is a small disk of its own."""
    rng, effective = random.Random(seed), 0
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    for number, how in zip(range(count), cycle(TARGETS)):
        target = root / f"crowded-{number}"
        effective += crowd_once(source, target, how, rng.randrange(size), rng.randrange(1 << 16))
        shutil.rmtree(target)
    return effective


def on_a_small_disk(source: Path, root: Path, count: int, seed: int) -> int | None:
    """full_disks on a tmpfs that is mounted for it; None where this user may not mount one."""
    root.mkdir()
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f'mount -t tmpfs -o size={DISK_MIB}m tmpfs "$0" || exit {NO_MOUNT}; exec "$@"'
    program = [sys.executable, "-m", "tests.conversion.interrupted"]
    try:
        argv = [*private, mount, str(root), *program, str(source), str(root), str(count), str(seed)]
        result = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    if result.returncode == NO_MOUNT or "unshare failed" in result.stderr:
        return None
    if result.returncode != 0:
        raise AssertionError(result.stderr)
    return int(result.stdout.split()[-1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(full_disks(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
