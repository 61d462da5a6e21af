"""A file that is written front to back and hashed on the way."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

_AHEAD = 2  # windows that may wait to be hashed and written
_FLUSH_BYTES = 64 << 20


class HashedFile:
    """Hashing and writing take a thread of their own: together they cost as much as all the rest.

    A third one brings to the disk what is written, so that the disk works from the start, and not only
    when all is done.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.num_bytes = path, 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._digest = hashlib.sha256()
        self._worker, self._flusher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self._flush: Future[None] | None = None
        self._unflushed = 0

    def write(self, data: bytes | memoryview) -> int:
        """Take all of it; `data` must not change afterwards. Raises OSError, also for earlier data."""
        view = memoryview(data)
        if len(self._pending) == _AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._worker.submit(self._take, view))
        self.num_bytes += view.nbytes
        return view.nbytes

    def _take(self, view: memoryview) -> None:
        self._digest.update(view)
        self._unflushed += view.nbytes
        while view.nbytes:
            view = view[os.write(self._fd, view) :]
        if self._unflushed >= _FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._flush = self._flusher.submit(os.fdatasync, self._fd)
            self._unflushed = 0

    def drain(self) -> None:
        """Wait until all that was taken is written. Raises OSError."""
        while self._pending:
            self._pending.popleft().result()

    def sync(self) -> str:
        """Bring it to the disk. Returns its sha256. Raises OSError."""
        self.drain()
        if self._flush is not None:
            self._flush.result()
        os.fsync(self._fd)
        return self._digest.hexdigest()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.shutdown()
        self._flusher.shutdown()
        os.close(self._fd)
