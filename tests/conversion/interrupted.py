"""Kills conversions at random points, or takes the room from them, and looks at what they leave.

    python -m tests.conversion.interrupted --kills 200 --full 50

The process imports everything once and forks: a conversion of a small model is over before a Python
interpreter has started. Exits with 1 at the first wrong outcome.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from conversion.job import Options
from conversion.journal import partial_dir
from conversion.main import USER_ERRORS, verify
from conversion.plan import Target
from conversion.source import Choices
from tests.conversion.helpers import convert
from tests.models import Shape, make_llama

SHAPE = Shape(hidden=256, layers=4, heads=8, kv_heads=2, head_dim=32, ffn=512, vocab=2001)
TARGETS = (Target("sluice", tp=2, pp=2), Target("hf", max_file_bytes=1 << 20), Target("meta", shards=2))
REFUSED = 3


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


def campaign(root: Path, kills: int, fulls: int, seed: int) -> tuple[int, int]:
    """How many kills and how many limits came in the middle. Raises AssertionError."""
    rng = random.Random(seed)
    source = make_llama(root / "source", SHAPE, seed, torch.float32)
    seconds = {how: duration(source, root / "timed", how) for how in TARGETS}
    killed = filled = 0
    for number in range(kills):
        how = TARGETS[number % len(TARGETS)]
        target = root / f"killed-{number}"
        killed += kill_once(source, target, how, rng.uniform(0, 1.05) * seconds[how])
        shutil.rmtree(target)
    for number in range(fulls):
        how = TARGETS[number % len(TARGETS)]
        target = root / f"full-{number}"
        filled += fill_once(source, target, how, int(10 ** rng.uniform(2, 6.8)))
        shutil.rmtree(target)
    return killed, filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--full", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.directory) as root:
        killed, filled = campaign(Path(root), args.kills, args.full, args.seed)
    print(
        f"{killed} of {args.kills} kills and {filled} of {args.full} limits came in the middle; nothing wrong"
    )
    sys.exit(0)


if __name__ == "__main__":
    main()
