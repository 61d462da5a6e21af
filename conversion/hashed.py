"""A file that is written front to back and hashed on the way."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType


class HashedFile:
    """Hashing the file takes a thread of its own: it costs as much as all the rest."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.num_bytes = path, 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> int:
        """All of it. `data` must not change before the next call. Raises OSError."""
        view = memoryview(data)
        self._wait()
        self._pending = self._thread.submit(self._digest.update, view)
        left = view
        while left.nbytes:
            left = left[os.write(self._fd, left) :]
        self.num_bytes += view.nbytes
        return view.nbytes

    def sync(self) -> str:
        """Bring it to the disk. Returns its sha256."""
        self._wait()
        os.fsync(self._fd)
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        os.close(self._fd)
