"""The run directory: private to one start of a group, and gone with it.

Its name carries the pid of the gateway that made it, and that gateway holds a lock on it as long as it
lives, so that what a killed gateway and a killed guard left together can be told from what is in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engines.guard import remove_traces

_NAME = re.compile(r"sluice-(\d+)-\w{8}")


@contextlib.contextmanager
def run_directory(parent: Path) -> Iterator[Path]:
    """A new directory in `parent` for this user only. On leaving, it and its shared memory are removed."""
    path = Path(tempfile.mkdtemp(prefix=f"sluice-{os.getpid()}-", dir=parent))
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
    finally:
        remove_traces(path)
        os.close(lock)


def remove_stale(parent: Path) -> list[Path]:
    """Remove the run directories in `parent` whose gateway of this user is dead. Returns them."""
    stale = [path for path in parent.iterdir() if _is_stale(path)]
    for path in stale:
        remove_traces(path)
    return stale


def _is_stale(path: Path) -> bool:
    name = _NAME.fullmatch(path.name)
    if name is None or Path(f"/proc/{name[1]}").exists():
        return False
    with contextlib.suppress(OSError):  # gone meanwhile, not a directory, or not ours to open
        return path.lstat().st_uid == os.getuid() and not _is_locked(path)
    return False


def _is_locked(path: Path) -> bool:
    """By a gateway that lives, perhaps in another pid namespace that shares the directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
