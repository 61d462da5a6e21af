"""What a section of bench_gpu has: what the command was told, what is known so far, and the engine."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from tests.bench.gpu.options import Options
from tests.bench.gpu.timing import release

if TYPE_CHECKING:
    from engines.native import NativeEngine

Found = dict[str, dict[str, Any]]
"""By section and part: a number, or a row of them."""


class Skipped(Exception):  # noqa: N818
    """Why something cannot be done here. It is no failure."""


class Bench:
    """One in each process. `put` is told of each part of the record as soon as it is there."""

    def __init__(self, options: Options, found: Found, put: Callable[[str, Any], None]) -> None:
        self.options, self.device = options, options.device
        self.found = found
        self._put = put
        self._section, self._ends = "", 0.0
        self._engine: NativeEngine | None = None

    def begin(self, section: str, seconds: float) -> None:
        """What is put from now on is of it. It has so many seconds; then its process is ended."""
        self._section, self._ends = section, monotonic() + seconds
        self.found.setdefault(section, {})

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._ends - monotonic())

    def put(self, part: str, value: Any) -> None:
        self.found[self._section][part] = value
        self._put(part, value)

    def part(self, name: str, work: Callable[[], Any]) -> None:
        """What `work` returns is that part of the record; else why there is none. The section goes on."""
        try:
            value = work()
        except (Exception, SystemExit) as error:
            value = reason(error)
        self.put(name, value)
        release(self.device)

    def of(self, section: str, part: str, number: str | None = None) -> float | None:
        """What was found, if it was: of a row that number."""
        value = self.found.get(section, {}).get(part)
        if isinstance(value, dict):
            value = value.get(number)
        return value if isinstance(value, float | int) else None

    def engine(self) -> NativeEngine:
        """In bfloat16, loaded once a process."""
        if self._engine is None:
            from tests.bench.gpu.model import load, model_of

            self._engine = load(model_of(self.options), self.device)
        return self._engine


def reason(error: BaseException) -> dict[str, str]:
    """How a record says that something was not done: packages that are missing are no failure."""
    if isinstance(error, Skipped | ImportError):
        return {
            "skipped": f"{type(error).__name__}: {error}" if isinstance(error, ImportError) else str(error)
        }
    traceback.print_exception(error, file=sys.stderr)
    return {"error": f"{type(error).__name__}: {error}"[:2000]}
